"""A rank is killed at random moments, again and again, and the run comes out as if nothing had happened.

The whole of it is `make campaign-kills`; here is one case of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_random_kills_of_a_rank_of_two_change_no_bit_of_the_run(tmp_path: Path) -> None:
    command = [sys.executable, str(TESTS / "campaign_kills.py"), "kills", "--only", "zero3-adamw-fp32-2rank"]
    command += ["--kills", "4", "--unrecorded", "--work", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}:{TESTS.parent / 'kernels'}"}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stderr[-3000:]
    row = json.loads(answer.stdout.splitlines()[-1])
    assert (row["kills"], row["steps"], row["checkpoints_lost"]) == (4, 16, 0)
    assert row["same_losses"]
    assert row["same_evaluations"]
    assert row["same_weights_and_optimizer"]
