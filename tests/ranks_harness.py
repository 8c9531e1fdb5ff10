"""Run a test's function in processes forked from one that has imported everything: on several gloo ranks, or alone.

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
    calls = [
        ("ranks_harness", "enter", (rank, world_size, module, worker.__name__, args)) for rank in range(world_size)
    ]
    return _answers(calls, rank_facts(world_size), timeout_s)


def run_forked(function: Callable[..., Any], *args: Any, timeout_s: float = 240.0) -> Any:
    """Return `function(*args)`, of a process that may fork: it has imported everything and has no threads.

    Raises:
        AssertionError: it raised or died.
        subprocess.TimeoutExpired: it did not answer within timeout_s.
    """
    return _answers([(function.__module__, function.__name__, args)], [{}], timeout_s)[0]


def _answers(calls: list[tuple[str, str, tuple]], facts: list[dict[str, str]], timeout_s: float) -> list[Any]:
    """Return what each call (module, function, arguments) returns in a process of its own, all at once."""
    with tempfile.TemporaryDirectory() as name:
        folder, orders = Path(name), []
        for place, (call, own) in enumerate(zip(calls, facts, strict=True)):
            order = (folder / f"call{place}", folder / f"answer{place}", folder / f"says{place}")
            order[0].write_bytes(pickle.dumps((*call, str(order[1]))))
            files = {"call": str(order[0]), "out": str(order[2]), "err": str(order[2])}
            orders.append({"env": plain_environment() | own, "cwd": os.getcwd(), **files})
        codes = launch(orders, timeout_s=timeout_s)
        for place, code in enumerate(codes):
            said = (folder / f"says{place}").read_text("utf-8", "replace")
            assert code == 0, f"process {place} of {len(calls)} ended with {code}:\n{said}"
        return [pickle.loads((folder / f"answer{place}").read_bytes()) for place in range(len(calls))]
