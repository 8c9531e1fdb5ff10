"""How many optimizer steps fit into the minutes that a recipe gives (24hBERT, arXiv 2104.07705, trains by the clock).

A few steps are taken and timed on an engine that is thrown away, then the number is fixed and written into the run's
own recipe: schedule, stages and every resume follow a number of steps, never a clock.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from deepspeed import DeepSpeedEngine

from bert_ds.basics.input_gate import read_bytes
from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.configuration.run_plan import RunPlan, make_plan
from bert_ds.reporting.run_log import RunLog
from bert_ds.training.agreement import max_over_ranks, on_main_rank
from bert_ds.training.checkpoints.checkpoint_folder import candidates
from bert_ds.training.loop.evaluation import evaluate
from bert_ds.training.loop.train_step import (
    agree_on_totals,
    fetch,
    forward_backward,
    set_learning_rate,
    take_step,
)

_UNTIMED_STEPS = 3
_TIMED_STEPS = 8
_TIMED_SHARE = 0.02
_TIMED_S = 30.0
_EVALUATED_BATCHES = 4


class Costs(NamedTuple):
    """What a run takes, of the slowest rank, in seconds."""

    step_s: float
    """Median of the later half of the timed steps, their batches included."""
    evaluation_s: float
    """Of one evaluation."""
    spent_s: float
    """Of the minutes, by timing itself."""


def with_total_steps(
    plan: RunPlan,
    make: Callable[[], DeepSpeedEngine],
    *,
    batches: Callable[[int], Iterator[Sequence[MicroBatch]]],
    held_out: Callable[[], Sequence[MicroBatch]],
    run_dir: Path,
    log: RunLog,
) -> RunPlan:
    """Return the plan with as many steps as fit into its minutes, or as a run that goes on was given; a collective.

    Args:
        plan: of a recipe with training.max_minutes.
        make: returns an engine like the run's, to time steps on and throw away.
        batches: yields this rank's micro-batches of every step from a place of the order of the data on, from 0.
        held_out: returns this rank's batches of an evaluation.
        run_dir: may hold checkpoints of an earlier launch.
        log: is told the decision and, from then on, the number of steps.

    Raises:
        ConfigError: not one step fits, or the recipe does not fit so few.
        CheckpointError: there are checkpoints and run_config.json does not say the number.
    """
    training = plan.run.training
    assert training.max_minutes is not None
    steps = on_main_rank(lambda: _steps_of_earlier_launch(run_dir))
    if steps is None:
        costs = _timed(plan, make(), batches=batches, held_out=held_out(), minutes=training.max_minutes)
        steps = steps_that_fit(training.max_minutes, costs, evaluate_every=plan.run.evaluation.every_steps)
        log.info(_timed_sentence(training.max_minutes, costs, steps=steps))
        log.row("timing", 0, {"max_minutes": training.max_minutes, **costs._asdict(), "total_steps": steps})
    settled = training.model_copy(update={"total_steps": steps, "max_minutes": None})
    log.total_steps = steps
    try:
        return make_plan(plan.run.model_copy(update={"training": settled}), plan.ds, plan.world_size)
    except ConfigError as error:
        raise ConfigError(f"training.max_minutes {training.max_minutes:g} leaves {steps} steps: {error}") from None


def time_steps(
    engine: DeepSpeedEngine,
    batches: Iterator[Sequence[MicroBatch]],
    *,
    held_out: Sequence[MicroBatch],
    minutes: float,
) -> Costs:
    """Take whole steps at a rate of 0, the first ones untimed, and a part of an evaluation; a collective.

    At least 8 steps are timed, and for 2 % of the minutes but no longer than 30 s. The median of the later half
    counts: where a shape of a batch is met for the first time, code is made. The engine is for throwing away.

    Args:
        engine: of the run, or one like it.
        batches: yields this rank's micro-batches of one step.
        held_out: this rank's batches of an evaluation.
        minutes: of the recipe.
    """
    begun = time.perf_counter()
    set_learning_rate(engine.optimizer, 0.0)
    engine.train()
    for step in range(1, _UNTIMED_STEPS + 1):
        _take(engine, batches, step=step)
    enough_s, started, taken_s = min(_TIMED_S, _TIMED_SHARE * 60 * minutes), time.perf_counter(), [0.0]
    while len(taken_s) <= _TIMED_STEPS or taken_s[-1] < enough_s:
        _take(engine, batches, step=_UNTIMED_STEPS + len(taken_s))
        taken_s.append(max_over_ranks(time.perf_counter() - started))
    later_s = taken_s[(len(taken_s) - 1) // 2 :]
    step_s = statistics.median(end - begin for begin, end in itertools.pairwise(later_s))
    part = held_out[:_EVALUATED_BATCHES]
    started = time.perf_counter()
    evaluate(engine, part)
    evaluation_s = max_over_ranks((time.perf_counter() - started) * len(held_out) / len(part))
    return Costs(step_s, evaluation_s, max_over_ranks(time.perf_counter() - begun))


def over_stages(timed: Sequence[tuple[float, Costs]]) -> Costs:
    """Return what a run takes whose stages, each with its share of the steps, take this; evaluations are alike."""
    step_s = sum(share * costs.step_s for share, costs in timed)
    return Costs(step_s, timed[-1][1].evaluation_s, sum(costs.spent_s for _, costs in timed))


def steps_that_fit(minutes: float, costs: Costs, *, evaluate_every: int | None) -> int:
    """Return the steps that end, with their evaluations, when the minutes do.

    Args:
        minutes: of the recipe; what timing has spent is taken off.
        costs: from `time_steps`.
        evaluate_every: steps between evaluations; None evaluates at the end only.

    Raises:
        ConfigError: not one step fits.
    """
    left_s = 60 * minutes - costs.spent_s - costs.evaluation_s
    steps = int(left_s / (costs.step_s + (costs.evaluation_s / evaluate_every if evaluate_every else 0.0)))
    if steps < 1:
        raise ConfigError(
            f"training.max_minutes: {minutes:g} are too few: timing steps took {costs.spent_s:.1f} s, a step takes "
            f"{costs.step_s:.2f} s and the evaluation at the end {costs.evaluation_s:.1f} s"
        )
    return steps


def _steps_of_earlier_launch(run_dir: Path) -> int | None:
    """Return the steps that a run with checkpoints was given; None where there are none."""
    if not candidates(run_dir):
        return None
    path = run_dir / "run_config.json"
    try:
        steps = json.loads(read_bytes(path, error=CheckpointError))["training"]["total_steps"]
    except (ValueError, KeyError, TypeError, RecursionError):
        steps = None
    if type(steps) is not int:
        raise CheckpointError(f"{path}: training.total_steps is missing, wanted the steps of the run that is continued")
    return steps


def _timed(
    plan: RunPlan,
    engine: DeepSpeedEngine,
    *,
    batches: Callable[[int], Iterator[Sequence[MicroBatch]]],
    held_out: Sequence[MicroBatch],
    minutes: float,
) -> Costs:
    """Time steps of every stage on one engine, which is thrown away."""
    timed = []
    for stage in plan.stages:
        costs = time_steps(engine, batches(stage.first_step), held_out=held_out, minutes=minutes * stage.share)
        timed.append((stage.share, costs))
    _throw_away(engine)
    return over_stages(timed)


def _take(engine: DeepSpeedEngine, batches: Iterator[Sequence[MicroBatch]], *, step: int) -> None:
    micro_batches, data_wait_s = fetch(batches)
    totals = agree_on_totals(micro_batches, data_wait_s=data_wait_s, stop=False)
    forward_backward(engine, micro_batches, counts=totals.counts, seed=0, step=step)
    take_step(engine)
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)


def _throw_away(engine: DeepSpeedEngine) -> None:
    """Give back what an engine holds, as far as nobody else refers to it."""
    engine.destroy()
    gc.collect()
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()


def _timed_sentence(minutes: float, costs: Costs, *, steps: int) -> str:
    """Return what the log says of the decision."""
    return (
        f"training.max_minutes {minutes:g}: {steps:,} steps; a step took {costs.step_s:.4g} s, an evaluation takes "
        f"{costs.evaluation_s:.4g} s, timing took {costs.spent_s:.4g} s of the time"
    )
