"""A folder of the tests' own for what torch compiles.

A compiler that was killed leaves a lock in torch's folder, and whoever needs the operator next waits for it for ever.
Here a lock goes when nobody who could hold it is left.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

_held: list[int] = []
"""Descriptors that say until this process ends that the folder is in use."""


def use_own_extensions() -> Path:
    """Let this process and those it starts compile into the folder of the tests, unless another one was chosen."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(chosen or Path(tempfile.gettempdir()) / f"bert-ds-tests-{os.getuid()}/torch_extensions")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    if chosen is None:
        folder.mkdir(parents=True, exist_ok=True)
        drop_stale_locks(folder)
    return folder


def drop_stale_locks(folder: Path) -> None:
    """Delete the locks in the folder if no other process uses it, and say that this one does."""
    descriptor = os.open(folder / "in_use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass
    else:
        for lock in folder.rglob("lock"):
            lock.unlink(missing_ok=True)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    _held.append(descriptor)
