"""One launch at a time in a run folder.

`run.lock` is held by rank 0 with `flock`, which the kernel releases whatever ends the process. Where machines do not
see each other's `flock` (some cluster file systems), the owner's facts in the file decide: another machine's lock
counts while its time stamp is renewed, and a later start of the same Slurm job takes it over at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.reporting.run_pulse import LOCK, RENEWED_EVERY_S

DEAD_AFTER_S = 180.0
"""A lock of another machine that has not been renewed for so long is nobody's."""
PATIENCE_S = 15.0
"""What is left of a killed launch needs a moment to end before the next one can start."""

_held: dict[Path, int] = {}
"""Descriptors of the locks of this process; they stay open, and so held, until it ends."""


def lock_run_folder(run_dir: Path, *, patience_s: float = PATIENCE_S) -> None:
    """Be the only process in an existing run folder, until this process ends; rank 0 only.

    Raises:
        ConfigError: another launch is in the folder; the message names its host, process and start.
        OSError: the lock cannot be written.
    """
    path = run_dir.resolve() / LOCK
    if path in _held:
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        _wait(descriptor, path, deadline=time.monotonic() + patience_s)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_own_facts()).encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    _held[path] = descriptor
    threading.Thread(target=_renew, args=(descriptor,), name="renew-run-lock", daemon=True).start()


def _wait(descriptor: int, path: Path, *, deadline: float) -> None:
    """Return once this process holds the lock and no living owner is written in it."""
    while True:
        is_free = _take(descriptor)
        owner = _read(descriptor)
        if is_free and not _lives_elsewhere(owner, path):
            return
        if time.monotonic() >= deadline:
            raise ConfigError(
                f"--run_dir {path.parent} is in use by process {owner.get('pid')} on {owner.get('host')}, "
                f"started {owner.get('started')}: wanted one launch at a time, or another folder"
            )
        time.sleep(0.2)


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: the facts decide alone
    return True


def _lives_elsewhere(owner: dict[str, Any], path: Path) -> bool:
    """Whether the lock names another machine that has renewed it of late, by the clock of the file system."""
    own = _own_facts()
    if not owner or owner.get("host") == own["host"] or (own["job"] and owner.get("job") == own["job"]):
        return False
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tmp-clock-") as clock:
        age = os.stat(clock.name).st_mtime - path.stat().st_mtime
    return age < DEAD_AFTER_S


def _renew(descriptor: int) -> None:
    while True:
        time.sleep(RENEWED_EVERY_S)
        try:
            os.utime(descriptor)
        except OSError:
            continue  # a full or absent disk is the saver's to report


def _own_facts() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _read(descriptor: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(descriptor, 10_000, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}
