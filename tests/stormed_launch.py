"""A launch of `pretrain` on a terminal of its own, with all its processes in reach."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fork_server import free_port, plain_environment

from bert_ds.basics.processes import STOP_SIGNALS, command_of, is_rank, parent_of, process_identity
from bert_ds.reporting.run_log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
MARK = "BERT_DS_STORM"
"""Environment variable by which all processes of a launch are known, whoever has become their parent."""
PATIENCE_S = 300.0


class Blow(NamedTuple):
    """A signal of a storm."""

    at_s: float
    target: str
    """A kind of process, "group" or "terminal"."""
    signal: str
    every: bool
    """To all processes of the kind, not to a random one."""


class Launch:
    """A launch on a terminal of its own."""

    def __init__(
        self, work: Path, run_dir: Path, *, way: str, ranks: int, nohup: bool = False, light: bool = True
    ) -> None:
        self.mark = f"{run_dir.name}-{os.urandom(4).hex()}"
        self.run_dir, self._is_read = run_dir, True
        launcher = ["--num_gpus", str(ranks), "--master_port", str(free_port())]
        if way == "bert-ds":
            command = [sys.executable, "-m", "bert_ds.console", "pretrain", *launcher, "--", *arguments(work, run_dir)]
        else:
            script = [str(ROOT / "bert_ds/pretrain.py"), *arguments(work, run_dir)]
            command = [sys.executable, "-m", "deepspeed.launcher.runner", *launcher, *script]
        path = os.environ.get("PYTHONPATH", "")
        environment = {**plain_environment(), MARK: self.mark, "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = f"{ROOT / 'tests/light_launcher'}:{path}" if light else path
        self.terminal, side = os.openpty()
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=side,
            stdout=side,
            stderr=side,
            start_new_session=True,
            preexec_fn=partial(_take_terminal, nohup),
        )
        os.close(side)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with (self.run_dir.parent / f"{self.run_dir.name}.txt").open("ab") as copy, contextlib.suppress(OSError):
            while self._is_read:
                if select.select([self.terminal], [], [], 0.1)[0]:
                    copy.write(os.read(self.terminal, 65536))
                    copy.flush()

    def hang_up(self) -> None:
        """Close the terminal; what is written to it from now on fails."""
        if self._is_read:
            self._is_read = False
            self._reader.join()
            os.close(self.terminal)

    def processes(self) -> dict[str, list[int]]:
        """Return the living processes by kind."""
        found: dict[str, list[int]] = {"bert-ds": [], "runner": [], "launcher": [], "ranks": [], "loaders": []}
        for pid in marked(self.mark):
            command = command_of(pid)
            if is_rank(pid):
                kind = "loaders" if is_rank(parent_of(pid)) else "ranks"
            elif "deepspeed.launcher" in command:
                kind = "runner" if "deepspeed.launcher.runner" in command else "launcher"
            else:
                kind = "bert-ds"
            found[kind].append(pid)
        return found

    def strike(self, blow: Blow, draw: random.Random) -> None:
        """Send the signal of a blow, if there is somebody to receive it."""
        number = signal.Signals[blow.signal]
        if blow.target == "terminal":
            return self.hang_up()
        with contextlib.suppress(ProcessLookupError):
            if blow.target == "group":
                return os.killpg(self.process.pid, number)
            pids = self.processes()[blow.target]
            for pid in pids if blow.every else draw.sample(pids, min(1, len(pids))):
                os.kill(pid, number)

    def await_step(self, step: int) -> bool:
        """Wait until a step has been taken; False where the launch ends before."""
        while steps_taken(self.run_dir) < step:
            if self.process.poll() is not None and not marked(self.mark):
                return False
            time.sleep(0.05)
        return True

    def await_end(self) -> int | None:
        """Wait for the end of all processes; return the exit code, None where they had to be killed."""
        deadline = time.monotonic() + PATIENCE_S
        while marked(self.mark) and time.monotonic() < deadline:
            self.process.poll()
            time.sleep(0.1)
        left = marked(self.mark)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        code = self.process.wait()
        self.hang_up()
        return None if left else code


def _take_terminal(nohup: bool) -> None:
    for number in (*STOP_SIGNALS, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    if nohup:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def marked(mark: str) -> list[int]:
    """Return the living processes whose environment has the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry.name)
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes() and process_identity(pid):
                found.append(pid)
    return found


def arguments(work: Path, run_dir: Path) -> list[str]:
    """Return what pretrain is told."""
    files = ("--run", work / "recipe.json", "--deepspeed_config", ROOT / "ds_configs/zero2.json")
    return [*map(str, files), "--run_dir", str(run_dir), "--resume", "auto"]


def steps_taken(run_dir: Path) -> int:
    """Return the newest step of the run folder."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0
