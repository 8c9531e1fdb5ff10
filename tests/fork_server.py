"""Processes that start in milliseconds: one has imported everything and forks for each launch.

A launch is a script with its command line, or a function of a test module. Environment, folder, output and exit code
are those of a process that was started afresh; modules are shared, state is not. The server ends with the process that
asked first.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import json
import math
import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
import weakref
from functools import cache
from pathlib import Path
from typing import Any

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
GRACE_S = 20.0
Order = dict[str, Any]
"""`env`, `cwd`, `out` and `err` (files), and `argv`, or `call` (a file with a pickled module, function, arguments and
the file that takes what it returns)."""


def launch(orders: list[Order], *, timeout_s: float) -> list[int]:
    """Run all of these processes at once and return their exit codes.

    Raises:
        subprocess.TimeoutExpired: they were killed after timeout_s.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(orders) + "\n")
    server.stdin.flush()
    pids = json.loads(server.stdout.readline())
    timed_out = not select.select([server.stdout], [], [], timeout_s)[0]
    if timed_out:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    codes = json.loads(server.stdout.readline())
    if timed_out:
        raise subprocess.TimeoutExpired(str(orders[0]), timeout_s)
    return codes


def rank_facts(world_size: int) -> list[dict[str, str]]:
    """Return what a launcher puts into the environment of each rank."""
    shared = {"WORLD_SIZE": str(world_size), "LOCAL_SIZE": str(world_size), "MASTER_PORT": str(free_port())}
    shared["MASTER_ADDR"] = "127.0.0.1"
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def free_port() -> int:
    """Return a TCP port that is free on the loopback interface."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def plain_environment() -> dict[str, str]:
    """Return the environment of the tests without what this process may know of a launch of its own."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCH} | ENVIRONMENT


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env={**plain_environment(), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
    )
    atexit.register(server.kill)
    return server


def _become(order: Order) -> int:
    """Be what was ordered, in a process that a fork has just made; return the exit code."""
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    for number, path in ((0, os.devnull), (1, order["out"]), (2, order["err"])):
        descriptor = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    try:
        if "call" in order:
            module, function, args, answer = pickle.loads(Path(order["call"]).read_bytes())
            value = getattr(importlib.import_module(module), function)(*args)
            Path(answer).write_bytes(pickle.dumps(value))
            return 0
        sys.argv = order["argv"]
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
            return 1
        return leaving.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _serve() -> None:
    """Read a JSON list of orders a line; answer with the process ids, and then with the exit codes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what is imported may print
    _import_all()
    for line in sys.stdin:
        pids = []
        for order in json.loads(line):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    code = _become(order)
                    sys.stdout.flush()
                    sys.stderr.flush()
                finally:
                    os._exit(code)
            pids.append(pid)
        answers.write(json.dumps(pids) + "\n")
        answers.write(json.dumps(_wait_for_all(pids)) + "\n")


def _wait_for_all(pids: list[int]) -> list[int]:
    """Return the exit codes; what is left some time after one has failed would wait for it for ever, and is killed."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        deadline = time.monotonic() + GRACE_S
        while codes[pid] and len(codes) < len(pids):
            other, status = os.waitpid(-1, os.WNOHANG)
            if other:
                codes[other] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() < deadline:
                time.sleep(0.05)
            else:
                for left in set(pids) - set(codes):
                    os.kill(left, signal.SIGKILL)
                deadline = math.inf
    return [codes[pid] for pid in pids]


def _import_all() -> None:
    """Import what verbs and ranks import, early or late."""
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root), str(root / "kernels")]
    import conftest  # before triton, for its interpreter
    import deepspeed
    import deepspeed.module_inject.auto_ep_layer
    import sklearn.metrics
    import torch
    import torch._dynamo
    import torch.profiler._cupti_monitor
    import transformers
    from deepspeed.runtime.zero.muon import muon_optimizer
    from matplotlib.figure import Figure
    from torch.utils.serialization import config
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import bert_ds.build_shards
    import bert_ds.export_hf
    import bert_ds.finetune
    import bert_ds.pretrain
    import bert_ds.probe
    import bert_ds.report
    import bert_ds.score
    import bert_ds.show_masks
    import bert_ds.train_tokenizer
    import bert_ds.train_wordpiece

    assert conftest and muon_optimizer and torch._dynamo and sklearn.metrics and bert_ds and config
    assert transformers.BertForPreTraining and transformers.AutoTokenizer and transformers.BertTokenizer
    torch.set_num_threads(1)
    # What is found out once per process: which operators there are, names of weights, releases and commit, fonts.
    assert deepspeed.ops.__compatible_ops__ and not get_checkpoint_conversion_mapping("none")
    assert bert_ds.reporting.environment.library_versions()
    bert_ds.reporting.environment._commit()
    figure = Figure(layout="constrained")
    figure.subplots().set_title("1")
    figure.savefig(io.BytesIO())
    _forget_at_exit()
    os.fsync = lambda descriptor: None  # for a cut of the power, which no test makes; a kill needs none
    gc.freeze()


def _forget_at_exit() -> None:
    """Let no fork take apart at its exit, one by one, the operators of torch that were registered here."""
    for finalizer in weakref.finalize._registry:
        finalizer.atexit = False


if __name__ == "__main__":
    _serve()
