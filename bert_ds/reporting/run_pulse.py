"""Whether a launch is in a run folder: by its lock, and where machines do not share locks by the lock's time stamp."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from pathlib import Path

LOCK = "run.lock"
RENEWED_EVERY_S = 3.0
"""The owner of a lock renews its time stamp so often."""
SILENT_S = 10.0
"""A lock of another machine that has not been renewed for so long looks like nobody's."""


def is_alive(run_dir: Path, *, now: float) -> bool | None:
    """Return whether a launch is in the folder; None where there is no lock that could tell.

    Args:
        run_dir: the run folder.
        now: seconds since 1970, by a clock that agrees with that of the file system within some seconds.
    """
    try:
        descriptor = os.open(run_dir / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _is_held(descriptor, now=now)
    finally:
        os.close(descriptor)  # which gives back what _is_held has taken


def _is_held(descriptor: int, *, now: float) -> bool:
    is_recent = now - os.fstat(descriptor).st_mtime <= SILENT_S
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return is_recent  # a file system without locks
    try:
        owner = json.loads(os.pread(descriptor, 10_000, 0))
        is_other_machine = owner["host"] != platform.node()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return is_other_machine and is_recent
