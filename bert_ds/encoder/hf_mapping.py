"""Hugging Face's names for our tensors and settings, both ways, whatever the family.

The decoder is tied as a rule and then never in the file. `to_hf` then `from_hf` is the identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.families.table import FAMILY_CONFIGS, HF_FAMILIES
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.encoder.families.family import RoleName
from bert_ds.encoder.families.table import FAMILIES, family_of
from bert_ds.encoder.tensor_rows import TensorRow, rows_from_hf, rows_to_hf


def to_hf(state_dict: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """Return Hugging Face's tensors of the state dict of a pre-training model of ours.

    With a pair head they are those of the family's class for pre-training, with a detector those of replaced tokens,
    with neither those of masked words; the tied decoder is left out and the padding rows of the vocabulary are cut off.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    rows = list(_rows(config, role_of(state_dict)))
    return rows_to_hf({**state_dict, **family_of(config).fixed_tensors(config)}, rows)


def role_of(state_dict: Mapping[str, Tensor]) -> RoleName:
    """Return what a model of ours with these weights was pre-trained for."""
    if "detector.score_weight" in state_dict:
        return "replaced tokens"
    return "pre-training" if "seq_relationship.weight" in state_dict else "masked words"


def share_unseen_segments(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a model that was trained on single segments, every segment row equal to the first.

    The other rows have never had a gradient. A tokenizer numbers the second text of a pair 1 all the same, and a random
    vector on each of its tokens would spoil what the encoder has learned.
    """
    name = "bert.embeddings.token_type_weight"
    if name not in state_dict:
        return dict(state_dict)
    return {**state_dict, name: state_dict[name][:1].expand_as(state_dict[name]).clone()}


def from_hf(tensors: Mapping[str, Tensor], config: EncoderConfig, *, has_pair_head: bool) -> dict[str, Tensor]:
    """Return our state dict of Hugging Face's tensors, padding the vocabulary with zero rows.

    Old names are understood. The front and the pair classifier are dropped when the run has no pair head.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape, the decoder is not the word embedding, or what
            is fixed by the settings is another.
    """
    tensors = modern_names(tensors, config)
    if not has_pair_head:
        dropped = _hf_names(config, "pre-training") - _hf_names(config, "masked words")
        tensors = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    found = rows_from_hf(tensors, list(_rows(config, "pre-training" if has_pair_head else "masked words")))
    for name, wanted in family_of(config).fixed_tensors(config).items():
        if not torch.equal(own := found.pop(name), wanted.to(own.dtype)):
            raise CheckpointError(f"{name} is not the table that the settings of the model fix")
    return found


def discriminator_from_hf(tensors: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """Return the state dict of a `Discriminator`; raises as `from_hf`."""
    return rows_from_hf(modern_names(tensors, config), list(_rows(config, "replaced tokens")))


def encoder_from_hf(tensors: Mapping[str, Tensor], config: EncoderConfig) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the encoder in our names, with its front if there is one, and the names of the heads left aside.

    Raises:
        CheckpointError: a tensor of the encoder is missing, unknown or of another shape.
    """
    tensors, family = modern_names(tensors, config), family_of(config)
    heads = tuple(name for name in tensors if name.startswith(family.hf_head_prefixes))
    kept = {name: tensor for name, tensor in tensors.items() if name not in heads}
    without = {name for row in family.encoder_rows(config, has_front=False) for name in row.hf_names}
    has_front = any(
        name in kept and name not in without
        for row in family.encoder_rows(config, has_front=True)
        for name in row.hf_names
    )
    return rows_from_hf(kept, list(family.encoder_rows(config, has_front=has_front))), heads


def modern_names(tensors: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """Return the tensors under today's names, without buffers and without the tied decoder.

    Raises:
        CheckpointError: a tensor is there twice with other values, or the decoder is not the word embedding.
    """
    return family_of(config).modern_names(tensors)


def hf_config(
    config: EncoderConfig,
    *,
    sentence_pair: Literal["nsp", "sop", "none"],
    special_ids: Mapping[str, int],
    has_detector: bool = False,
) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        config: the model section of the recipe.
        sentence_pair: the pair objective; decides the architecture and is recorded, because Hugging Face has no word
            for it.
        special_ids: ids of "pad", "cls" and "sep".
        has_detector: the weights are those of a discriminator.
    """
    family = family_of(config)
    name: RoleName = "masked words" if sentence_pair == "none" else "pre-training"
    role = family.roles(config)["replaced tokens" if has_detector else name]
    settings = family.hf_settings(config, special_ids)
    return {
        "model_type": settings["model_type"],
        "architectures": [role.architecture],
        **settings,
        "sentence_pair_objective": sentence_pair,
    }


def model_config_from_hf(content: Mapping[str, Any], *, pad_vocab_size_to_multiple_of: int = 64) -> EncoderConfig:
    """Return our model section of a Hugging Face config.json.

    Raises:
        ConfigError: it is of no family that we have, something that the family cannot be, or a value is out of range.
    """
    model_type = str(content.get("model_type"))
    name = HF_FAMILIES.get(model_type)
    if name is None:
        wanted = " or ".join(f'"{known}"' for known in HF_FAMILIES)
        found = f"is {repr(content['model_type'])[:60]}" if "model_type" in content else "is missing"
        raise ConfigError(f"config.json: model_type {found}, wanted {wanted}")
    settings, problems = FAMILIES[name].from_hf_settings(content)
    # CVE-2026-4372: private settings of transformers made it download code.
    private = [key for key in content if key.startswith("_") and key not in ("_name_or_path", "_commit_hash")]
    problems += [f"{key[:60]} is a private setting, wanted none" for key in private[:10]]
    if problems:
        raise ConfigError("config.json: " + "; ".join(problems))
    try:
        fixed = FAMILY_CONFIGS[name].HF_TYPES[model_type]
        multiple = pad_vocab_size_to_multiple_of
        return FAMILY_CONFIGS[name](**settings, **fixed, pad_vocab_size_to_multiple_of=multiple)
    except ValidationError as error:
        names = FAMILY_CONFIGS[name].HF_NAMES
        raise ConfigError(f"config.json: {'; '.join(_problem(item, names) for item in error.errors())}") from None


def _problem(item: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Say what pydantic has found, in one setting, by its name in the file, or between several."""
    said = item["msg"].removeprefix("Value error, ")[:300]
    where = ".".join(names.get(part, str(part)) for part in item["loc"])
    return f"{where} is {repr(item['input'])[:60]}: {said}" if where else said


def _rows(config: EncoderConfig, role: RoleName) -> Iterator[TensorRow]:
    """Yield every tensor of the pre-trained model, in the model's order."""
    family = family_of(config)
    yield from family.encoder_rows(config, has_front=role == "pre-training")
    yield from (family.detector_rows if role == "replaced tokens" else family.word_head_rows)(config)
    if role == "pre-training":
        yield from family.pair_head_rows(config)


def _hf_names(config: EncoderConfig, role: RoleName) -> set[str]:
    return {name for row in _rows(config, role) for name in row.hf_names}
