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
from bert_ds.encoder.bert_layers import LayeredEncoder
from bert_ds.encoder.blocks import activated
from bert_ds.encoder.families.bert_form import (
    BertForm,
    FrontedEncoder,
    common_roles,
    site_behind_front,
    written_settings,
)
from bert_ds.encoder.families.embeddings import ProjectedEmbeddings, add_projection
from bert_ds.encoder.families.family import Role, RoleName
from bert_ds.encoder.fused_ops import FusedOps
from bert_ds.encoder.tensor_rows import TensorRow, linear_rows


def make_encoder(config: ElectraConfig, ops: FusedOps, **others: Any) -> FrontedEncoder:
    """Return the encoder; `others` are arguments of `FrontedEncoder`."""
    embeddings = ProjectedEmbeddings(config, ops, has_projection=bool(config.projection_weights))
    return FrontedEncoder(config, ops, embeddings, act=F.gelu, **others)


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


def detector_rows(config: ElectraConfig) -> Iterator[TensorRow]:
    """Yield the tensors of the head that detects replaced tokens."""
    hidden, name = config.hidden_size, "discriminator_predictions"
    yield from linear_rows("detector.dense", f"{name}.dense", hidden, hidden)
    yield from linear_rows("detector.score", f"{name}.dense_prediction", 1, hidden)


def _more_settings(config: ElectraConfig, special_ids: Mapping[str, int]) -> dict[str, Any]:
    return {**_SUMMARY, "summary_last_dropout": config.classifier_dropout_prob}


def _roles(config: ElectraConfig) -> dict[RoleName, Role]:
    name, summary = "ElectraForSequenceClassification", ("classifier.dense", "sequence_summary.summary")
    return {
        **common_roles("Electra"),
        "replaced tokens": Role("ElectraForPreTraining"),
        "sequence classification": Role(name, "classifier.out_proj", reads_front=True, front_drops=True),
        "multiple choice": Role("ElectraForMultipleChoice", "classifier", reads_front=True, front_renamed=summary),
    }


_SUMMARY = {"summary_type": "first", "summary_use_proj": True, "summary_activation": "gelu"}
_FORM = BertForm(
    config=ElectraConfig,
    encoder="electra",
    front=("bert.front.dense", "classifier.dense"),
    word_head=("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head"),
    decoder="generator_lm_head",
    settings=written_settings(ElectraConfig),
    more_settings=_more_settings,
    wanted={
        **_SUMMARY,
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "position_embedding_type": "absolute",
    },
    projection="embeddings_project",
    word_head_act="gelu",
)
ELECTRA = _FORM.family(
    make_encoder=make_encoder,
    roles=_roles,
    hf_head_prefixes=(
        *("generator_", "discriminator_predictions.", "qa_outputs.", "sequence_summary."),
        *("classifier.out_proj.", "classifier.weight", "classifier.bias"),
    ),
    first_free_site=site_behind_front,
    make_generator=ElectraGenerator,
    detector=ElectraDetector,
    detector_rows=detector_rows,
)
