"""Run a test's worker function on several gloo ranks of this machine.

The worker is a top-level function of a test module, called as `worker(rank, world_size, *args)` after the process group
is up; what it returns is pickled back to the test. A rank that raises fails the test with that rank's traceback.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fork_server import launch, plain_environment, rank_facts


def enter(rank: int, world_size: int, module: str, worker: str, args: tuple) -> Any:
    """Be a rank: join the others and call the worker."""
    import torch

    from bert_ds.basics.ranks import Ranks
    from bert_ds.training.launch.process_group import joined_ranks

    torch.set_num_threads(1)
    with joined_ranks(Ranks(rank, rank, world_size)):
        return getattr(importlib.import_module(module), worker)(rank, world_size, *args)


def run_ranks(worker: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Run `worker(rank, world_size, *args)` on world_size processes and return the results in rank order.

    Raises:
        AssertionError: a rank raised or died.
        subprocess.TimeoutExpired: a rank did not answer within timeout_s.
    """
    module = worker.__module__
    if module == "__main__":
        module = Path(str(sys.modules["__main__"].__file__)).stem
    with tempfile.TemporaryDirectory() as name:
        folder, orders = Path(name), []
        for rank, facts in enumerate(rank_facts(world_size)):
            call = (rank, world_size, module, worker.__name__, args)
            order = (folder / f"call{rank}", folder / f"answer{rank}", folder / f"says{rank}")
            order[0].write_bytes(pickle.dumps(("ranks_harness", "enter", call, str(order[1]))))
            files = {"call": str(order[0]), "out": str(order[2]), "err": str(order[2])}
            orders.append({"env": plain_environment() | facts, "cwd": os.getcwd(), **files})
        codes = launch(orders, timeout_s=timeout_s)
        for rank, code in enumerate(codes):
            said = (folder / f"says{rank}").read_text("utf-8", "replace")
            assert code == 0, f"rank {rank} of {world_size} ended with {code}:\n{said}"
        return [pickle.loads((folder / f"answer{rank}").read_bytes()) for rank in range(world_size)]
