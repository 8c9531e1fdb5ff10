"""The stages of a run: which steps they are, what the recipe says in each, and how its batch is spread.

A stage is the recipe with other values in it, so whatever can be said of a recipe can be said of a stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.configuration.reading.config_problems import Problem
from bert_ds.configuration.recipe.run_config import RunConfig
from bert_ds.configuration.recipe.stage_config import StageConfig

REPLACED = {
    "max_seq_length": "sequences",
    "train_batch_size": "training",
    "mlm_probability": "masking",
}
"""Settings of a stage, and the section of the recipe whose setting of that name each replaces."""


TRIAL_STEPS = 1_000_000
"""Of a run whose training.max_minutes are not steps yet: the steps that are timed are taken from a run of so many."""


class RunStage(NamedTuple):
    """A part of a run."""

    run: RunConfig
    """The recipe as it stands in this stage, with no stages of its own."""
    split: BatchSplit
    """Of its global batch over the ranks: as many micro-steps as the recipe's own."""
    start: float
    """Share of the run's steps that comes before it."""
    end: float
    """Share of the run's steps up to its end."""

    @property
    def share(self) -> float:
        """Of the run's steps."""
        return self.end - self.start

    @property
    def first_step(self) -> int:
        """Steps before it; its first place in the order of the data."""
        return round(self.start * self._total_steps)

    @property
    def end_step(self) -> int:
        """Steps up to its end."""
        return round(self.end * self._total_steps)

    @property
    def num_steps(self) -> int:
        """Steps of the stage."""
        return self.end_step - self.first_step

    @property
    def _total_steps(self) -> int:
        return self.run.training.total_steps or TRIAL_STEPS

    @property
    def max_tokens_per_step(self) -> int:
        """Tokens of a step if every example is full."""
        return self.run.training.train_batch_size * self.run.sequences.max_seq_length

    @property
    def values(self) -> dict[str, int | float]:
        """What stages may differ in, by name."""
        return {name: getattr(getattr(self.run, section), name) for name, section in REPLACED.items()}


def run_stages(run: RunConfig, split: BatchSplit) -> tuple[RunStage, ...]:
    """Return the stages of a run in turn, the recipe's own values last; without stages that is the recipe alone.

    Args:
        run: the recipe.
        split: of its own global batch.
    """
    recipes = [*(_replaced(run, stage) for stage in run.stages), run.model_copy(update={"stages": ()})]
    micros = (recipe.training.train_batch_size // split.num_parts for recipe in recipes)
    splits = [split._replace(micro_batch_size=micro) for micro in micros]
    shares = pairwise([0.0, *(stage.until for stage in run.stages), 1.0])
    return tuple(RunStage(recipe, own, *ends) for recipe, own, ends in zip(recipes, splits, shares, strict=True))


def stage_problems(run: RunConfig) -> list[Problem]:
    """Return what is wrong with the stages of a recipe, whatever the number of ranks."""
    problems = []
    for index, stage in enumerate(run.stages):
        where, given = f"stages.{index}", _given(stage)
        if not given:
            problems.append(Problem(where, f"changes nothing: wanted one of {', '.join(REPLACED)}"))
        if index and stage.until <= run.stages[index - 1].until:
            before = f"stages.{index - 1}.until {run.stages[index - 1].until:g}"
            problems.append(Problem(f"{where}.until", f"{stage.until:g} does not come after {before}"))
        longest = run.sequences.max_seq_length
        if stage.max_seq_length is not None and stage.max_seq_length > longest:
            text = f"{stage.max_seq_length} is more than sequences.max_seq_length {longest}, which is the longest"
            problems.append(Problem(f"{where}.max_seq_length", text))
    for name, section in REPLACED.items():
        values = {index: _given(stage)[name] for index, stage in enumerate(run.stages) if name in _given(stage)}
        own = getattr(getattr(run, section), name)
        if values and set(values.values()) == {own}:
            text = f"{own:g} is what {section}.{name} says already, in every stage: leave it out"
            problems.append(Problem(f"stages.{min(values)}.{name}", text))
    return problems or _step_problems(run, run.training.total_steps or TRIAL_STEPS)


def stage_split_problems(run: RunConfig, split: BatchSplit) -> list[Problem]:
    """Return the stages whose global batch cannot be cut into as many micro-batches as the recipe's own."""
    return [
        Problem(
            f"stages.{index}.train_batch_size",
            f"{stage.train_batch_size} is not a multiple of {split.num_parts}, the {split.world_size} ranks x "
            f"{split.accumulation} accumulation of training.train_batch_size {split.train_batch_size}",
        )
        for index, stage in enumerate(run.stages)
        if stage.train_batch_size is not None and stage.train_batch_size % split.num_parts
    ]


def stage_rows(stages: tuple[RunStage, ...]) -> list[tuple[str, str]]:
    """Return the stages as rows of name and text; none where the run is of one piece."""
    if len(stages) == 1:
        return []
    return [
        (
            f"stage {number} of {len(stages)}",
            f"{_steps_text(stage)}: {values_text(stage.values)}, "
            f"micro-batch {stage.split.micro_batch_size}, at most {stage.max_tokens_per_step:,} tokens per step",
        )
        for number, stage in enumerate(stages, 1)
    ]


def values_text(values: Mapping[str, float]) -> str:
    """Return the values of a stage as text."""
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def stages_text(run: RunConfig) -> str:
    """Return what the stages of a recipe differ in as text; empty without stages."""
    return "; ".join(f"up to {stage.until:.0%} of the steps {values_text(_given(stage))}" for stage in run.stages)


def _steps_text(stage: RunStage) -> str:
    if stage.run.training.total_steps is None:
        return f"from {stage.start:.0%} to {stage.end:.0%} of the steps"
    return f"steps {stage.first_step + 1:,} to {stage.end_step:,}"


def _replaced(run: RunConfig, stage: StageConfig) -> RunConfig:
    sections = {
        REPLACED[name]: getattr(run, REPLACED[name]).model_copy(update={name: value})
        for name, value in _given(stage).items()
    }
    return run.model_copy(update={**sections, "stages": ()})


def _given(stage: StageConfig) -> dict[str, int | float]:
    return stage.model_dump(include=set(REPLACED), exclude_none=True)


def _step_problems(run: RunConfig, total_steps: int) -> list[Problem]:
    """Return the first stage that ends at a step at which the one before it, or the run, does so too."""
    ends = [0, *(round(stage.until * total_steps) for stage in run.stages), total_steps]
    for index, stage in enumerate(run.stages):
        if ends[index] < ends[index + 1] < total_steps:
            continue
        text = f"{stage.until:g} of training.total_steps {total_steps} is step {ends[index + 1]}, which leaves a stage"
        return [Problem(f"stages.{index}.until", f"{text} without a step")]
    return []
