"""How a launch ends: signals that ask it to stop, a launcher that dies, the success marker."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from bert_ds.basics.processes import (
    command_of,
    kill_what_is_forked_with_this_process,
    parent_of,
    process_identity,
    signal_at_parents_death,
    stop_signals_heard,
)
from bert_ds.basics.ranks import EXIT_RUN_AGAIN, CheckpointError
from bert_ds.basics.whole_files import write_json

_REAPERS = ("init", "systemd", "tini", "dumb-init", "docker-init")
"""Programs that become the parent of a process whose own has died, besides process 1."""


class StopRequest:
    """Whether this rank has been asked to stop; the loop saves, stops and exits with 75 at the next step."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why this rank is asked to stop, None where it is not."""
        self.is_training = False
        """Whether there is something to save: the end then waits for it, however long it takes."""
        self._speaks = False

    def request(self, reason: str) -> None:
        """Ask for the stop; the first reason is kept."""
        self.reason = self.reason or reason

    def install(self, *, speaks: bool = True) -> None:
        """Let every stop signal ask for the stop, as often as it comes; main thread only.

        SIGHUP stays ignored where it is (`nohup`). SIGQUIT is left alone: it ends the process without a save.

        Args:
            speaks: whether this rank tells on stderr what a signal has led to.
        """
        self._speaks = speaks
        for number in stop_signals_heard():
            signal.signal(number, self._on_signal)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Mark the block in which there is something to save."""
        self.is_training = True
        try:
            yield
        finally:
            self.is_training = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name, again = signal.Signals(number).name, self.reason is not None
        self.request(name)
        if self._speaks and (not again or number == signal.SIGINT):
            under_way = " again: the save is under way" if again else ": saving at the end of this step"
            text = f"{name}{under_way}; SIGQUIT (Ctrl-\\, kill -QUIT {os.getpid()}) ends without it\n"
            with contextlib.suppress(OSError):  # the terminal may be what has gone
                os.write(2, text.encode())


def follow_launcher(stop: StopRequest, *, grace_s: float = 30.0, poll_s: float = 1.0) -> None:
    """Make sure that this process does not outlive its launcher, nor what it forks itself.

    DeepSpeed's launcher loses signals: ended by SIGKILL, SIGHUP or SIGUSR1 it leaves its workers training. The kernel
    sends SIGTERM when the parent dies; a thread watches the parent and, where that is DeepSpeed's per-node launcher,
    the runner above it. When one is gone, or was before this process could look, the loop is asked to stop. While it
    trains, it has the time that it needs to save (the hang watchdog ends what never comes); else the process ends
    grace_s later. A process that no launcher started follows nobody: its shell may well be closed.

    Forked children get SIGKILL when this process dies. A data loader's worker would otherwise wait for ever to write
    into a full pipe that nobody reads.
    """
    kill_what_is_forked_with_this_process()
    if not {"RANK", "SLURM_PROCID"} & os.environ.keys():
        return
    signal_at_parents_death(signal.SIGTERM)
    watched = _launchers()
    facts = [(name, pid, process_identity(pid)) for name, pid in watched.items()]

    def watch() -> None:
        while not (gone := [name for name, pid, known in facts if known is None or process_identity(pid) != known]):
            time.sleep(poll_s)
        stop.request(f"{gone[0]} has died")
        since = time.monotonic()
        while stop.is_training or time.monotonic() - since < grace_s:
            time.sleep(min(poll_s, grace_s))
        faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_RUN_AGAIN)

    threading.Thread(target=watch, name="follow-launcher", daemon=True).start()


def _launchers() -> dict[str, int]:
    """Return the processes that started this one by their name; 0 for one that is gone already."""
    above = [os.getppid()]
    while above[-1] > 1:
        above.append(parent_of(above[-1]))
    launcher = next((pid for pid in above if "deepspeed.launcher.launch" in command_of(pid)), None)
    if launcher is None:
        # Only DeepSpeed's launcher sets this one. It may have been killed while this process was being imported.
        return {"the launcher": 0 if "CROSS_SIZE" in os.environ else above[0]}
    found, parent = {"the launcher": launcher}, parent_of(launcher)
    if "deepspeed" in command_of(parent):
        return {**found, "the deepspeed runner": parent}
    is_orphan = parent == 1 or os.path.basename(command_of(parent).partition(" ")[0]) in _REAPERS
    return {**found, "the deepspeed runner": 0} if is_orphan and os.environ.get("CROSS_SIZE") == "1" else found


def mark_done(run_dir: Path, facts: dict[str, Any]) -> None:
    """Write DONE: the run has ended well. Launchers trust this file rather than an exit code. Rank 0 only.

    Raises:
        CheckpointError: the file cannot be written; all else of the run stands.
    """
    try:
        write_json(run_dir / "DONE", facts)
    except OSError as error:
        raise CheckpointError(
            f"the run has ended well and its last checkpoint is saved, but {run_dir / 'DONE'} could not be written: "
            f"{error.strerror or error}; once that is mended, --resume auto marks it"
        ) from None


def is_done(run_dir: Path, *, since: Path | None = None) -> bool:
    """Whether the run in this folder has ended well; with `since`, no earlier than that file was written."""
    marker = run_dir / "DONE"
    if since is None or not marker.exists():
        return marker.exists()
    return marker.stat().st_mtime_ns >= since.stat().st_mtime_ns
