"""Run a test's worker function on several gloo ranks of this machine.

The worker is a top-level function of a test module, called as `worker(rank, world_size, *args)` after the process group
is up; what it returns is pickled back to the test. A rank that raises fails the test with that rank's traceback.
"""

from __future__ import annotations

import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.queues import Queue
from typing import Any

import torch
import torch.multiprocessing as mp


def free_port() -> int:
    """Return a TCP port that is free on the loopback interface."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _enter(rank: int, worker: Callable[..., Any], world_size: int, port: int, args: tuple, results: Queue) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    try:
        from bert_ds.ranks import Ranks
        from bert_ds.training.process_group import joined_ranks

        with joined_ranks(Ranks(rank, rank, world_size)):
            results.put((rank, worker(rank, world_size, *args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def run_ranks(worker: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Run `worker(rank, world_size, *args)` on world_size processes and return the results in rank order.

    Raises:
        AssertionError: a rank raised, died, or did not answer within timeout_s.
    """
    context = mp.get_context("spawn")
    results: Queue = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_enter, args=(rank, worker, world_size, port, args, results))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    answers: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(answers) < world_size:
            try:
                rank, value, error = results.get(timeout=1.0)
            except queue.Empty:
                dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
                assert not dead, f"a rank died with exit code {dead[0]}"
                assert time.monotonic() < deadline, f"no answer from all {world_size} ranks in {timeout_s} s"
                continue
            assert error is None, f"rank {rank} of {world_size} raised:\n{error}"
            answers[rank] = value
    finally:
        for process in processes:
            process.join(timeout=20 if len(answers) == world_size else 0)
            if process.is_alive():
                process.kill()
                process.join()
    return [answers[rank] for rank in range(world_size)]
