"""Hugging Face's names for our tensors and settings, both ways.

The encoder keeps query, key and value in one matrix and pads the vocabulary; Hugging Face has three matrices, the real
vocabulary, and a decoder that is tied and therefore never in the file. `to_hf` then `from_hf` is the identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.recipe.run_config import ConfigError, ModelConfig

_DECODER = "cls.predictions.decoder.weight"
_WORDS = "bert.embeddings.word_embeddings.weight"
_BUFFERS = ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")
_PAIR_ONLY = ("bert.pooler.", "cls.seq_relationship.")
HEAD_PREFIXES = ("cls.", "classifier.", "qa_outputs.")
"""Names of what stands on top of an encoder in transformers' BertFor... classes."""
_SHARED_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "initializer_range",
)


class TensorRow(NamedTuple):
    """One of our tensors: its name and shape, and the Hugging Face tensors it is made of, row block after row block."""

    name: str
    shape: tuple[int, ...]
    hf_names: tuple[str, ...]
    num_hf_rows: int


def to_hf(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return Hugging Face's tensors of a `BertForPreTraining.state_dict()` of ours.

    With a pair head they are those of transformers' BertForPreTraining, without one those of BertForMaskedLM; the tied
    decoder is left out and the padding rows of the vocabulary are cut off.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    return rows_to_hf(state_dict, list(_tensors(config, has_pair_head="seq_relationship.weight" in state_dict)))


def rows_to_hf(state_dict: Mapping[str, Tensor], table: Sequence[TensorRow]) -> dict[str, Tensor]:
    """Return Hugging Face's tensors of a state dict that consists of the rows of a table.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    _check({name: tuple(tensor.shape) for name, tensor in state_dict.items()}, {row.name: row.shape for row in table})
    result = {}
    for row in table:
        used = state_dict[row.name][: row.num_hf_rows * len(row.hf_names)]
        for hf_name, part in zip(row.hf_names, used.split(row.num_hf_rows), strict=True):
            result[hf_name] = part.detach().clone()
    return result


def share_unseen_segments(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a model that was trained on single segments, every segment row equal to the first.

    The other rows have never had a gradient. A tokenizer numbers the second text of a pair 1 all the same, and a random
    vector on each of its tokens would spoil what the encoder has learned.
    """
    name = "bert.embeddings.token_type_weight"
    return {**state_dict, name: state_dict[name][:1].expand_as(state_dict[name]).clone()}


def from_hf(tensors: Mapping[str, Tensor], config: ModelConfig, *, has_pair_head: bool) -> dict[str, Tensor]:
    """Return our state dict of Hugging Face's tensors, padding the vocabulary with zero rows.

    Old names are understood: `gamma` and `beta` of a LayerNorm, no `bert.` in front, the decoder's bias under
    `cls.predictions.decoder`. Pooler and pair classifier are dropped when the run has no pair head.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape, or the decoder is not the word embedding.
    """
    tensors = modern_names(tensors)
    if not has_pair_head:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_PAIR_ONLY)}
    return rows_from_hf(tensors, list(_tensors(config, has_pair_head=has_pair_head)))


def encoder_from_hf(tensors: Mapping[str, Tensor], config: ModelConfig) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the encoder in our names, with its pooler if there is one, and the names of the heads left aside.

    Raises:
        CheckpointError: a tensor of the encoder is missing, unknown or of another shape.
    """
    tensors = modern_names(tensors)
    heads = tuple(name for name in tensors if name.startswith(HEAD_PREFIXES))
    kept = {name: tensor for name, tensor in tensors.items() if name not in heads}
    has_pooler = any(name.startswith("bert.pooler.") for name in kept)
    return rows_from_hf(kept, list(encoder_rows(config, has_pooler=has_pooler))), heads


def rows_from_hf(tensors: Mapping[str, Tensor], table: Sequence[TensorRow]) -> dict[str, Tensor]:
    """Return our state dict of Hugging Face's tensors, padding with zero rows.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    wanted = {name: (row.num_hf_rows, *row.shape[1:]) for row in table for name in row.hf_names}
    _check({name: tuple(tensor.shape) for name, tensor in tensors.items()}, wanted)
    result = {}
    for row in table:
        joined = torch.cat([tensors[name].detach() for name in row.hf_names])
        result[row.name] = torch.cat([joined, joined.new_zeros(row.shape[0] - joined.shape[0], *row.shape[1:])])
    return result


def hf_config(
    config: ModelConfig, *, sentence_pair: Literal["nsp", "sop", "none"], pad_token_id: int = 0
) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        config: the model section of the recipe.
        sentence_pair: the pair objective; decides the architecture and is recorded, because Hugging Face has no word
            for it.
        pad_token_id: id of [PAD].
    """
    return {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM" if sentence_pair == "none" else "BertForPreTraining"],
        **{key: getattr(config, key) for key in _SHARED_KEYS},
        "pad_token_id": pad_token_id,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "sentence_pair_objective": sentence_pair,
    }


def model_config_from_hf(config: Mapping[str, Any], *, pad_vocab_size_to_multiple_of: int = 64) -> ModelConfig:
    """Return our model section of a Hugging Face config.json.

    Raises:
        ConfigError: it is not a BERT encoder that this model can be, or a value is out of range.
    """
    wanted = {
        "model_type": "bert",
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }
    problems = [
        f"{key} is {repr(config[key])[:60]}, wanted {value!r}"
        for key, value in wanted.items()
        if config.get(key, value) != value
    ]
    # CVE-2026-4372: private settings of transformers made it download code.
    private = [key for key in config if key.startswith("_") and key not in ("_name_or_path", "_commit_hash")]
    problems += [f"{key[:60]} is a private setting, wanted none" for key in private[:10]]
    if "model_type" not in config:
        problems.append('model_type is missing, wanted "bert"')
    if problems:
        raise ConfigError("config.json: " + "; ".join(problems))
    values = {key: config[key] for key in _SHARED_KEYS if key in config}
    try:
        return ModelConfig(**values, pad_vocab_size_to_multiple_of=pad_vocab_size_to_multiple_of)
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(map(str, e['loc']))} is {repr(e['input'])[:60]}: {e['msg'][:300]}" for e in error.errors()
        )
        raise ConfigError(f"config.json: {found}") from None


def encoder_rows(config: ModelConfig, *, has_pooler: bool) -> Iterator[TensorRow]:
    """Yield every tensor of the encoder, in the model's order."""
    hidden, embeddings = config.hidden_size, "bert.embeddings"
    yield TensorRow(f"{embeddings}.word_weight", (config.padded_vocab_size, hidden), (_WORDS,), config.vocab_size)
    for name, hf_name, rows in (
        ("position_weight", "position_embeddings", config.max_position_embeddings),
        ("token_type_weight", "token_type_embeddings", config.type_vocab_size),
    ):
        yield same_row(f"{embeddings}.{name}", f"{embeddings}.{hf_name}.weight", rows, hidden)
    yield from _layer_norm_rows(embeddings, embeddings, hidden)
    for layer in range(config.num_hidden_layers):
        yield from _layer_tensors(f"bert.layer.{layer}", f"bert.encoder.layer.{layer}", config)
    if has_pooler:
        yield same_row("bert.pooler.dense_weight", "bert.pooler.dense.weight", hidden, hidden)
        yield same_row("bert.pooler.dense_bias", "bert.pooler.dense.bias", hidden)


def same_row(name: str, hf_name: str, *shape: int) -> TensorRow:
    """Return the row of a tensor that is the same on both sides, up to its name."""
    return TensorRow(name, shape, (hf_name,), shape[0])


def _tensors(config: ModelConfig, *, has_pair_head: bool) -> Iterator[TensorRow]:
    """Yield every tensor of the pre-training model, in the model's order."""
    hidden = config.hidden_size
    yield from encoder_rows(config, has_pooler=has_pair_head)
    yield same_row("predictions.transform_weight", "cls.predictions.transform.dense.weight", hidden, hidden)
    yield same_row("predictions.transform_bias", "cls.predictions.transform.dense.bias", hidden)
    yield from _layer_norm_rows("predictions", "cls.predictions.transform", hidden)
    yield TensorRow("predictions.bias", (config.padded_vocab_size,), ("cls.predictions.bias",), config.vocab_size)
    if has_pair_head:
        yield same_row("seq_relationship.weight", "cls.seq_relationship.weight", 2, hidden)
        yield same_row("seq_relationship.bias", "cls.seq_relationship.bias", 2)


def _layer_norm_rows(name: str, hf_name: str, hidden_size: int) -> Iterator[TensorRow]:
    for kind in ("weight", "bias"):
        yield same_row(f"{name}.layer_norm_{kind}", f"{hf_name}.LayerNorm.{kind}", hidden_size)


def _layer_tensors(name: str, hf_name: str, config: ModelConfig) -> Iterator[TensorRow]:
    """Yield the tensors of one transformer layer."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    for kind, columns in (("weight", (hidden,)), ("bias", ())):
        parts = tuple(f"{hf_name}.attention.self.{part}.{kind}" for part in ("query", "key", "value"))
        yield TensorRow(f"{name}.attention.qkv_{kind}", (3 * hidden, *columns), parts, hidden)
    for ours, theirs, rows, columns in (
        ("attention.output", "attention.output.dense", hidden, (hidden,)),
        ("attention.layer_norm", "attention.output.LayerNorm", hidden, ()),
        ("feed_forward.intermediate", "intermediate.dense", intermediate, (hidden,)),
        ("feed_forward.output", "output.dense", hidden, (intermediate,)),
        ("feed_forward.layer_norm", "output.LayerNorm", hidden, ()),
    ):
        yield TensorRow(f"{name}.{ours}_weight", (rows, *columns), (f"{hf_name}.{theirs}.weight",), rows)
        yield TensorRow(f"{name}.{ours}_bias", (rows,), (f"{hf_name}.{theirs}.bias",), rows)


def modern_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under today's names, without buffers and without the tied decoder."""
    result: dict[str, Tensor] = {}
    for old_name, tensor in tensors.items():
        name = old_name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        name = name.replace("cls.predictions.decoder.bias", "cls.predictions.bias")
        if name.startswith(("embeddings.", "encoder.", "pooler.")):
            name = f"bert.{name}"
        if name in result and not torch.equal(result[name], tensor):
            raise CheckpointError(f"tensor {old_name} is a second {name} with other values")
        if name not in _BUFFERS:
            result[name] = tensor
    decoder = result.pop(_DECODER, None)
    if decoder is not None and _WORDS in result and not torch.equal(decoder, result[_WORDS]):
        raise CheckpointError(f"{_DECODER} differs from {_WORDS}, but this model ties the two")
    return result


def _check(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError listing every missing, unknown and misshapen tensor."""
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unknown {name}" for name in found if name not in wanted]
    problems += [
        f"{name} has shape {list(found[name])}, wanted {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise CheckpointError(f"{len(problems)} wrong tensors: " + "; ".join(problems))
