"""A job that queues itself again, with a slurmctld that is down for a while, for good, or refuses."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SCONTROL = """#!/bin/bash
echo "$1" >>{folder}/calls
if [[ $1 == ping ]]; then echo "Slurmctld(primary) at here is {state}"; exit 0; fi
(( $(grep -c requeue {folder}/calls) > {failures} )) || {{ echo "slurm_requeue error: {reason}" >&2; exit 1; }}
"""
SQUEUE = """#!/bin/bash
[[ " $* " != *" --format=%e "* ]] || date --date="{seconds_left} seconds" +%FT%T
"""
JOB = """
set -euo pipefail
say() {{ echo "$*"; }}
source {root}/slurm/requeue.sh
requeue
"""


def requeue(folder: Path, *, state: str, failures: int, reason: str, seconds_left: int = 3600) -> tuple[int, str, int]:
    """Exit code, log, and how often Slurm was asked."""
    for name, text in (("scontrol", SCONTROL), ("squeue", SQUEUE)):
        facts = {"folder": folder, "state": state, "failures": failures, "reason": reason, "seconds_left": seconds_left}
        (folder / name).write_text(text.format(**facts))
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "REQUEUE_EVERY": "0.05"}
    command = ["bash", "-c", JOB.format(root=ROOT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr, (folder / "calls").read_text().count("requeue")


def test_it_is_asked_again_until_slurmctld_is_back(tmp_path: Path) -> None:
    code, log, asked = requeue(tmp_path, state="DOWN", failures=4, reason="Unable to contact slurm controller")
    assert (code, asked) == (75, 5)
    assert "slurmctld does not queue it again (slurm_requeue error: Unable to contact slurm controller)" in log
    assert "queued again; Slurm lets it wait" in log


def test_it_gives_up_when_the_time_is_up_and_says_so(tmp_path: Path) -> None:
    begun = time.monotonic()
    code, log, asked = requeue(tmp_path, state="DOWN", failures=999, reason="Unable to contact", seconds_left=7)
    assert code == 75 and asked > 1
    assert "cannot be queued again: slurmctld does not answer and the time is up" in log
    assert "submit the same command once more and it continues" in log
    assert time.monotonic() - begun < 30


def test_a_refusal_of_a_slurmctld_that_answers_is_said_at_once(tmp_path: Path) -> None:
    code, log, asked = requeue(tmp_path, state="UP", failures=999, reason="Requested operation is disabled")
    assert (code, asked) == (75, 2)
    assert "cannot be queued again (slurm_requeue error: Requested operation is disabled)" in log
