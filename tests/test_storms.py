"""Whole launches under nohup whose terminal is closed, then stopped by a storm, as `make campaign-storms` has them."""

from __future__ import annotations

from pathlib import Path

import pytest
from campaign_storms import prepare, storm_under_nohup, weather

STEPS = 60


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was left alone."""
    folder = tmp_path_factory.mktemp("storms")
    prepare(folder, steps=STEPS)
    return folder


@pytest.mark.parametrize(("way", "codes"), [("deepspeed", (-15, -2)), ("bert-ds", (75,))])
def test_a_run_outlives_its_terminal_and_a_storm_saves_it_at_its_last_step(
    work: Path, way: str, codes: tuple[int, ...]
) -> None:
    row = weather(work, storm_under_nohup(way), work / way, start_s=0.0, light=True, nohup=True)
    assert row["code"] in codes
    assert 8 <= row["steps"] < STEPS
    assert (row["saved"], row["done"], row["hangs"]) == (row["steps"], False, False)
    assert row["same"], "the continued run has other bits than the one that was left alone"
