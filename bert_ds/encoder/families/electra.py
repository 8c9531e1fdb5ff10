"""ELECTRA's encoder (Clark et al. 2020, arXiv 2003.10555): BERT's layers behind embeddings of a width of their own.

There is no pooler: between the encoder and a classifier of whole sequences lies a dense layer with GELU, which
pre-training does not have. The masked-word head is that of the generator, an encoder of its own or this one; it shares
all that makes the embeddings of width E, LayerNorm too, as in Google's code. Letters as in `families/bert.py`, and E.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_ds.configuration.families.electra import ElectraConfig
from bert_ds.encoder import bert_layers
from bert_ds.encoder.bert_layers import HF_LAYER_PARTS, LayeredEncoder, initialise_weights, layer_rows
from bert_ds.encoder.blocks import Dropout, DroppingFront, activated, first_rows
from bert_ds.encoder.families.embeddings import ProjectedEmbeddings, add_projection
from bert_ds.encoder.families.family import LAYER_MATRICES, Family, Role, RoleName, refused_settings
from bert_ds.encoder.fused_ops import FusedOps
from bert_ds.encoder.tensor_rows import TensorRow, linear_rows, same_row, without_tied
from bert_ds.encoder.word_head import MaskedWordHead


class ElectraEncoder(LayeredEncoder):
    """Token stream -> hidden states.

    Args:
        config: shape, dropout and LayerNorm settings.
        ops: the table of fused operations.
        has_front: whether the dense layer in front of a classifier of sequences exists.
        activation_checkpointing: keep only each layer's input and recompute the rest in the backward pass.
    """

    def __init__(
        self, config: ElectraConfig, ops: FusedOps, *, has_front: bool = True, activation_checkpointing: bool = False
    ) -> None:
        embeddings = ProjectedEmbeddings(config, ops, has_projection=config.embedding_size != config.hidden_size)
        super().__init__(config, ops, embeddings, activation_checkpointing=activation_checkpointing)
        dropout = Dropout(config.hidden_dropout_prob, bert_layers.first_free_site(config))
        self.front = DroppingFront(config.hidden_size, ops, dropout=dropout, act=F.gelu) if has_front else None

    def sequence_rows(self, hidden_TD: Tensor, cu_seqlens: Tensor, dropout_seed: Tensor | None = None) -> Tensor:
        """Return what a head of whole sequences reads, [N, D]: [CLS] through the front, which drops with a seed."""
        assert self.front is not None, "the encoder was made without its front"
        return self.front(first_rows(hidden_TD, cu_seqlens), dropout_seed)


class ElectraGenerator(LayeredEncoder):
    """The smaller encoder that replaces tokens. In place of ids it takes what the discriminator's embeddings make."""

    def __init__(self, config: ElectraConfig, ops: FusedOps) -> None:
        super().__init__(config, ops, GeneratorProjection(config), activation_checkpointing=False)


class GeneratorProjection(nn.Module):
    """A dense layer from E to D where that is another."""

    projection_weight: nn.Parameter
    projection_bias: nn.Parameter

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__()
        self.has_projection = config.embedding_size != config.hidden_size
        if self.has_projection:
            add_projection(self, config)

    def forward(self, embedded_TE: Tensor, *of_the_ids: Tensor | None) -> Tensor:
        """Return hidden_TD."""
        if not self.has_projection:
            return embedded_TE
        return F.linear(embedded_TE, self.projection_weight, self.projection_bias)


class ElectraDetector(nn.Module):
    """Dense, activation, and a score of each token: above 0 where it is taken for a replaced one."""

    def __init__(self, config: ElectraConfig, ops: FusedOps) -> None:
        super().__init__()
        self.ops, self.act = ops, config.hidden_act
        self.dense_weight = nn.Parameter(torch.empty(config.hidden_size, config.hidden_size))
        self.dense_bias = nn.Parameter(torch.empty(config.hidden_size))
        self.score_weight = nn.Parameter(torch.empty(1, config.hidden_size))
        self.score_bias = nn.Parameter(torch.empty(1))

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """Return the scores, [T]."""
        dense_TD = activated(self.ops, F.linear(hidden_TD, self.dense_weight), self.dense_bias, self.act)
        return F.linear(dense_TD, self.score_weight, self.score_bias)[:, 0]


def first_free_site(config: ElectraConfig) -> int:
    """Return the number of the first dropout mask behind those of the layers and of the front."""
    return bert_layers.first_free_site(config) + 1


def _word_head(config: ElectraConfig, ops: FusedOps) -> MaskedWordHead:
    return MaskedWordHead(config, ops, eps=config.layer_norm_eps)


_DECODER = "generator_lm_head.weight"
_WORDS = "electra.embeddings.word_embeddings.weight"
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
_NOT_WRITTEN = ("type", "pad_vocab_size_to_multiple_of")
_SETTINGS = tuple(name for name in ElectraConfig.model_fields if name not in _NOT_WRITTEN)
_WANTED = {
    "summary_type": "first",
    "summary_use_proj": True,
    "summary_activation": "gelu",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "position_embedding_type": "absolute",
}


def encoder_rows(config: ElectraConfig, *, has_front: bool) -> Iterator[TensorRow]:
    """Yield every tensor of the encoder, in the model's order."""
    hidden, width, name, hf_name = config.hidden_size, config.embedding_size, "bert.embeddings", "electra.embeddings"
    yield TensorRow(f"{name}.word_weight", (config.padded_vocab_size, width), (_WORDS,), config.vocab_size)
    for ours, theirs, rows in (
        ("position_weight", "position_embeddings", config.max_position_embeddings),
        ("token_type_weight", "token_type_embeddings", config.type_vocab_size),
    ):
        yield same_row(f"{name}.{ours}", f"{hf_name}.{theirs}.weight", rows, width)
    yield from linear_rows(f"{name}.layer_norm", f"{hf_name}.LayerNorm", width)
    if width != hidden:
        yield from linear_rows(f"{name}.projection", "electra.embeddings_project", hidden, width)
    for layer in range(config.num_hidden_layers):
        yield from layer_rows(f"bert.layer.{layer}", f"electra.encoder.layer.{layer}", config, parts=HF_LAYER_PARTS)
    if has_front:
        yield from linear_rows("bert.front.dense", "classifier.dense", hidden, hidden)


def word_head_rows(config: ElectraConfig) -> Iterator[TensorRow]:
    """Yield the tensors of the masked-word head."""
    width = config.embedding_size
    yield from linear_rows("predictions.transform", "generator_predictions.dense", width, config.hidden_size)
    yield from linear_rows("predictions.layer_norm", "generator_predictions.LayerNorm", width)
    yield TensorRow("predictions.bias", (config.padded_vocab_size,), ("generator_lm_head.bias",), config.vocab_size)


def detector_rows(config: ElectraConfig) -> Iterator[TensorRow]:
    """Yield the tensors of the head that detects replaced tokens."""
    hidden, name = config.hidden_size, "discriminator_predictions"
    yield from linear_rows("detector.dense", f"{name}.dense", hidden, hidden)
    yield from linear_rows("detector.score", f"{name}.dense_prediction", 1, hidden)


def modern_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without buffers and without the tied decoder.

    An encoder alone has no `electra.` in front of its names.
    """
    named = {
        f"electra.{name}" if name.startswith(("embeddings", "encoder.")) else name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(_BUFFERS)
    }
    return without_tied(named, _DECODER, words=_WORDS)


def hf_settings(config: ElectraConfig, special_ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the content of config.json."""
    return {
        "model_type": "electra",
        **{name: getattr(config, name) for name in _SETTINGS},
        "summary_type": "first",
        "summary_use_proj": True,
        "summary_activation": "gelu",
        "summary_last_dropout": config.hidden_dropout_prob,
        "pad_token_id": special_ids["pad"],
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def from_hf_settings(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return our settings of a config.json, and what this encoder cannot be."""
    return {"type": "electra", **{name: content[name] for name in _SETTINGS if name in content}}, refused_settings(
        content, _WANTED
    )


def _roles(config: ElectraConfig) -> dict[RoleName, Role]:
    summary = ("classifier.dense", "sequence_summary.summary")
    return {
        "masked words": Role("ElectraForMaskedLM"),
        "replaced tokens": Role("ElectraForPreTraining"),
        "encoder": Role("ElectraModel"),
        "sequence classification": Role(
            "ElectraForSequenceClassification", "classifier.out_proj", reads_front=True, front_drops=True
        ),
        "token tags": Role("ElectraForTokenClassification", "classifier"),
        "question answering": Role("ElectraForQuestionAnswering", "qa_outputs", has_dropout=False),
        "multiple choice": Role("ElectraForMultipleChoice", "classifier", reads_front=True, front_renamed=summary),
    }


ELECTRA = Family(
    make_encoder=ElectraEncoder,
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
    hf_head_prefixes=(
        *("generator_", "discriminator_predictions.", "qa_outputs.", "sequence_summary."),
        *("classifier.out_proj.", "classifier.weight", "classifier.bias"),
    ),
    hf_settings=hf_settings,
    from_hf_settings=from_hf_settings,
    modern_names=modern_names,
    first_free_site=first_free_site,
    make_generator=ElectraGenerator,
    detector=ElectraDetector,
    detector_rows=detector_rows,
)
