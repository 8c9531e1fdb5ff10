"""ALBERT's encoder (Lan et al. 2020, arXiv 1909.11942): BERT's layers, which share weights, behind narrow embeddings.

transformers' class shares layers whole. Where a part of them alone is shared, names and settings are those of a BERT
each of whose layers has a copy of it, and there is no projection. Letters as in `families/bert.py`, and E for the
width of the embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.families.albert import AlbertConfig
from bert_ds.encoder.bert_layers import first_free_site, initialise_weights, layer_rows
from bert_ds.encoder.families.bert import BERT, BertEncoder, PairHead
from bert_ds.encoder.families.embeddings import ProjectedEmbeddings
from bert_ds.encoder.families.family import LAYER_MATRICES, Family, Role, RoleName, refused_settings
from bert_ds.encoder.fused_ops import FusedOps
from bert_ds.encoder.tensor_rows import TensorRow, linear_rows, same_row, shared_rows, without_tied
from bert_ds.encoder.word_head import MaskedWordHead


def make_encoder(config: AlbertConfig, ops: FusedOps, **others: Any) -> BertEncoder:
    """Return the encoder; `others` are arguments of `BertEncoder`."""
    embeddings = ProjectedEmbeddings(config, ops, has_projection=bool(config.projection_weights))
    return BertEncoder(config, ops, embeddings=embeddings, **others)


def _word_head(config: AlbertConfig, ops: FusedOps) -> MaskedWordHead:
    return MaskedWordHead(config, ops, eps=config.layer_norm_eps, act=config.hidden_act)


_DECODER, _DECODER_BIAS = "predictions.decoder.weight", "predictions.decoder.bias"
_WORDS = "albert.embeddings.word_embeddings.weight"
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
_LAYER_PARTS = {
    **{part: f"attention.{part}" for part in ("query", "key", "value")},
    "attention.output": "attention.dense",
    "attention.layer_norm": "attention.LayerNorm",
    "feed_forward.intermediate": "ffn",
    "feed_forward.output": "ffn_output",
    "feed_forward.layer_norm": "full_layer_layer_norm",
}
_NOT_WRITTEN = ("type", "pad_vocab_size_to_multiple_of", "shared_parts")
_SETTINGS = {
    name: AlbertConfig.HF_NAMES.get(name, name) for name in AlbertConfig.model_fields if name not in _NOT_WRITTEN
}
_WANTED = {"inner_group_num": 1, "tie_word_embeddings": True, "position_embedding_type": "absolute"}
_LARGEST = {"hidden_size": 4096, "num_attention_heads": 64, "intermediate_size": 16384}
"""What transformers takes where config.json is silent: ALBERT-xxlarge."""


def _shares_whole(config: AlbertConfig) -> bool:
    return config.shared_parts == "all"


def encoder_rows(config: AlbertConfig, *, has_front: bool) -> Iterator[TensorRow]:
    """Yield every tensor of the encoder, in the model's order."""
    if not _shares_whole(config):

        def owned(found: re.Match) -> str:
            return f"bert.layer.{config.owner(int(found[1]), found[2])}.{found[2]}."

        rows = BERT.encoder_rows(config.exported(), has_front=has_front)
        named = (row._replace(name=re.sub(r"^bert\.layer\.(\d+)\.(\w+)\.", owned, row.name)) for row in rows)
        yield from shared_rows(named)
        return
    hidden, width, name, hf_name = config.hidden_size, config.embedding_size, "bert.embeddings", "albert.embeddings"
    yield TensorRow(f"{name}.word_weight", (config.padded_vocab_size, width), (_WORDS,), config.vocab_size)
    for ours, theirs, number in (
        ("position_weight", "position_embeddings", config.max_position_embeddings),
        ("token_type_weight", "token_type_embeddings", config.type_vocab_size),
    ):
        yield same_row(f"{name}.{ours}", f"{hf_name}.{theirs}.weight", number, width)
    yield from linear_rows(f"{name}.layer_norm", f"{hf_name}.LayerNorm", width)
    yield from linear_rows(f"{name}.projection", "albert.encoder.embedding_hidden_mapping_in", hidden, width)
    for group in range(config.num_hidden_groups):
        first = group * config.num_hidden_layers // config.num_hidden_groups
        hf_layer = f"albert.encoder.albert_layer_groups.{group}.albert_layers.0"
        yield from layer_rows(f"bert.layer.{first}", hf_layer, config, parts=_LAYER_PARTS)
    if has_front:
        yield from linear_rows("bert.pooler.dense", "albert.pooler", hidden, hidden)


def word_head_rows(config: AlbertConfig) -> Iterator[TensorRow]:
    """Yield the tensors of the masked-word head."""
    if not _shares_whole(config):
        yield from BERT.word_head_rows(config.exported())
        return
    width = config.embedding_size
    yield from linear_rows("predictions.transform", "predictions.dense", width, config.hidden_size)
    yield from linear_rows("predictions.layer_norm", "predictions.LayerNorm", width)
    yield TensorRow("predictions.bias", (config.padded_vocab_size,), ("predictions.bias",), config.vocab_size)


def pair_head_rows(config: AlbertConfig) -> Iterator[TensorRow]:
    """Yield the tensors of the head for the order of segments."""
    if not _shares_whole(config):
        yield from BERT.pair_head_rows(config.exported())
        return
    yield same_row("seq_relationship.weight", "sop_classifier.classifier.weight", 2, config.hidden_size)
    yield same_row("seq_relationship.bias", "sop_classifier.classifier.bias", 2)


def modern_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without buffers and without the tied decoder and its bias.

    An encoder alone has no `albert.` in front of its names.
    """
    if any(name.startswith(("bert.", "cls.")) for name in tensors):
        return BERT.modern_names(tensors)
    named = {
        f"albert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(_BUFFERS)
    }
    bias = named.pop(_DECODER_BIAS, None)
    if bias is not None and not named.setdefault("predictions.bias", bias).equal(bias):
        raise CheckpointError(f"{_DECODER_BIAS} is a second predictions.bias with other values")
    return without_tied(named, _DECODER, words=_WORDS)


def hf_settings(config: AlbertConfig, special_ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the content of config.json."""
    if not _shares_whole(config):
        return BERT.hf_settings(config.exported(), special_ids)
    return {
        "model_type": "albert",
        **{theirs: getattr(config, ours) for ours, theirs in _SETTINGS.items()},
        "inner_group_num": 1,
        "pad_token_id": special_ids["pad"],
        "bos_token_id": special_ids["cls"],
        "eos_token_id": special_ids["sep"],
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def from_hf_settings(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return our settings of a config.json, and what this encoder cannot be."""
    given = {**_LARGEST, **content}
    settings = {ours: given[theirs] for ours, theirs in _SETTINGS.items() if theirs in given}
    return {**settings, "type": "albert"}, refused_settings(content, _WANTED)


def _roles(config: AlbertConfig) -> Mapping[RoleName, Role]:
    if not _shares_whole(config):
        return BERT.roles(config.exported())
    return {
        "masked words": Role("AlbertForMaskedLM"),
        "pre-training": Role("AlbertForPreTraining", pair_scores="sop_logits"),
        "encoder": Role("AlbertModel", without_front={"add_pooling_layer": False}),
        "sequence classification": Role("AlbertForSequenceClassification", "classifier", reads_front=True),
        "token tags": Role("AlbertForTokenClassification", "classifier"),
        "question answering": Role("AlbertForQuestionAnswering", "qa_outputs", has_dropout=False),
        "multiple choice": Role("AlbertForMultipleChoice", "classifier", reads_front=True),
    }


ALBERT = Family(
    make_encoder=make_encoder,
    word_head=_word_head,
    pair_head=PairHead,
    initialise=initialise_weights,
    no_decay_patterns=BERT.no_decay_patterns,
    equal_parts=BERT.equal_parts,
    matrix_patterns=LAYER_MATRICES,
    roles=_roles,
    encoder_rows=encoder_rows,
    word_head_rows=word_head_rows,
    pair_head_rows=pair_head_rows,
    hf_head_prefixes=("predictions.", "sop_classifier.", "cls.", "classifier.", "qa_outputs."),
    hf_settings=hf_settings,
    from_hf_settings=from_hf_settings,
    modern_names=modern_names,
    first_free_site=first_free_site,
)
