"""The table of families: everything that differs between encoders.

A new family is a row here, a row in `configuration/families/table.py`, and the two files of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.encoder.families.albert import ALBERT
from bert_ds.encoder.families.bert import BERT
from bert_ds.encoder.families.distilbert import DISTILBERT
from bert_ds.encoder.families.electra import ELECTRA
from bert_ds.encoder.families.family import Family
from bert_ds.encoder.families.modernbert import MODERNBERT
from bert_ds.encoder.families.roberta import ROBERTA

FAMILIES: dict[str, Family] = {
    "albert": ALBERT,
    "bert": BERT,
    "distilbert": DISTILBERT,
    "electra": ELECTRA,
    "modernbert": MODERNBERT,
    "roberta": ROBERTA,
}


def weight_patterns(config: EncoderConfig) -> tuple[Sequence[str], Mapping[str, Sequence[str]], Sequence[str]]:
    """Return the names of weights without decay, of several in one tensor, and of matrices, as an optimizer asks."""
    family = family_of(config)
    return family.no_decay_patterns(config), family.equal_parts(config), family.matrix_patterns


def family_of(config: EncoderConfig) -> Family:
    """Return the row of a model's settings."""
    row = FAMILIES[config.family]
    return row.other_form(config) or row
