"""Training that is killed inside its saves, again and again; test_checkpoints.py calls `killed_saves` in a fork.

Each child resumes, trains one step, saves, and kills itself with SIGKILL at its k-th file operation under
`checkpoints/` (audit events: open, rename, mkdir, remove ...), or is killed from outside after a random time. After
each kill the folder must offer a whole checkpoint, none of them older than before.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from tiny_training import ds_config, join_alone, run_tiny

from bert_ds.basics.ranks import Ranks
from bert_ds.reporting.run_log import read_metrics
from bert_ds.training.checkpoints.checkpoint_folder import find_checkpoint, step_of
from bert_ds.training.launch.process_group import leave_out_shared_memory_operator

TOTAL_STEPS = 100_000


def killed_saves(folder: Path, stride: int, num_kills: int, asynchronous: bool) -> dict[str, Any]:
    """Kill, then let the run continue to its next step and compare its losses with an uninterrupted run's."""
    leave_out_shared_memory_operator()
    killed, whole = (Victim(folder / name, asynchronous) for name in ("killed", "whole"))
    result = {"operations": kill_at_every_operation(killed, stride), "times": kill_at_random_times(killed, num_kills)}
    last = newest_step(killed.run_dir) + 1
    for victim in (killed, whole):
        assert os.waitpid(victim.fork(last), 0)[1] == 0
    losses = [[row["loss"] for row in read_metrics(one.run_dir / "metrics.jsonl")] for one in (killed, whole)]
    return result | {"last_step": last, "num_losses": len(losses[1]), "same": losses[0] == losses[1]}


class Victim(NamedTuple):
    """A run that is forked to be killed."""

    run_dir: Path
    asynchronous: bool

    def fork(self, steps: int, *, kill_at: int | None = None) -> int:
        """Return the process that resumes the run and trains it to `steps`."""
        pid = os.fork()
        if pid == 0:
            try:
                train_in_child(self, steps, kill_at=kill_at)
            finally:
                os._exit(1)
        return pid


def train_in_child(victim: Victim, steps: int, *, kill_at: int | None) -> None:
    """Resume, train to `steps` saving every step, and leave the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    join_alone()
    if kill_at is not None:
        kill_at_operation(victim.run_dir / "checkpoints", kill_at)
    how = {"steps": steps, "total_steps": TOTAL_STEPS, "save_every": 1, "asynchronous": victim.asynchronous}
    run_tiny(victim.run_dir, Ranks(0, 0, 1), config=ds_config(2), **how)
    os._exit(0)


def kill_at_operation(folder: Path, number: int) -> None:
    """Kill this process before its number-th file operation in a folder, reads of the resume left out."""
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        path = str(args[0]) if args and isinstance(args[0], str | os.PathLike) else ""
        reading = event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_DIRECTORY)
        if not path.startswith(str(folder)) or event.startswith(("os.listdir", "os.scandir")) or reading:
            return
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    sys.addaudithook(hook)


def newest_step(run_dir: Path) -> int:
    path = find_checkpoint(run_dir)
    return 0 if path is None else step_of(path.name)


def kill_at_every_operation(victim: Victim, stride: int) -> dict[str, int]:
    """Kill before operation 0, stride, 2 stride ... of a save until one runs through."""
    kills = number = 0
    while True:
        before = newest_step(victim.run_dir)
        _, status = os.waitpid(victim.fork(before + 1, kill_at=number), 0)
        assert newest_step(victim.run_dir) >= before
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            return {"kills": kills, "operations": number}
        kills += 1
        number += stride


def kill_at_random_times(victim: Victim, num_kills: int) -> dict[str, int]:
    """Kill from outside while the child trains and saves step after step."""
    clock = random.Random(5)
    for _ in range(num_kills):
        before = newest_step(victim.run_dir)
        pid = victim.fork(TOTAL_STEPS)
        deadline = time.monotonic() + 60
        while newest_step_name(victim.run_dir) <= before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(clock.uniform(0.0, 0.15))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert newest_step(victim.run_dir) > before
    return {"kills": num_kills, "last_step": newest_step(victim.run_dir)}


def newest_step_name(run_dir: Path) -> int:
    names = [path.name for path in (run_dir / "checkpoints").glob("global_step*")]
    return max(map(step_of, names), default=0)
