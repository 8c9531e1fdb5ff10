"""The objectives of a recipe: what the encoder is trained on, and how much each of it weighs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.reading.config_problems import Problem
from bert_ds.configuration.reading.config_section import PositiveFloat, Section

DETECTOR_WEIGHT, GENERATOR_FRACTION = 50.0, 0.25
"""Of replaced tokens where a recipe says nothing else: those of ELECTRA-small (arXiv 2003.10555, table 6)."""

PAIR_OBJECTIVES = {"nsp": "sentence_pair", "sop": "sentence_pair", "structure": "sentence_structure"}
"""What learns the pairs that sequences.sentence_pair makes."""


class ObjectiveConfig(Section):
    """One objective and its weight in the loss."""

    type: Literal["masked_words", "sentence_pair", "sentence_structure", "replaced_tokens"]
    """Masked words, the sentence pairs that sequences.sentence_pair makes, with "structure" sentence_structure, or,
    beside masked words that a generator then learns, which tokens it has replaced."""
    weight: PositiveFloat | None = None
    """Its loss is multiplied by this; null: 50 for replaced_tokens, 1 for the others. Beside a teacher,
    distillation.mlm_weight is that of masked words."""
    generator_fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Of replaced_tokens: hidden_size, heads and intermediate_size of the generator as a part of the model's; null: a
    quarter."""


def objective_weights(objectives: Sequence[ObjectiveConfig] | None, *, sentence_pair: str) -> dict[str, float]:
    """Return the weight of each objective; where none is listed, 1 for masked words and for the pairs that are made."""
    if objectives is not None:
        return {objective.type: _weight(objective) for objective in objectives}
    pairs = PAIR_OBJECTIVES.get(sentence_pair)
    return {"masked_words": 1.0} | ({} if pairs is None else {pairs: 1.0})


def generator_of(objectives: Sequence[ObjectiveConfig] | None, model: EncoderConfig) -> EncoderConfig | None:
    """Return the encoder that replaces tokens, None where that is no objective.

    Raises:
        ValueError: the fraction does not divide the model.
    """
    found = [objective for objective in objectives or () if objective.type == "replaced_tokens"]
    return model.generator(found[0].generator_fraction or GENERATOR_FRACTION) if found else None


def objective_problems(
    objectives: Sequence[ObjectiveConfig] | None, model: EncoderConfig, *, sentence_pair: str, is_distilled: bool
) -> list[Problem]:
    """Return what is wrong with a list of objectives.

    Args:
        objectives: of the recipe.
        model: that learns them.
        sentence_pair: its setting sequences.sentence_pair.
        is_distilled: whether it names a teacher.
    """
    if objectives is None:
        return []
    problems, types = [], [objective.type for objective in objectives]
    for index, objective in enumerate(objectives):
        place, weight = f"objectives.{index}", _weight(objective)
        if objective.type in types[:index]:
            problems.append(
                Problem(f"{place}.type", f'"{objective.type}" is listed twice, wanted once with its weight')
            )
        elif objective.type in PAIR_OBJECTIVES.values() and objective.type != PAIR_OBJECTIVES.get(sentence_pair):
            wanted = " or ".join(f'"{name}"' for name, learner in PAIR_OBJECTIVES.items() if learner == objective.type)
            text = f'"{objective.type}" has no pairs to learn: sequences.sentence_pair is "{sentence_pair}"'
            problems.append(Problem(f"{place}.type", f"{text}, wanted {wanted}"))
        elif objective.type == "masked_words" and is_distilled and weight != 1.0:
            text = f"{weight:g} is a second weight of masked words: beside a teacher distillation.mlm_weight is theirs"
            problems.append(Problem(f"{place}.weight", f"{text}, wanted 1 here"))
        elif objective.type == "replaced_tokens":
            problems += _replaced_problems(objective, model, place=place, is_distilled=is_distilled)
        elif objective.generator_fraction is not None:
            text = f'{objective.generator_fraction:g} is of no generator: wanted it with "replaced_tokens", null here'
            problems.append(Problem(f"{place}.generator_fraction", text))
    if "masked_words" not in types:
        text = f'found {", ".join(types) or "none"}, wanted "masked_words" among them: nothing else trains the words'
        problems.append(Problem("objectives", text))
    learner = PAIR_OBJECTIVES.get(sentence_pair)
    if learner is not None and learner not in types:
        text = f'"{learner}" is missing and sequences.sentence_pair "{sentence_pair}" makes pairs: list it, or '
        problems.append(Problem("objectives", text + 'wanted sequences.sentence_pair "none"'))
    return problems


def _replaced_problems(
    objective: ObjectiveConfig, model: EncoderConfig, *, place: str, is_distilled: bool
) -> list[Problem]:
    if not model.learns_replaced:
        text = f'"replaced_tokens" wants a generator and a detector, which {model.family} has not'
        return [Problem(f"{place}.type", f'{text}: wanted model.type "electra"')]
    if is_distilled:
        text = '"replaced_tokens" trains the words of a generator, which no teacher teaches'
        return [Problem(f"{place}.type", f"{text}: wanted no distillation section, or masked_words alone")]
    try:
        generator_of([objective], model)
    except ValueError as error:
        text = f"{error}, wanted a fraction that divides heads, hidden_size and intermediate_size"
        return [Problem(f"{place}.generator_fraction", text)]
    return []


def _weight(objective: ObjectiveConfig) -> float:
    return objective.weight or (DETECTOR_WEIGHT if objective.type == "replaced_tokens" else 1.0)
