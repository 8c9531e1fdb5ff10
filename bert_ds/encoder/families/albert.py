"""ALBERT's encoder (Lan et al. 2020, arXiv 1909.11942): BERT's layers, which share weights, behind narrow embeddings.

transformers' class shares layers whole. Where a part of them alone is shared, names and settings are those of a BERT
each of whose layers has a copy of it, and there is no projection. Letters as in `families/bert.py`, and E for the
width of the embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from bert_ds.configuration.families.albert import AlbertConfig
from bert_ds.encoder.families.bert import BERT, BertEncoder, PairHead
from bert_ds.encoder.families.bert_form import BertForm, common_roles, written_settings
from bert_ds.encoder.families.embeddings import ProjectedEmbeddings
from bert_ds.encoder.families.family import Family, Role, RoleName
from bert_ds.encoder.fused_ops import FusedOps
from bert_ds.encoder.tensor_rows import TensorRow, same_row, shared_rows


def make_encoder(config: AlbertConfig, ops: FusedOps, **others: Any) -> BertEncoder:
    """Return the encoder; `others` are arguments of `BertEncoder`."""
    embeddings = ProjectedEmbeddings(config, ops, has_projection=bool(config.projection_weights))
    return BertEncoder(config, ops, embeddings=embeddings, **others)


_LAYER_PARTS = {
    **{part: f"attention.{part}" for part in ("query", "key", "value")},
    "attention.output": "attention.dense",
    "attention.layer_norm": "attention.LayerNorm",
    "feed_forward.intermediate": "ffn",
    "feed_forward.output": "ffn_output",
    "feed_forward.layer_norm": "full_layer_layer_norm",
}


def _more_settings(config: AlbertConfig, special_ids: Mapping[str, int]) -> dict[str, Any]:
    ids = {"pad_token_id": special_ids["pad"], "bos_token_id": special_ids["cls"], "eos_token_id": special_ids["sep"]}
    return {"inner_group_num": 1, **ids}


def pair_head_rows(config: AlbertConfig) -> Iterator[TensorRow]:
    """Yield the tensors of the head for the order of segments."""
    yield same_row("seq_relationship.weight", "sop_classifier.classifier.weight", 2, config.hidden_size)
    yield same_row("seq_relationship.bias", "sop_classifier.classifier.bias", 2)


def _roles(config: AlbertConfig) -> dict[RoleName, Role]:
    words = Role("AlbertForPreTraining", pair_scores="sop_logits")
    return {**common_roles("Albert", has_pooler=True), "pre-training": words}


def owned_rows(config: AlbertConfig, *, has_front: bool) -> Iterator[TensorRow]:
    """Yield BERT's tensors of the encoder where a part of the layers alone is shared, which has copies there."""

    def owned(found: re.Match) -> str:
        return f"bert.layer.{config.owner(int(found[1]), found[2])}.{found[2]}."

    rows = BERT.encoder_rows(config.exported(), has_front=has_front)
    named = (row._replace(name=re.sub(r"^bert\.layer\.(\d+)\.(\w+)\.", owned, row.name)) for row in rows)
    yield from shared_rows(named)


_PARTS_SHARED = BERT._replace(make_encoder=make_encoder, encoder_rows=owned_rows, fixed_tensors=lambda config: {})


def _form_of(config: AlbertConfig) -> Family | None:
    return None if config.shared_parts == "all" else _PARTS_SHARED


_FORM = BertForm(
    config=AlbertConfig,
    encoder="albert",
    front=("bert.pooler.dense", "albert.pooler"),
    word_head=("predictions.dense", "predictions.LayerNorm", "predictions"),
    decoder="predictions.decoder",
    settings=written_settings(AlbertConfig, "shared_parts"),
    more_settings=_more_settings,
    wanted={"inner_group_num": 1, "tie_word_embeddings": True, "position_embedding_type": "absolute"},
    layer="encoder.albert_layer_groups.{}.albert_layers.0",
    parts=_LAYER_PARTS,
    projection="encoder.embedding_hidden_mapping_in",
)
ALBERT = _FORM.family(
    make_encoder=make_encoder,
    pair_head=PairHead,
    roles=_roles,
    pair_head_rows=pair_head_rows,
    hf_head_prefixes=("predictions.", "sop_classifier.", "classifier.", "qa_outputs."),
    other_form=_form_of,
)
