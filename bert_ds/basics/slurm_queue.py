"""What Slurm's queue says of jobs, where there is a Slurm."""

from __future__ import annotations

import shutil
import subprocess
from typing import NamedTuple


class QueuedJob(NamedTuple):
    """A job that is in the queue."""

    state: str
    """RUNNING, PENDING, COMPLETING, ..."""
    reason: str
    """Why it waits."""
    start: str
    """When it started or is expected to; N/A where Slurm does not know."""


def read_queue(*, timeout_s: float = 10.0) -> dict[str, QueuedJob] | None:
    """Return job number -> job of every job in the queue; None where there is no Slurm or it does not answer."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", "--array", "--format=%A|%T|%r|%S"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_queue(done.stdout) if done.returncode == 0 else None


def parse_queue(text: str) -> dict[str, QueuedJob]:
    """Return job number -> job from lines of number|state|reason|start."""
    parts = (line.strip().split("|") for line in text.splitlines())
    return {words[0]: QueuedJob(*words[1:]) for words in parts if len(words) == 4}
