"""RoBERTa's encoder (Liu et al. 2019, arXiv 1907.11692): BERT's layers behind embeddings without segments.

Positions are counted from behind the id of the padding, and every token has the one segment vector. There is no pooler:
between the encoder and a classifier of whole sequences lies a dense layer with tanh, which pre-training does not have.
Letters as in `families/bert.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bert_ds.configuration.families.roberta import RobertaConfig
from bert_ds.encoder import bert_layers
from bert_ds.encoder.families.bert_form import (
    BertForm,
    FrontedEncoder,
    common_roles,
    site_behind_front,
    written_settings,
)
from bert_ds.encoder.families.embeddings import BertEmbeddings
from bert_ds.encoder.families.family import Role, RoleName
from bert_ds.encoder.fused_ops import FusedOps


def make_encoder(config: RobertaConfig, ops: FusedOps, **others: Any) -> FrontedEncoder:
    """Return the encoder; `others` are arguments of `FrontedEncoder`."""
    return FrontedEncoder(config, ops, RobertaEmbeddings(config, ops), act=torch.tanh, **others)


class RobertaEmbeddings(BertEmbeddings):
    """BERT's embeddings with positions from behind the padding's and the same segment everywhere."""

    def __init__(self, config: RobertaConfig, ops: FusedOps) -> None:
        super().__init__(config, ops, width=config.hidden_size)
        self.first_position = config.first_position

    def forward(
        self, input_ids_T: Tensor, token_type_ids_T: Tensor, position_ids_T: Tensor, dropout_seed: Tensor | None
    ) -> Tensor:
        """Return hidden_TD of int64 [T] ids and positions, which count from 0 here."""
        same_T = torch.zeros_like(token_type_ids_T)
        return super().forward(input_ids_T, same_T, position_ids_T + self.first_position, dropout_seed)


@torch.no_grad()
def initialise_weights(module: nn.Module, config: RobertaConfig, *, seed: int) -> None:
    """As BERT's, with zeros for the positions that no token has."""
    bert_layers.initialise_weights(module, config, seed=seed)
    for name, parameter in module.named_parameters():
        if name.endswith("position_weight"):
            parameter[: config.first_position] = 0.0


def _more_settings(config: RobertaConfig, special_ids: Mapping[str, int]) -> dict[str, Any]:
    return {
        "max_position_embeddings": config.position_rows,
        "bos_token_id": special_ids["cls"],
        "eos_token_id": special_ids["sep"],
    }


_POOLER = "roberta.pooler.dense"
_FORM = BertForm(
    config=RobertaConfig,
    encoder="roberta",
    front=("bert.front.dense", "classifier.dense"),
    word_head=("lm_head.dense", "lm_head.layer_norm", "lm_head"),
    decoder="lm_head.decoder",
    settings=written_settings(RobertaConfig),
    more_settings=_more_settings,
    wanted={
        "type_vocab_size": 1,
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "position_embedding_type": "absolute",
    },
    # transformers' head has the erf form of GELU whatever hidden_act is.
    word_head_act="gelu",
)


def modern_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As of every family of BERT's form, without a pooler that nothing is behind.

    Published folders of masked words hold one that was never trained.
    """
    named = _FORM.modern_names(tensors)
    drops = "lm_head.dense.weight" in named
    return {name: tensor for name, tensor in named.items() if not (drops and name.startswith(_POOLER))}


def _roles(config: RobertaConfig) -> dict[RoleName, Role]:
    name, pooler = "RobertaForSequenceClassification", ("classifier.dense", _POOLER)
    return {
        **common_roles("Roberta", has_pooler=True),
        "sequence classification": Role(name, "classifier.out_proj", reads_front=True, front_drops=True),
        "multiple choice": Role("RobertaForMultipleChoice", "classifier", reads_front=True, front_renamed=pooler),
    }


ROBERTA = _FORM.family(
    make_encoder=make_encoder,
    initialise=initialise_weights,
    roles=_roles,
    hf_head_prefixes=(
        *("lm_head.", "qa_outputs.", _POOLER),
        *("classifier.out_proj.", "classifier.weight", "classifier.bias"),
    ),
    modern_names=modern_names,
    first_free_site=site_behind_front,
)
