"""A launch whose ranks wait for each other for ever is found, explained and ended, so that it can be run again.

Each rank tells its `Heartbeat` what it begins; a thread looks how long ago that was. All ranks pass the same phases in
the same order, so after a hang the one that has begun the fewest is the one that the others wait for.

The thread takes no lock that training might hold, and its output goes through plain descriptors. A rank that cannot
even report (stopped, or stuck while it holds the interpreter) dumps its stacks from a signal handler in C.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import platform
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from bert_ds.basics.exit_record import record_exit
from bert_ds.basics.processes import process_identity
from bert_ds.basics.ranks import EXIT_RUN_AGAIN, Ranks
from bert_ds.basics.whole_files import write_text
from bert_ds.training.agreement import COLLECTIVE_TIMEOUT, broadcast_json, gather_json

PATIENCE = 3
"""So many times the limit is waited in the first step (kernels compile), in an evaluation and in a save."""
_DUMP_SIGNAL = signal.SIGUSR2
_END_SIGNAL = signal.SIGRTMIN + 1
"""Lets a rank dump its stacks and end by this signal's default action, without a step in between."""
_HEAD_START = timedelta(minutes=10)
_GRACE_S = 3.0
"""How long a rank that has found the hang waits for the reports of the others, then for the end of silent ones."""


def collective_timeout(limit_s: float) -> timedelta:
    """Return how long a collective may wait, so that the watchdog of `limit_s` speaks first: NCCL leaves no stacks."""
    return max(COLLECTIVE_TIMEOUT, timedelta(seconds=PATIENCE * limit_s) + _HEAD_START)


class Heartbeat:
    """What this rank is doing; `enter` costs nothing and never blocks."""

    def __init__(self) -> None:
        self.phase, self.step, self.count, self.patient = "start", -1, 0, True
        self._first_step: int | None = None

    def enter(self, phase: str, *, step: int, patient: bool = False) -> None:
        """Note that a phase of a step begins. Every rank enters the same phases in the same order.

        Args:
            phase: as it is to be read in the report of a hang.
            step: optimizer step; in the first one that is entered, every phase is patient.
            patient: the phase may well take minutes.
        """
        if self._first_step is None:
            self._first_step = step
        self.patient = patient or step == self._first_step
        self.phase, self.step = phase, step
        self.count += 1

    def beat(self, *unused: Any) -> None:
        """Note that the phase goes on; a hook of a module's forward."""
        self.count += 1


@contextlib.contextmanager
def watched_for_hangs(
    heartbeat: Heartbeat, run_dir: Path, *, ranks: Ranks, limit_s: float, module: nn.Module
) -> Iterator[None]:
    """End the process with exit code 75 if its heart stops for limit_s inside the block; entering is a collective.

    Before that, the stacks of all threads of every rank are in `logs/rank_K.log`, and which rank stalled in which phase
    is on stderr. SIGUSR2 makes a rank dump its stacks at any time.

    Args:
        heartbeat: fed by the training loop.
        run_dir: the run folder.
        ranks: place of this process in the job.
        limit_s: 0 switches the watchdog off; PATIENCE times as long is waited in a patient phase.
        module: the model; each of its forward passes is progress, however many micro-steps a step has.
    """
    if not limit_s:
        yield
        return
    watchdog = _Watchdog(heartbeat, run_dir, ranks=ranks, limit_s=limit_s)
    faulthandler.register(_DUMP_SIGNAL, file=watchdog.log, all_threads=True)
    faulthandler.register(_END_SIGNAL, file=watchdog.log, all_threads=True, chain=True)
    thread = threading.Thread(target=watchdog.watch, name="hang-watchdog", daemon=True)
    hook = module.register_forward_pre_hook(heartbeat.beat)
    thread.start()
    try:
        yield
    finally:
        watchdog.stopped.set()
        thread.join()  # for ever, if it is about to end this process
        hook.remove()
        faulthandler.unregister(_DUMP_SIGNAL)
        faulthandler.unregister(_END_SIGNAL)
        os.close(watchdog.log)


class _Process(NamedTuple):
    host: str
    pid: int
    identity: str | None


class _Watchdog:
    """The thread of one rank."""

    def __init__(self, heartbeat: Heartbeat, run_dir: Path, *, ranks: Ranks, limit_s: float) -> None:
        self._heartbeat, self._ranks, self._limit_s = heartbeat, ranks, limit_s
        self._poll_s = min(1.0, limit_s / 10)
        self._reports = run_dir / "logs" / f"hang-{broadcast_json(secrets.token_hex(4))}"
        me = _Process(platform.node(), os.getpid(), process_identity(os.getpid()))
        self._processes = [_Process(*one) for one in gather_json(me)]
        self.log = os.open(run_dir / "logs" / f"rank_{ranks.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.stopped = threading.Event()

    def watch(self) -> None:
        """Count how long the heart has been silent. Time in which this process itself was stopped does not count."""
        count, silent_s, looked = -1, 0.0, time.monotonic()
        while not self.stopped.wait(self._poll_s):
            now = time.monotonic()
            silent_s = silent_s + min(now - looked, 2 * self._poll_s) if count == self._heartbeat.count else 0.0
            count, looked = self._heartbeat.count, now
            limit_s = PATIENCE * self._limit_s if self._heartbeat.patient else self._limit_s
            # Ranks do not stall at the same instant: where one has reported, a silence half as long is enough.
            if silent_s >= limit_s or (silent_s >= limit_s / 2 and self._reports.exists()):
                self._end(silent_s)

    def _end(self, silent_s: float) -> None:
        _exit_after(2 * _GRACE_S + 5.0)  # whatever happens below: the disk may be what hangs
        beat = self._heartbeat
        report = {"count": beat.count, "phase": beat.phase, "step": beat.step, "silent_s": round(silent_s, 1)}
        self._say(f"no progress for {silent_s:.0f} s in {beat.phase} of step {beat.step}; the stacks of all threads:")
        faulthandler.dump_traceback(file=self.log, all_threads=True)
        self._reports.mkdir(exist_ok=True)
        write_text(self._reports / f"rank_{self._ranks.rank}.json", json.dumps(report), synced=False)
        _wait(lambda: len(self._read_reports()) == self._ranks.world_size, seconds=_GRACE_S)
        reports = self._read_reports()
        if self._ranks.rank == min(reports):
            message = f"hang: {explain_hang(reports, world_size=self._ranks.world_size)}"
            self._say(message)
            os.write(2, f"{message}\n".encode())
            record_exit(EXIT_RUN_AGAIN, message)
            self._end_neighbours(set(range(self._ranks.world_size)) - set(reports))
        os._exit(EXIT_RUN_AGAIN)

    def _read_reports(self) -> dict[int, dict[str, Any]]:
        files = sorted(self._reports.glob("rank_*.json"))
        return {int(file.stem.removeprefix("rank_")): json.loads(file.read_text()) for file in files}

    def _end_neighbours(self, ranks: set[int]) -> None:
        """Let silent ranks on this machine dump their stacks, even stopped ones, and end them."""
        here = [self._processes[rank] for rank in ranks if self._processes[rank].host == platform.node()]
        for number in (_END_SIGNAL, signal.SIGCONT, signal.SIGKILL):
            for process in filter(_is_alive, here):
                signal_main_thread(process.pid, number)
            if number == signal.SIGCONT:
                _wait(lambda: not any(map(_is_alive, here)), seconds=_GRACE_S)

    def _say(self, message: str) -> None:
        os.write(self.log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} ERROR {message}\n".encode())


def explain_hang(reports: dict[int, dict[str, Any]], *, world_size: int) -> str:
    """Return one sentence that names the rank that the others wait for.

    Args:
        reports: rank -> count of phases begun, phase, step and seconds of silence, of the ranks that could report.
        world_size: number of ranks.
    """
    last = max(reports.values(), key=lambda report: report["count"])
    where = f"{last['phase']} of step {last['step']}"
    if missing := sorted(set(range(world_size)) - set(reports)):
        names = ", ".join(map(str, missing))
        return f"rank {names} does not answer (stopped, or its machine is gone); the others wait in {where}"
    first = min(reports.values(), key=lambda report: report["count"])
    behind = [rank for rank, report in reports.items() if report["count"] == first["count"]]
    what = f"made no progress for {first['silent_s']:.0f} s in {first['phase']} of step {first['step']}"
    if len(behind) == world_size:
        return f"{'rank 0' if world_size == 1 else 'all ranks'} {what}: see the stacks in logs/"
    return f"rank {', '.join(map(str, behind))} {what}; the others wait in {where}"


def _exit_after(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, (EXIT_RUN_AGAIN,))
    timer.daemon = True
    timer.start()


def _is_alive(process: _Process) -> bool:
    return process_identity(process.pid) == process.identity


def signal_main_thread(pid: int, number: int) -> None:
    """Signal the main thread of a process, which takes the signal before it does anything else.

    A signal to a stopped process is taken by whichever thread wakes first; the dump then shows a main thread that has
    run on from where it hung.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "tgkill"):  # glibc 2.30
        libc.tgkill(pid, pid, number)
    else:
        os.kill(pid, number)


def _wait(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
