"""A rank that ends at a chosen moment of the start, in every way of starting; the verb is the real `pretrain.py`.

The moment is found from outside: a `sitecustomize` in a folder of PYTHONPATH starts a thread that looks at the stack of
the main thread and kills the process where the moment has come.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from fork_server import free_port
from slurm_cluster import SlurmCluster, descendants

ROOT = Path(__file__).resolve().parents[1]

Way = Callable[[Sequence[str], int], list[tuple[list[str], dict[str, str]]]]
UNSEEN = "before its first line"
"""Of no rank that dies so has rank 0 heard: the launcher alone can tell."""
MOMENTS = ("at the first import", "during the imports", "before the rendezvous", "in the rendezvous")
SITECUSTOMIZE = """
import os, signal, sys, threading, time
rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID")
if rank == os.environ["FAULT_RANK"] and sys.argv[:1] != [""]:
    def is_now(frames):
        names = {code.co_name for code in frames}
        files = " ".join(code.co_filename for code in frames)
        return {
            "at the first import": "/deepspeed/__init__.py" in files,
            "during the imports": "/torch/" in files and "<module>" in names,
            "before the rendezvous": "load_pair" in names,
            "in the rendezvous": "init_process_group" in names,
        }[os.environ["FAULT_MOMENT"]]
    def die():
        with open(os.environ["FAULT_TIME"], "w") as file:
            file.write(repr(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    def look():
        main = threading.main_thread().ident
        while True:
            frame, frames = sys._current_frames().get(main), []
            while frame is not None:
                frames.append(frame.f_code)
                frame = frame.f_back
            if is_now(frames):
                die()
            time.sleep(0.0005)
    if os.environ["FAULT_MOMENT"] == "before its first line":
        die()
    threading.Thread(target=look, daemon=True).start()
"""


class Outcome(NamedTuple):
    """What became of a start in which a rank died."""

    seconds: float
    """From the death to the end of the last other rank and launcher."""
    exit_codes: list[int]
    """Of what was started: ranks by hand, launchers else."""
    says: str
    """The line that names the rank; empty without one."""


def fault_environment(folder: Path, *, rank: int, moment: str) -> dict[str, str]:
    """Environment of a start in whose course the rank dies."""
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    paths = f"{folder}:{ROOT}:{ROOT / 'kernels'}"
    facts = {"FAULT_RANK": str(rank), "FAULT_MOMENT": moment, "FAULT_TIME": str(folder / "died"), "PYTHONPATH": paths}
    return {**os.environ, **facts, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def by_hand(verb: Sequence[str], world_size: int) -> list[tuple[list[str], dict[str, str]]]:
    """A process per rank, each with its variables."""
    port = str(free_port())
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        ([sys.executable, *verb], {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world_size)
    ]


def deepspeed_launcher(verb: Sequence[str], world_size: int) -> list[tuple[list[str], dict[str, str]]]:
    """The `deepspeed` command on one machine."""
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(world_size)]
    return [([*words, "--master_port", str(free_port()), *verb], {})]


def deepspeed_nodes(verb: Sequence[str], world_size: int) -> list[tuple[list[str], dict[str, str]]]:
    """What the `deepspeed` command starts on several machines over ssh: its launcher on each, one rank each."""
    nodes = {f"node{rank}": [0] for rank in range(world_size)}
    world = base64.urlsafe_b64encode(json.dumps(nodes).encode()).decode()
    port = str(free_port())
    return [
        (
            [
                *(sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}"),
                *(f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}", *verb),
            ],
            {},
        )
        for node in range(world_size)
    ]


def torchrun(verb: Sequence[str], world_size: int) -> list[tuple[list[str], dict[str, str]]]:
    """torchrun on one machine."""
    words = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world_size}"]
    return [([*words, f"--master-port={free_port()}", "--", *verb], {})]


def torchrun_nodes(verb: Sequence[str], world_size: int) -> list[tuple[list[str], dict[str, str]]]:
    """torchrun on several machines, one rank each."""
    words = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={world_size}", "--nproc-per-node=1"]
    words += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    return [([*words, f"--node-rank={node}", "--", *verb], {}) for node in range(world_size)]


def srun(cluster: SlurmCluster, *, ends_all: bool = False) -> Way:
    """An srun on two nodes: one that by itself ends nobody, or as slurm/common.sh starts it."""

    def way(verb: Sequence[str], world_size: int) -> list[tuple[list[str], dict[str, str]]]:
        words = [
            "srun",
            f"--kill-on-bad-exit={ends_all:d}",
            f"--nodes={world_size}",
            f"--ntasks={world_size}",
            sys.executable,
        ]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return [([*words, *verb], {"SLURM_CONF": cluster.environment["SLURM_CONF"], **place})]

    return way


WAYS: dict[str, Way] = {
    "by hand": by_hand,
    "deepspeed": deepspeed_launcher,
    "deepspeed, 2 nodes": deepspeed_nodes,
    "torchrun": torchrun,
    "torchrun, 2 nodes": torchrun_nodes,
}


def die_at_start(
    folder: Path, way: Way, verb: Sequence[str], *, moment: str, rank: int = 1, limit_s: float = 180.0
) -> Outcome:
    """Start two ranks, let one die, and wait for the end of everything.

    Args:
        folder: empty, for what the start says.
        way: one of WAYS.
        verb: script and arguments.
        moment: one of MOMENTS.
        rank: the one that dies.
        limit_s: after so long everything is killed and the seconds are infinite.
    """
    environment = fault_environment(folder, rank=rank, moment=moment)
    log = folder / "log"
    with log.open("wb") as file:
        started = [
            subprocess.Popen(words, env={**environment, **own}, stdout=file, stderr=subprocess.STDOUT)
            for words, own in way(verb, 2)
        ]
        deadline = time.monotonic() + limit_s
        tree = {process.pid for process in started}
        while any(process.poll() is None for process in started) and time.monotonic() < deadline:
            time.sleep(0.1)
            tree |= {pid for process in started for pid in descendants(process.pid)}
        ended = time.time()
        for process in started:
            if process.poll() is None:
                ended = float("inf")
                for pid in [*descendants(process.pid), process.pid]:
                    os.kill(pid, signal.SIGKILL)
                process.wait()
    died = float((folder / "died").read_text())
    lines = log.read_text(errors="replace").splitlines()
    says = next((line for line in lines if line.startswith(f"start: rank {rank} on")), "")
    return Outcome(ended - died, [process.returncode for process in started], says)
