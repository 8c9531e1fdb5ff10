"""Processes of this machine, as Linux tells of them in /proc, and the signals that ask a run to stop."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Each of them asks for a checkpoint and the end, whichever process of a launch it reaches."""
_PR_SET_PDEATHSIG = 1


def stop_signals_heard() -> tuple[signal.Signals, ...]:
    """Return the stop signals that this process is to act upon: not SIGHUP where `nohup` has it ignored."""
    deaf = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if not (deaf and number == signal.SIGHUP))


@contextlib.contextmanager
def held_back_stop_signals() -> Iterator[None]:
    """Block the stop signals inside; what is forked there never receives them, this thread does afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def signal_at_parents_death(number: signal.Signals, *, parent: int | None = None) -> None:
    """Let the kernel send this process a signal when its parent dies; Linux only.

    Args:
        number: the signal.
        parent: where it is given and no longer the parent, the signal is sent now.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if parent not in (None, os.getppid()):
        os.kill(os.getpid(), number)


def kill_what_is_forked_with_this_process() -> None:
    """Let every process that this one forks from now on, and what those fork, get SIGKILL when its parent dies."""
    forking = [os.getpid()]
    os.register_at_fork(
        before=lambda: forking.__setitem__(0, os.getpid()),
        after_in_child=lambda: signal_at_parents_death(signal.SIGKILL, parent=forking[0]),
    )


def process_identity(pid: int) -> str | None:
    """Return what tells a process from a later one with the same number; None when it is gone or a zombie."""
    fields = _stat(pid)
    return None if not fields or fields[0] in "ZX" else fields[19]


def parent_of(pid: int) -> int:
    """Return the number of the parent process, 0 where there is none."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def command_of(pid: int) -> str:
    """Return the command line of a process, its words joined by spaces; empty where it is gone."""
    return _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace")


def is_rank(pid: int) -> bool:
    """Whether a launcher started this process as a rank, or it was started by one."""
    return b"RANK=" in (entry[:5] for entry in _read(pid, "environ").split(b"\0"))


def in_session(session: int) -> list[int]:
    """Return the living processes of a session, whatever has become of the ones that started them."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    found = ((pid, _stat(pid)) for pid in pids)
    return [pid for pid, fields in found if fields and fields[0] not in "ZX" and int(fields[3]) == session]


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; the name before them may hold anything."""
    return _read(pid, "stat").decode(errors="replace").rpartition(")")[2].split()


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
