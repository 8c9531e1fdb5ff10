"""How a launch ends: signals that ask it to stop, a launcher that dies, the success marker."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from bert_ds.ranks import EXIT_RUN_AGAIN
from bert_ds.reporting.run_log import write_json

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Whether this rank has been asked to stop; the loop saves, stops and exits with 75 at the next step."""

    def __init__(self) -> None:
        self.reason: str | None = None

    @property
    def requested(self) -> bool:
        """Whether there is a reason to stop."""
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Ask for the stop; the first reason is kept."""
        self.reason = self.reason or reason

    def install(self) -> None:
        """Let SIGTERM, SIGUSR1 and SIGINT ask for the stop; a second SIGINT interrupts at once. Main thread only."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.request(signal.Signals(number).name)


def follow_launcher(stop: StopRequest, *, grace_s: float = 60.0, poll_s: float = 1.0) -> None:
    """Make sure that this process does not outlive its launcher, nor what it forks itself.

    DeepSpeed's launcher loses signals: killed by SIGKILL, SIGTERM or SIGUSR1 it leaves its workers training. The kernel
    sends SIGTERM when the parent dies; a thread watches the parent and, where the parent is DeepSpeed's per-node
    launcher, the runner above it. When one is gone the loop is asked to stop, and grace_s later the process ends.
    A process that no launcher started follows nobody: its shell may well be closed.

    Forked children get SIGKILL when this process dies. A data loader's worker would otherwise wait for ever to write
    into a full pipe that nobody reads. They keep the signal handlers: a signal sent to the whole job must not take the
    data away from a rank that is about to save.
    """
    os.register_at_fork(after_in_child=lambda: _signal_at_parents_death(signal.SIGKILL))
    if not {"RANK", "SLURM_PROCID"} & os.environ.keys():
        return
    watched = {os.getppid(): "the launcher"}
    _signal_at_parents_death(signal.SIGTERM)
    watched.update(_runner_above(os.getppid()))
    facts = {pid: (name, process_identity(pid)) for pid, name in watched.items()}

    def watch() -> None:
        while all(process_identity(pid) == identity for pid, (_, identity) in facts.items()):
            time.sleep(poll_s)
        gone = [name for pid, (name, identity) in facts.items() if process_identity(pid) != identity]
        stop.request(f"{gone[0]} has died")
        time.sleep(grace_s)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_RUN_AGAIN)

    threading.Thread(target=watch, name="follow-launcher", daemon=True).start()


def _signal_at_parents_death(number: signal.Signals) -> None:
    """Let the kernel send this process a signal when its parent dies; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def process_identity(pid: int) -> str | None:
    """Return what tells a process from a later one with the same number; None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _runner_above(pid: int) -> dict[int, str]:
    """Return the `deepspeed` runner above DeepSpeed's per-node launcher, if that is what started this process."""
    try:
        if "deepspeed.launcher.launch" not in _command(pid):
            return {}
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return {parent: "the deepspeed runner"} if "deepspeed" in _command(parent) else {}
    except OSError:
        return {}


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def mark_done(run_dir: Path, facts: dict[str, Any]) -> None:
    """Write DONE: the run has ended well. Launchers trust this file rather than an exit code. Rank 0 only."""
    write_json(run_dir / "DONE", facts)


def is_done(run_dir: Path, *, since: Path | None = None) -> bool:
    """Whether the run in this folder has ended well; with `since`, no earlier than that file was written."""
    marker = run_dir / "DONE"
    if since is None or not marker.exists():
        return marker.exists()
    return marker.stat().st_mtime_ns >= since.stat().st_mtime_ns
