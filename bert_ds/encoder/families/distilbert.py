"""DistilBERT's encoder (Sanh et al. 2019, arXiv 1910.01108): BERT's layers behind embeddings without segments.

There is no pooler: between the encoder and a classifier of whole sequences lies a dense layer with ReLU, which
pre-training does not have. Letters as in `families/bert.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_ds.configuration.families.distilbert import DistilBertConfig
from bert_ds.encoder.bert_layers import (
    EMBEDDING_SITE,
    LayeredEncoder,
    first_free_site,
    initialise_weights,
    layer_rows,
)
from bert_ds.encoder.blocks import first_rows
from bert_ds.encoder.families.family import LAYER_MATRICES, Family, Role, RoleName, refused_settings
from bert_ds.encoder.fused_ops import FusedOps
from bert_ds.encoder.tensor_rows import TensorRow, linear_rows, same_row, without_tied
from bert_ds.encoder.word_head import MaskedWordHead


class DistilBertEncoder(LayeredEncoder):
    """Token stream -> hidden states; segments have no meaning.

    Args:
        config: shape and dropout.
        ops: the table of fused operations.
        has_front: whether the dense layer in front of a classifier of sequences exists.
        activation_checkpointing: keep only each layer's input and recompute the rest in the backward pass.
    """

    def __init__(
        self, config: DistilBertConfig, ops: FusedOps, *, has_front: bool = True, activation_checkpointing: bool = False
    ) -> None:
        embeddings = DistilBertEmbeddings(config, ops)
        super().__init__(config, ops, embeddings, activation_checkpointing=activation_checkpointing)
        self.front = DistilBertFront(config) if has_front else None

    def sequence_rows(self, hidden_TD: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return what a head of whole sequences reads, [N, D]: [CLS] through the front."""
        assert self.front is not None, "the encoder was made without its front"
        return self.front(first_rows(hidden_TD, cu_seqlens))


class DistilBertEmbeddings(nn.Module):
    """Sum of word and position embedding, LayerNorm, dropout."""

    def __init__(self, config: DistilBertConfig, ops: FusedOps) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.ops, self.eps, self.dropout_prob = ops, config.layer_norm_eps, config.dropout
        self.word_weight = nn.Parameter(torch.empty(config.padded_vocab_size, hidden_size))
        self.position_weight = nn.Parameter(torch.empty(config.max_position_embeddings, hidden_size))
        self.layer_norm_weight = nn.Parameter(torch.empty(hidden_size))
        self.layer_norm_bias = nn.Parameter(torch.empty(hidden_size))

    def forward(
        self, input_ids_T: Tensor, token_type_ids_T: Tensor, position_ids_T: Tensor, dropout_seed: Tensor | None
    ) -> Tensor:
        """Return hidden_TD of int64 [T] ids and positions."""
        sum_TD = F.embedding(input_ids_T, self.word_weight) + F.embedding(position_ids_T, self.position_weight)
        return self.ops.dropout(
            self.ops.layer_norm(sum_TD, self.layer_norm_weight, self.layer_norm_bias, self.eps),
            dropout_p=self.dropout_prob if self.training else 0.0,
            dropout_seed=dropout_seed,
            site=EMBEDDING_SITE,
        )


class DistilBertFront(nn.Module):
    """Dense and ReLU, row by row."""

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__()
        self.dense_weight = nn.Parameter(torch.empty(config.hidden_size, config.hidden_size))
        self.dense_bias = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, rows_RD: Tensor) -> Tensor:
        """Return [R, D]."""
        return F.relu(F.linear(rows_RD, self.dense_weight, self.dense_bias))


def _word_head(config: DistilBertConfig, ops: FusedOps) -> MaskedWordHead:
    return MaskedWordHead(config, ops, eps=config.layer_norm_eps, act=config.hidden_act)


_DECODER = "vocab_projector.weight"
_WORDS = "distilbert.embeddings.word_embeddings.weight"
_LAYER_PARTS = {
    **{part: f"attention.{part[0]}_lin" for part in ("query", "key", "value")},
    "attention.output": "attention.out_lin",
    "attention.layer_norm": "sa_layer_norm",
    "feed_forward.intermediate": "ffn.lin1",
    "feed_forward.output": "ffn.lin2",
    "feed_forward.layer_norm": "output_layer_norm",
}
_NOT_WRITTEN = ("type", "pad_vocab_size_to_multiple_of")


def encoder_rows(config: DistilBertConfig, *, has_front: bool) -> Iterator[TensorRow]:
    """Yield every tensor of the encoder, in the model's order."""
    hidden, name, hf_name = config.hidden_size, "bert.embeddings", "distilbert.embeddings"
    yield TensorRow(f"{name}.word_weight", (config.padded_vocab_size, hidden), (_WORDS,), config.vocab_size)
    positions = config.max_position_embeddings
    yield same_row(f"{name}.position_weight", f"{hf_name}.position_embeddings.weight", positions, hidden)
    yield from linear_rows(f"{name}.layer_norm", f"{hf_name}.LayerNorm", hidden)
    for layer in range(config.num_hidden_layers):
        yield from layer_rows(
            f"bert.layer.{layer}", f"distilbert.transformer.layer.{layer}", config, parts=_LAYER_PARTS
        )
    if has_front:
        yield from linear_rows("bert.front.dense", "pre_classifier", hidden, hidden)


def word_head_rows(config: DistilBertConfig) -> Iterator[TensorRow]:
    """Yield the tensors of the masked-word head."""
    hidden = config.hidden_size
    yield from linear_rows("predictions.transform", "vocab_transform", hidden, hidden)
    yield from linear_rows("predictions.layer_norm", "vocab_layer_norm", hidden)
    yield TensorRow("predictions.bias", (config.padded_vocab_size,), ("vocab_projector.bias",), config.vocab_size)


def modern_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the buffer of positions and without the tied decoder.

    An encoder alone has no `distilbert.` in front of its names.
    """
    named = {
        f"distilbert.{name}" if name.startswith(("embeddings.", "transformer.")) else name: tensor
        for name, tensor in tensors.items()
        if not name.endswith("embeddings.position_ids")
    }
    return without_tied(named, _DECODER, words=_WORDS)


def hf_settings(config: DistilBertConfig, special_ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the content of config.json."""
    settings = {name: value for name, value in config.model_dump().items() if name not in _NOT_WRITTEN}
    return {
        "model_type": "distilbert",
        **{config.HF_NAMES.get(name, name): value for name, value in settings.items()},
        # Positions are in the file, as the table that they have become.
        "sinusoidal_pos_embds": False,
        "pad_token_id": special_ids["pad"],
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def from_hf_settings(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return our settings of a config.json, and what this encoder cannot be."""
    names = [name for name in DistilBertConfig.model_fields if name not in _NOT_WRITTEN]
    theirs = {name: DistilBertConfig.HF_NAMES.get(name, name) for name in names}
    settings = {name: content[hf_name] for name, hf_name in theirs.items() if hf_name in content}
    return {**settings, "type": "distilbert"}, refused_settings(content, {"tie_word_embeddings": True})


def _roles(config: DistilBertConfig) -> dict[RoleName, Role]:
    return {
        "masked words": Role("DistilBertForMaskedLM"),
        "encoder": Role("DistilBertModel"),
        "sequence classification": Role("DistilBertForSequenceClassification", "classifier", reads_front=True),
        "token tags": Role("DistilBertForTokenClassification", "classifier"),
        "question answering": Role("DistilBertForQuestionAnswering", "qa_outputs"),
        "multiple choice": Role("DistilBertForMultipleChoice", "classifier", reads_front=True),
    }


DISTILBERT = Family(
    make_encoder=DistilBertEncoder,
    word_head=_word_head,
    pair_head=None,
    initialise=initialise_weights,
    no_decay_patterns=lambda config: ("*bias", "*layer_norm_weight"),
    equal_parts=lambda config: dict.fromkeys(("*qkv_weight", "*qkv_bias"), ("query", "key", "value")),
    matrix_patterns=LAYER_MATRICES,
    roles=_roles,
    encoder_rows=encoder_rows,
    word_head_rows=word_head_rows,
    pair_head_rows=lambda config: iter(()),
    hf_head_prefixes=("vocab_", "classifier.", "qa_outputs."),
    hf_settings=hf_settings,
    from_hf_settings=from_hf_settings,
    modern_names=modern_names,
    first_free_site=first_free_site,
)
