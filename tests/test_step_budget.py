"""How many steps fit into the minutes of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from tiny_training import TinyBatch, ds_config, full_weights, join_alone, micro_batch, tiny_engine

from bert_ds.configuration.recipe.run_config import ConfigError, TrainingConfig
from bert_ds.training.loop import step_budget
from bert_ds.training.loop.step_budget import Costs, over_stages, steps_that_fit, time_steps


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        (None, 560),  # 600 s - 20 s of timing - 20 s of the evaluation at the end, 1 s a step
        (40, 373),  # every step carries half a second of evaluation
        (1000, 549),
    ],
)
def test_steps_end_with_their_evaluations_when_the_minutes_do(every: int | None, steps: int) -> None:
    assert steps_that_fit(10.0, Costs(1.0, 20.0, 20.0), evaluate_every=every) == steps


def test_minutes_that_leave_no_time_for_a_step_are_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        steps_that_fit(0.5, Costs(2.5, 20.0, 9.0), evaluate_every=None)
    assert str(refused.value) == (
        "training.max_minutes: 0.5 are too few: timing steps took 9.0 s, a step takes 2.50 s and the evaluation at the "
        "end 20.0 s"
    )


@pytest.mark.parametrize(
    ("found", "lengths"),
    [("neither", {}), ("total_steps 3 and max_minutes 1.5", {"total_steps": 3, "max_minutes": 1.5})],
)
def test_a_run_has_steps_or_minutes(found: str, lengths: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"give exactly one of total_steps and max_minutes, found {found}"):
        TrainingConfig(train_batch_size=1, **lengths)


class Clock:
    """Stands still but while a batch is waited for: the first steps take long."""

    def __init__(self, *seconds: float) -> None:
        self.now, self.taken, self._seconds = 0.0, 0, seconds

    def __iter__(self) -> Iterator[Sequence[TinyBatch]]:
        return self

    def __next__(self) -> Sequence[TinyBatch]:
        self.now += self._seconds[min(self.taken, len(self._seconds) - 1)]
        self.taken += 1
        return [micro_batch(1, 1), micro_batch(1, 2)]

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("minutes", "seconds", "steps", "step_s"),
    [
        (0.5, (1.0,), 8, 1.0),
        (5.0, (1.0,), 8, 1.0),
        (10.0, (1.0,), 12, 1.0),
        (0.5, (9.0,) * 3 + (5.0, 3.0, 2.0, 2.0, 1.0), 8, 1.0),
        (0.5, (9.0,) * 3 + (2.0,) * 4 + (1.0, 7.0, 1.0), 8, 1.0),
        (10.0, (9.0,) * 3 + (5.0, 3.0, 1.0, 0.5), 9, 0.5),
    ],
)
def test_timing_takes_whole_steps_with_their_batches_and_counts_the_usual_one_of_the_later_half(
    minutes: float, seconds: tuple[float, ...], steps: int, step_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    join_alone()
    engine = tiny_engine(ds_config(2, accumulation=2))
    before, clock = full_weights(engine), Clock(*seconds)
    monkeypatch.setattr(step_budget, "time", clock)
    costs = time_steps(engine, iter(clock), held_out=[micro_batch(1, 1)] * 40, minutes=minutes)
    assert clock.taken == 3 + steps
    assert costs == Costs(pytest.approx(step_s), 0.0, pytest.approx(clock.now))
    assert torch.equal(full_weights(engine), before)
    assert engine.basic_optimizer.state, "no optimizer step was taken"


def test_the_slowest_rank_says_how_long_a_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    join_alone()
    monkeypatch.setattr(step_budget, "time", clock := Clock(1.0))
    monkeypatch.setattr(step_budget, "max_over_ranks", lambda seconds: 2 * seconds)
    engine = tiny_engine(ds_config(2, accumulation=2))
    costs = time_steps(engine, iter(clock), held_out=[micro_batch(1, 1)], minutes=0.5)
    assert (costs.step_s, costs.spent_s) == (2.0, 2 * clock.now)


def test_the_stages_of_a_run_count_by_their_shares_of_the_steps() -> None:
    assert over_stages([(0.75, Costs(1.0, 9.0, 3.0)), (0.25, Costs(2.0, 8.0, 4.0))]) == Costs(1.25, 8.0, 7.0)
