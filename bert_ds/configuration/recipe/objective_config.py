"""The objectives of a recipe: what the encoder is trained on, and how much each of it weighs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from bert_ds.configuration.reading.config_problems import Problem
from bert_ds.configuration.reading.config_section import PositiveFloat, Section


class ObjectiveConfig(Section):
    """One objective and its weight in the loss."""

    type: Literal["masked_words", "sentence_pair"]
    """Masked words, or the sentence pairs that sequences.sentence_pair makes."""
    weight: PositiveFloat = 1.0
    """Its loss is multiplied by this. Beside a teacher, distillation.mlm_weight is that of masked words."""


def objective_weights(objectives: Sequence[ObjectiveConfig] | None, *, sentence_pair: str) -> dict[str, float]:
    """Return the weight of each objective; where none is listed, 1 for masked words and for the pairs that are made."""
    if objectives is not None:
        return {objective.type: objective.weight for objective in objectives}
    return {"masked_words": 1.0} | ({} if sentence_pair == "none" else {"sentence_pair": 1.0})


def objective_problems(
    objectives: Sequence[ObjectiveConfig] | None, *, sentence_pair: str, is_distilled: bool
) -> list[Problem]:
    """Return what is wrong with a list of objectives.

    Args:
        objectives: of the recipe.
        sentence_pair: its setting sequences.sentence_pair.
        is_distilled: whether it names a teacher.
    """
    if objectives is None:
        return []
    problems, types = [], [objective.type for objective in objectives]
    for index, objective in enumerate(objectives):
        place, weight = f"objectives.{index}", objective.weight
        if objective.type in types[:index]:
            problems.append(
                Problem(f"{place}.type", f'"{objective.type}" is listed twice, wanted once with its weight')
            )
        elif objective.type == "sentence_pair" and sentence_pair == "none":
            text = '"sentence_pair" has no pairs to learn: sequences.sentence_pair is "none", wanted "nsp" or "sop"'
            problems.append(Problem(f"{place}.type", text))
        elif objective.type == "masked_words" and is_distilled and weight != 1.0:
            text = f"{weight:g} is a second weight of masked words: beside a teacher distillation.mlm_weight is theirs"
            problems.append(Problem(f"{place}.weight", f"{text}, wanted 1 here"))
    if "masked_words" not in types:
        text = f'found {", ".join(types) or "none"}, wanted "masked_words" among them: nothing else trains the words'
        problems.append(Problem("objectives", text))
    if "sentence_pair" not in types and sentence_pair != "none":
        text = f'"sentence_pair" is missing and sequences.sentence_pair "{sentence_pair}" makes pairs: list it, or '
        problems.append(Problem("objectives", text + 'wanted sequences.sentence_pair "none"'))
    return problems
