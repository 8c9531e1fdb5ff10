"""DistilBERT's encoder (Sanh et al. 2019, arXiv 1910.01108): BERT's layers behind embeddings without segments.

There is no pooler: between the encoder and a classifier of whole sequences lies a dense layer with ReLU, which
pre-training does not have. Letters as in `families/bert.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_ds.configuration.families.distilbert import DistilBertConfig
from bert_ds.encoder.bert_layers import EMBEDDING_SITE
from bert_ds.encoder.families.bert_form import BertForm, FrontedEncoder, common_roles, written_settings
from bert_ds.encoder.families.family import Role, RoleName
from bert_ds.encoder.fused_ops import FusedOps


def make_encoder(config: DistilBertConfig, ops: FusedOps, **others: Any) -> FrontedEncoder:
    """Return the encoder; `others` are arguments of `FrontedEncoder`."""
    return FrontedEncoder(config, ops, DistilBertEmbeddings(config, ops), act=F.relu, **others)


class DistilBertEmbeddings(nn.Module):
    """Sum of word and position embedding, LayerNorm, dropout."""

    def __init__(self, config: DistilBertConfig, ops: FusedOps) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.ops, self.eps, self.dropout_prob = ops, config.layer_norm_eps, config.dropout_of("embedding")
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


_LAYER_PARTS = {
    **{part: f"attention.{part[0]}_lin" for part in ("query", "key", "value")},
    "attention.output": "attention.out_lin",
    "attention.layer_norm": "sa_layer_norm",
    "feed_forward.intermediate": "ffn.lin1",
    "feed_forward.output": "ffn.lin2",
    "feed_forward.layer_norm": "output_layer_norm",
}


def _more_settings(config: DistilBertConfig, special_ids: Mapping[str, int]) -> dict[str, Any]:
    # Positions are in the file, as the table that they have become.
    return {"sinusoidal_pos_embds": False}


def _roles(config: DistilBertConfig) -> dict[RoleName, Role]:
    return {**common_roles("DistilBert"), "question answering": Role("DistilBertForQuestionAnswering", "qa_outputs")}


_FORM = BertForm(
    config=DistilBertConfig,
    encoder="distilbert",
    front=("bert.front.dense", "pre_classifier"),
    word_head=("vocab_transform", "vocab_layer_norm", "vocab_projector"),
    decoder="vocab_projector",
    settings=written_settings(DistilBertConfig),
    more_settings=_more_settings,
    wanted={"tie_word_embeddings": True},
    layer="transformer.layer.{}",
    parts=_LAYER_PARTS,
)
DISTILBERT = _FORM.family(
    make_encoder=make_encoder, roles=_roles, hf_head_prefixes=("vocab_", "classifier.", "qa_outputs.")
)
