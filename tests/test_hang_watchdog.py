"""A launch that hangs, tried on two real ranks: stopped by a signal, asleep in its data, stuck in a read."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fork_server import launch, plain_environment, rank_facts
from test_restart import wait_until
from tiny_training import ds_config, join_alone, micro_batch, step_batches, tiny_engine, tiny_loop, tiny_services

from bert_ds.basics.exit_record import read_exits
from bert_ds.basics.ranks import Ranks
from bert_ds.training.checkpoints.train_state import TrainState
from bert_ds.training.launch.hang_watchdog import Heartbeat, explain_hang, signal_main_thread, watched_for_hangs
from bert_ds.training.launch.process_group import joined_ranks
from bert_ds.training.loop.train_loop import train

LIMIT_S = 2.0
ENDED = -(signal.SIGRTMIN + 1)
ROOT = Path(__file__).resolve().parents[1]


def hang(kind: str, run_dir: Path) -> None:
    """Do as a sick rank does."""
    if kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "asleep":
        time.sleep(600)
    if kind == "reading":
        (run_dir / "shard").open("rb").read()  # a FIFO without a writer


def sick_save(state: TrainState) -> bool:
    """A save in which rank 1 is stopped while the other waits for it."""
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()
    return True


def sick_batches(kind: str, run_dir: Path, rank: int) -> Iterator[Any]:
    """Batches whose 4th step hangs on rank 1."""
    for step, micro_batches in enumerate(step_batches(0, rank, 1), start=1):
        if step == 4 and rank == 1:
            hang(kind, run_dir)
        yield micro_batches


def train_until_it_hangs(kind: str, run_dir: Path) -> None:
    """One of the two processes of a launch: it must not return."""
    torch.set_num_threads(1)
    rank, heartbeat = int(os.environ["RANK"]), Heartbeat()
    ranks = Ranks(rank, rank, 2)
    with joined_ranks(ranks):
        engine = tiny_engine(ds_config(2, world_size=2))
        saving = kind == "stopped in a save"
        services = tiny_services(run_dir, rank, 2, heartbeat=heartbeat, save=sick_save if saving else None)
        with watched_for_hangs(heartbeat, run_dir, ranks=ranks, limit_s=LIMIT_S, module=engine.module):
            batches = sick_batches(kind, run_dir, rank)
            loop = tiny_loop(9, checkpoint_every_steps=2 if saving else None)
            train(engine, batches, state=TrainState(), loop=loop, services=services)


def launch_two(kind: str, run_dir: Path) -> tuple[tuple[int, ...], str]:
    """Let two ranks train until they hang; return their exit codes and what they said on stderr."""
    orders, folder = [], run_dir / "launch"
    folder.mkdir()
    for rank, facts in enumerate(rank_facts(2)):
        call, said = folder / f"call{rank}", str(folder / f"said{rank}")
        call.write_bytes(
            pickle.dumps(("test_hang_watchdog", "train_until_it_hangs", (kind, run_dir), f"{call}.answer"))
        )
        environment = plain_environment() | facts | {"BERT_DS_EXITS": str(run_dir)}
        orders.append({"env": environment, "cwd": str(ROOT), "call": str(call), "out": said, "err": said})
    codes = launch(orders, timeout_s=120)
    return tuple(codes), "".join(Path(order["err"]).read_text("utf-8", "replace") for order in orders)


@pytest.mark.parametrize(
    ("kind", "codes", "said"),
    [
        (
            "stopped in a save",
            (75, ENDED),
            "hang: rank 1 does not answer (stopped, or its machine is gone); the others wait in checkpoint of step 2",
        ),
        (
            "stopped",
            (75, ENDED),
            "hang: rank 1 does not answer (stopped, or its machine is gone); the others wait in agr",
        ),
        ("asleep", (75, 75), "s in data wait of step 4; the others wait in agreement of step 4"),
        ("reading", (75, 75), "s in data wait of step 4; the others wait in agreement of step 4"),
    ],
)
def test_a_hang_is_named_and_ended_with_the_stacks_of_both_ranks(
    kind: str, codes: tuple[int, int], said: str, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "shard")
    ended, errors = launch_two(kind, tmp_path)
    assert ended == codes
    assert said in errors
    assert [said in record.message for record in read_exits(tmp_path).values()] == [True]
    waiting = "in sick_save" if kind == "stopped in a save" else "agree_on_totals"
    for rank, function in ((0, waiting), (1, "in train_until_it_hangs")):
        log = (tmp_path / f"logs/rank_{rank}.log").read_text()
        assert function in log
        assert "in watch\n" in log  # all threads, not the main one alone
        assert "step 5/" not in log, "no rank goes on after the hang"


STOPS_AGAIN_AND_AGAIN = """
import ctypes, faulthandler, os, signal, sys, threading, time
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
faulthandler.register(signal.SIGUSR2, file=log, all_threads=True)
libc = ctypes.CDLL(None)
for _ in range(6):  # threads that Python does not know, as gloo's are
    libc.pthread_create(ctypes.byref(ctypes.c_ulong()), None, libc.pause, None)

def poll():
    while True:
        time.sleep(0.01)

for _ in range(3):
    threading.Thread(target=poll, daemon=True).start()

def hang():
    os.kill(os.getpid(), signal.SIGSTOP)

while True:
    hang()
    [str(number) for number in range(20_000)]
"""


def test_the_stacks_of_a_stopped_process_show_where_it_was_stopped(tmp_path: Path) -> None:
    log = tmp_path / "stacks"
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    process = subprocess.Popen([sys.executable, "-c", STOPS_AGAIN_AND_AGAIN, log])
    state = Path(f"/proc/{process.pid}/stat")
    try:
        for number in range(30):  # with os.kill one of these fails, most times
            assert wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T", 30)
            time.sleep(0.02)
            log.write_text("")
            signal_main_thread(process.pid, signal.SIGUSR2)
            os.kill(process.pid, signal.SIGCONT)
            assert wait_until(lambda: log.read_text().endswith("<module>\n"), 30), number
            assert " in hang\n" in log.read_text(), number
    finally:
        for one in (process, *busy):
            one.kill()
            one.wait()


def test_a_long_evaluation_and_the_first_step_are_not_a_hang() -> None:
    heart = Heartbeat()
    heart.enter("data wait", step=8)
    assert heart.patient
    heart.enter("data wait", step=9)
    assert not heart.patient
    heart.enter("evaluation", step=9, patient=True)
    assert heart.patient


def test_every_micro_step_is_progress_however_long_the_step(tmp_path: Path) -> None:
    join_alone()
    engine, heart = tiny_engine(ds_config(2)), Heartbeat()
    tiny_services(tmp_path, 0, 1)  # makes logs/
    with watched_for_hangs(heart, tmp_path, ranks=Ranks(0, 0, 1), limit_s=0.5, module=engine.module):
        for step in (1, 2):
            heart.enter("forward and backward", step=step)
        for _ in range(6):  # longer than the limit in all
            time.sleep(0.2)
            engine(**micro_batch(1, 0).model_inputs(), dropout_seed=None)


def test_the_rank_that_is_least_far_is_named() -> None:
    report = {"count": 20, "phase": "forward and backward", "step": 5, "silent_s": 61.0}
    behind = report | {"count": 17, "phase": "data wait", "step": 4}
    assert explain_hang({0: report, 1: report, 2: behind, 3: report}, world_size=4) == (
        "rank 2 made no progress for 61 s in data wait of step 4; the others wait in forward and backward of step 5"
    )
    assert explain_hang({0: report, 1: report}, world_size=2).startswith("all ranks made no progress for 61 s")
