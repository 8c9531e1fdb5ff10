"""The objectives that a recipe can list."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bert_ds.encoder.objectives.masked_words import MaskedWords
from bert_ds.encoder.objectives.objective import Objective
from bert_ds.encoder.objectives.sentence_pair import SentencePair

OBJECTIVES: Mapping[str, Callable[[float], Objective]] = {"masked_words": MaskedWords, "sentence_pair": SentencePair}
"""From the type in a recipe to what makes the objective of a weight."""


def make_objectives(weights: Mapping[str, float]) -> tuple[Objective, ...]:
    """Return the objectives of these weights, in the order of the table: that of a recipe's list changes nothing."""
    return tuple(make(weights[name]) for name, make in OBJECTIVES.items() if name in weights)
