"""The objectives that a recipe can list."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.encoder.objectives.masked_words import MaskedWords
from bert_ds.encoder.objectives.objective import Objective
from bert_ds.encoder.objectives.replaced_tokens import ReplacedTokens
from bert_ds.encoder.objectives.sentence_pair import SentencePair
from bert_ds.encoder.objectives.sentence_structure import SentenceStructure

OBJECTIVES: Mapping[str, Callable[[float], Objective]] = {
    "masked_words": MaskedWords,
    "sentence_pair": SentencePair,
    "sentence_structure": SentenceStructure,
}
"""From the type in a recipe to what makes the objective of a weight. Replaced tokens are what becomes of masked words
where a generator learns these."""


def make_objectives(weights: Mapping[str, float], *, generator: EncoderConfig | None = None) -> tuple[Objective, ...]:
    """Return the objectives of these weights, in the order of the table: that of a recipe's list changes nothing.

    Args:
        weights: by type.
        generator: what replaces tokens, where "replaced_tokens" is among them.
    """
    made = {name: make(weights[name]) for name, make in OBJECTIVES.items() if name in weights}
    if generator is not None:
        made["masked_words"] = ReplacedTokens(generator, weights["masked_words"], weight=weights["replaced_tokens"])
    return tuple(made.values())
