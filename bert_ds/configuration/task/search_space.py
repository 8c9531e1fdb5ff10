"""The file of a search: which settings of a task are tried at which values, and the trials that follow from it.

    {"settings": {"optimizer.lr": [2e-5, 5e-5], "training.train_batch_size": [16, 32]}}
    {"settings": {"optimizer.lr": {"low": 1e-5, "high": 2e-4, "scale": "log"}, "seed": [1, 2]}, "trials": 12}

Without `trials` every combination is tried, with it so many are drawn. A trial is a function of the file alone; where
`trials` is raised, the earlier ones stay as they are. No library: product and draws are ten lines, and the state of a
study that a library would keep beside the run folders would be a second owner of what was trained.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag, ValidationError

from bert_ds.configuration.reading.config_files import ConfigError, raise_problems, read_config_file
from bert_ds.configuration.reading.config_problems import UNION_TAG, Problem, describe, section_problems
from bert_ds.configuration.reading.config_section import NonNegativeInt, Section

MAX_TRIALS = 1000
_JUDGES = ("name", "kind", "metric", "format", "data", "$schema")
"""Settings that say what is measured: trials that differ in them cannot be compared."""
_DRAWS_PER_TRIAL = 100


class Range(Section):
    """Values between two numbers; whole ones where both are written as whole numbers."""

    low: int | float
    high: int | float
    scale: Literal["linear", "log"] = "linear"
    """log: each power of ten is as likely as another."""

    def draw(self, share: float) -> float | int:
        """Return the value at a share of the way, of three digits where it is no whole number."""
        low, high = float(self.low), float(self.high)
        if self.scale == "log":
            value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        else:
            value = low + share * (high - low)
        return round(value) if isinstance(self.low, int) and isinstance(self.high, int) else float(f"{value:.3g}")


def _form(value: Any) -> str:
    return UNION_TAG + ("values" if isinstance(value, list) else "range")


Values = Annotated[
    Annotated[list[Any], Field(min_length=1, max_length=MAX_TRIALS), Tag(f"{UNION_TAG}values")]
    | Annotated[Range, Tag(f"{UNION_TAG}range")],
    Discriminator(_form),
]


class SearchSpace(Section):
    """A whole search, as loaded from one JSON file."""

    settings: Annotated[dict[str, Values], Field(min_length=1)]
    """Dotted name of a setting of the task file -> the values to try, or the range that they are drawn from."""
    trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | None = None
    """How many are drawn; null tries every combination."""
    seed: NonNegativeInt = 1
    """Of the draws."""


class Trial(NamedTuple):
    """One fine-tuning of a search."""

    number: int
    settings: dict[str, Any]

    @property
    def folder(self) -> str:
        """Its run folder, below that of the search."""
        return f"trial_{self.number:03d}"

    @property
    def overrides(self) -> list[str]:
        """The settings as `load_task` takes them."""
        return [f"{name}={json.dumps(value)}" for name, value in self.settings.items()]

    @property
    def text(self) -> str:
        """The settings for a person."""
        return " ".join(f"{name}={describe(value)}" for name, value in self.settings.items())


def load_trials(path: str | Path) -> list[Trial]:
    """Read the file of a search and return its trials.

    Raises:
        ConfigError: with one line per problem of the file, all at once. That a setting is known and takes such values
            is for who loads the task to say.
    """
    file, space = read_config_file(path), None
    try:
        space = SearchSpace.model_validate_json(json.dumps(file.data))
        problems = _problems(space)
    except ValidationError as error:
        problems = section_problems(error, SearchSpace)
    raise_problems(file, problems)
    assert space is not None, "no problem was raised and nothing was validated"
    try:
        return [Trial(number, settings) for number, settings in enumerate(_settings(space))]
    except ConfigError as error:
        raise ConfigError(f"{path}: trials: {error}") from None


def _problems(space: SearchSpace) -> list[Problem]:
    """Return what pydantic does not see."""
    problems, where = [], "settings.{}".format
    for name, values in space.settings.items():
        if name.partition(".")[0] in _JUDGES and name != "data.max_train_rows":
            problems.append(Problem(where(name), "says what is measured: trials that differ in it cannot be compared"))
        if isinstance(values, Range) and space.trials is None:
            problems.append(Problem(where(name), "is a range, wanted a list of values, or trials: how many are drawn"))
        if isinstance(values, Range) and not values.low < values.high:
            problems.append(Problem(where(name), f"low {values.low} is not below high {values.high}"))
        if isinstance(values, Range) and values.scale == "log" and values.low <= 0:
            problems.append(Problem(where(name), f"low {values.low} has no logarithm, wanted a number above 0"))
        if isinstance(values, list) and len({json.dumps(one) for one in values}) < len(values):
            problems.append(Problem(where(name), "a value stands in the list twice"))
    number = math.prod(len(one) if isinstance(one, list) else 1 for one in space.settings.values())
    if space.trials is None and number > MAX_TRIALS:
        problems.append(Problem("settings", f"give {number:,} combinations, wanted at most {MAX_TRIALS}, or trials"))
    return problems


def _settings(space: SearchSpace) -> list[dict[str, Any]]:
    """Return the settings of each trial; ConfigError where fewer differ than are wanted."""
    if space.trials is None:
        lists = [values for values in space.settings.values() if isinstance(values, list)]
        return [dict(zip(space.settings, values, strict=True)) for values in itertools.product(*lists)]
    drawn: dict[str, dict[str, Any]] = {}
    for draw in range(space.trials * _DRAWS_PER_TRIAL):
        settings = {name: _drawn(values, (space.seed, draw, name)) for name, values in space.settings.items()}
        drawn.setdefault(json.dumps(settings), settings)
        if len(drawn) == space.trials:
            return list(drawn.values())
    raise ConfigError(f"found {space.trials}, wanted at most {len(drawn)}: no more differ; without it all are tried")


def _drawn(values: Sequence[Any] | Range, key: tuple[Any, ...]) -> Any:
    share = random.Random(repr(key)).random()
    return values.draw(share) if isinstance(values, Range) else values[int(share * len(values))]
