"""A slow rank and a slow disk are named in the rows of the log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks_harness import run_ranks
from tiny_training import TinyModel, ds_config, join_alone, step_batches, tiny_engine, tiny_loop, tiny_services

from bert_ds.reporting.run_log import read_metrics, step_line
from bert_ds.training.checkpoints.train_state import TrainState
from bert_ds.training.loop.rank_times import RankTimes, slow_rank, spread
from bert_ds.training.loop.train_loop import train


class SlowModel(TinyModel):
    """A model whose forward takes its time."""

    def forward(self, **inputs: Any) -> tuple:
        time.sleep(0.05)
        return super().forward(**inputs)


def slow_batches(rank: int) -> Iterator[Any]:
    for micro_batches in step_batches(0, rank, 1):
        time.sleep(0.05 * rank)
        yield micro_batches


def one_slow_rank(rank: int, world_size: int, folder: str) -> None:
    """Rank 0 computes slowly, rank 1 waits for its data."""
    engine = tiny_engine(ds_config(2, world_size=world_size), model=SlowModel() if rank == 0 else TinyModel())
    services = tiny_services(Path(folder), rank, world_size, rank_times=RankTimes(engine.module))
    loop = tiny_loop(6, log_every_steps=3)
    train(engine, slow_batches(rank), state=TrainState(), loop=loop, services=services)


def test_the_slow_rank_and_the_one_that_waits_for_data_are_in_the_row_and_the_line(tmp_path: Path) -> None:
    run_ranks(one_slow_rank, 2, str(tmp_path))
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["rank_forward_s"]["rank_of_max"] == 0
    assert last["rank_data_wait_s"]["rank_of_max"] == 1
    assert last["rank_data_wait_s"]["max"] >= 0.15  # three steps since the row before
    assert last["slow_rank"].startswith("rank 0 (+")
    assert "slow: rank 0 (+" in (tmp_path / "logs/rank_0.log").read_text()


@pytest.mark.parametrize(
    ("seconds", "remark"),
    [((1.0, 1.0, 1.5, 1.0), "rank 2 (+50%)"), ((1.0, 1.3), "rank 1 (+30%)"), ((1.0, 1.2), None), ((0.0, 0.0), None)],
)
def test_a_rank_is_slow_where_it_takes_a_fifth_longer_than_the_median_of_the_others(
    seconds: tuple[float, ...], remark: str | None
) -> None:
    assert slow_rank(seconds) == remark


def test_every_row_counts_the_waits_since_the_one_before() -> None:
    join_alone()
    times = RankTimes(TinyModel())
    times.data_wait_s = 2.0
    assert (times.report(), times.data_wait_s) == ({}, 0.0)


def test_the_spread_names_the_rank_of_the_largest() -> None:
    assert spread((3.0, 1.0, 8.0, 2.0)) == {"min": 1.0, "median": 2.5, "max": 8.0, "rank_of_max": 2}


def test_a_line_without_a_slow_rank_does_not_mention_one() -> None:
    assert "slow" not in step_line(1, 2, values={"loss": 1.0, "slow_rank": None})
