"""Small configurations, weights and inputs that the encoder's tests share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from bert_ds.configuration.families.bert import BertConfig
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX


def small_config(**changes: Any) -> BertConfig:
    """A two-layer BERT of odd sizes without dropout; any field can be changed."""
    fields = dict(
        vocab_size=101,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=37,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertConfig(**{**fields, **changes})


def spread_weights(model: nn.Module, config: EncoderConfig, seed: int = 0, scale: float = 0.2) -> None:
    """Move every weight, bias and LayerNorm off its initial value, so that no two places can be mistaken."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            if name.endswith(("word_weight", "decoder_weight")) or name == "predictions.bias":
                noise[config.vocab_size :] = 0.0
            parameter.add_(noise)


def packed_inputs(config: BertConfig, lengths: Sequence[int], *, masked: int = 3, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of PretrainingModel.forward for sequences of these lengths, `masked` labels in all."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    input_ids_T = torch.randint(1, config.vocab_size, (num_tokens,), generator=generator)
    token_type_ids_T = torch.randint(0, config.type_vocab_size, (num_tokens,), generator=generator)
    labels = torch.randint(0, 2, (len(lengths),), generator=generator)
    labels[torch.tensor(lengths) == 0] = IGNORE_INDEX
    return {
        "input_ids_T": input_ids_T,
        "token_type_ids_T": token_type_ids_T,
        "position_ids_T": torch.cat([torch.arange(length) for length in lengths]),
        "cu_seqlens": starts.int(),
        "max_seqlen": max(lengths),
        "targets": {
            "masked_positions": torch.randperm(num_tokens, generator=generator)[:masked].sort().values,
            "masked_labels": torch.randint(0, config.vocab_size, (min(masked, num_tokens),), generator=generator),
            "pair_labels": labels,
        },
    }


def encoder_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """The part of `packed_inputs` that the encoder alone takes."""
    names = ("input_ids_T", "token_type_ids_T", "position_ids_T", "cu_seqlens", "max_seqlen")
    return {name: batch[name] for name in names}


def pad(values_T: Tensor, cu_seqlens: Tensor, fill: int = 0) -> Tensor:
    """The (N, S) form of a packed stream."""
    bounds = cu_seqlens.tolist()
    rows = [values_T[start:stop] for start, stop in pairwise(bounds)]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def padded_inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
    """Hugging Face's arguments for the same batch, [PAD] being id 0."""
    cu_seqlens = batch["cu_seqlens"]
    labels_T = torch.full_like(batch["input_ids_T"], IGNORE_INDEX)
    labels_T[batch["targets"]["masked_positions"]] = batch["targets"]["masked_labels"]
    return {
        "input_ids": pad(batch["input_ids_T"], cu_seqlens),
        "token_type_ids": pad(batch["token_type_ids_T"], cu_seqlens),
        "attention_mask": pad(torch.ones_like(batch["input_ids_T"]), cu_seqlens),
        "labels": pad(labels_T, cu_seqlens, fill=IGNORE_INDEX),
        "next_sentence_label": batch["targets"]["pair_labels"],
    }
