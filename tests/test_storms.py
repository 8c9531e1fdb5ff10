"""Whole launches under nohup whose terminal is closed, then stopped by a storm, as `make campaign-storms` has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
STEPS = 60


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What came of each way of starting."""
    command = [sys.executable, str(TESTS / "campaign_storms.py"), "nohup", "--steps", str(STEPS)]
    command += ["--work", str(tmp_path_factory.mktemp("storms"))]
    environment = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}:{TESTS.parent / 'kernels'}"}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert answer.returncode == 0, answer.stderr[-3000:]
    found = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]
    return {row["way"]: row for row in found}


@pytest.mark.parametrize(("way", "codes"), [("deepspeed", (-15, -2)), ("bert-ds", (75,))])
def test_a_run_outlives_its_terminal_and_a_storm_saves_it_at_its_last_step(
    rows: dict[str, dict], way: str, codes: tuple[int, ...]
) -> None:
    row = rows[way]
    assert row["code"] in codes
    assert 8 <= row["steps"] < STEPS
    assert (row["saved"], row["done"], row["hangs"]) == (row["steps"], False, False)
    assert row["same"], "the continued run has other bits than the one that was left alone"
