"""Trying a step before a run."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tiny_training import TinyBatch, TinyModel, ds_config, join_alone, micro_batch, tiny_engine

from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.training.loop import trial_step
from bert_ds.training.loop.trial_step import fits_in_memory, largest_that_fits, probe_longest, try_longest


class SlowToStart(TinyModel):
    """Needs a second for its first pass, as one does whose kernels are compiled there."""

    started = False

    def forward(self, **inputs: Any) -> tuple:
        if not self.started:
            time.sleep(1.0)
        self.started = True
        return super().forward(**inputs)


def test_a_probe_times_a_second_whole_step_and_reports_its_peak() -> None:
    join_alone()
    engine = tiny_engine(ds_config(2, accumulation=3), model=SlowToStart())
    probe = probe_longest(engine, micro_batch(1, 1))
    assert probe.first_seconds - probe.seconds > 0.5
    assert engine.global_steps == 2
    assert probe.num_tokens == 3 * micro_batch(1, 1).num_tokens
    assert probe.peak_bytes > 10_000_000
    assert engine.basic_optimizer.state


class HungryModel(TinyModel):
    """Runs out of memory at more than four rows."""

    def forward(self, **inputs: Any) -> tuple:
        if len(inputs["x_TD"]) > 4:
            raise torch.OutOfMemoryError("more than four rows")
        return super().forward(**inputs)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_largest_micro_batch_is_found_by_running_out_of_memory(stage: int) -> None:
    join_alone()
    engine = tiny_engine(ds_config(stage, accumulation=3), model=HungryModel())

    def rows(number: int) -> TinyBatch:
        return TinyBatch(torch.ones(number, 7), torch.ones(number), torch.zeros(1, dtype=torch.int64))

    assert largest_that_fits(lambda size: fits_in_memory(engine, rows(size)), start=1, limit=64) == 4


def test_a_batch_fits_where_it_does_on_every_rank_with_the_gradients_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    join_alone()
    engine, passes = tiny_engine(ds_config(2, accumulation=3)), []
    engine.module.register_forward_pre_hook(lambda module, args: passes.append(1))
    assert fits_in_memory(engine, micro_batch(1, 1)) and len(passes) == 2
    monkeypatch.setattr(trial_step, "max_over_ranks", lambda value: 1.0)  # another rank has no room
    assert not fits_in_memory(tiny_engine(ds_config(2)), micro_batch(1, 1))


@pytest.mark.parametrize(("largest", "found"), [(0, None), (1, 1), (5, 4), (8, 8), (1000, 64)])
def test_doubling_finds_the_largest_size_that_fits(largest: int, found: int | None) -> None:
    assert largest_that_fits(lambda size: size <= largest, start=1, limit=64) == found


def test_doubling_begins_where_it_is_told_and_ends_where_the_batch_cannot_be_cut() -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return True

    assert largest_that_fits(fits, start=24, limit=144) == 48
    assert tried == [24, 48]


class Said:
    """A log that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, text: str) -> None:
        self.lines.append(text)


def test_the_search_begins_at_the_planned_micro_batch() -> None:
    join_alone()
    asked: list[int] = []

    def longest(size: int) -> Any:
        asked.append(size)
        return TinyBatch(torch.ones(size, 7), torch.ones(size), torch.zeros(1, dtype=torch.int64))

    log: Any = Said()
    for split in (BatchSplit(2, 8, 1), BatchSplit(8, 2, 1)):
        engine = tiny_engine(ds_config(0), model=HungryModel())
        try_longest(engine, longest, split=split, log=log, search=True)
    assert asked == [2, 4, 8, 8]
    assert log.lines == [
        '"train_micro_batch_size_per_gpu": 4',
        'a micro-batch of 8 does not fit: set "train_micro_batch_size_per_gpu" to 4 and look again',
    ]


def test_the_search_ends_at_what_a_rank_has_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = None
    log: Any = Said()
    monkeypatch.setattr(trial_step, "fits_in_memory", lambda engine, batch: True)
    try_longest(engine, Mock(), split=BatchSplit(2, 4, 2), log=log, search=True)
    assert log.lines == ['"train_micro_batch_size_per_gpu": 8']
