"""Whether every node of a launch is fit to train, looked at for seconds before the first step.

Each rank measures: a GEMM, an all-reduce, the link to the next node, the shared folder, the clock, free memory and free
disk. `node_facts` holds the limits and judges what all have measured.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from bert_ds.basics.ranks import Ranks, node_name
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.training.agreement import broadcast_json, gather_json
from bert_ds.training.launch.node_facts import Needs, NodeFacts, node_problems, summary

_GEMM = {"cpu": (1024, torch.float32), "cuda": (4096, torch.bfloat16)}
_MESSAGE_FLOATS = 2**21
_REPEATS = 5

When = Literal["auto", "on", "off"]


def preflight(run_dir: Path, ranks: Ranks, *, when: When = "auto", needs: Needs | None = None) -> None:
    """Measure every rank and refuse nodes that are not fit to train; a collective. Rank 0 says what was found.

    Args:
        run_dir: the run folder; what is tried in it, or in the nearest folder above, is taken away again.
        ranks: place of this process in the job.
        when: "auto" is on where the ranks are on several nodes.
        needs: what the run will take.

    Raises:
        ConfigError: on every rank, naming rank and node of each that is not fit.
    """
    nodes = gather_json(node_name())
    if when == "off" or (when == "auto" and len(set(nodes)) == 1):
        return
    begun = time.monotonic()
    facts = measure(run_dir, ranks, nodes=nodes)
    if problems := node_problems(facts, needs or Needs()):
        raise ConfigError("preflight: " + "; ".join(problems) + ". --preflight off trains nevertheless")
    if ranks.is_main:
        print(f"preflight: {summary(facts)}, in {time.monotonic() - begun:.1f} s", flush=True)


def measure(run_dir: Path, ranks: Ranks, *, nodes: Sequence[str]) -> list[NodeFacts]:
    """Return the facts of every rank in rank order; a collective."""
    device = torch.device(get_accelerator().current_device_name())
    folder = try_folder(run_dir, ranks, nodes=nodes)
    flops, total = run_gemm(device)
    reduced, speed = run_all_reduce(device)
    links = run_links(device, ranks, nodes=nodes)
    gather_json(None)  # so that all read their clocks at the same time
    clock_s = time.time()
    place = _existing(run_dir)
    mine = NodeFacts(
        node=nodes[ranks.rank],
        gemm_flops=flops,
        gemm_sum=total,
        reduced=reduced,
        all_reduce_bytes_per_s=speed,
        links=links,
        folder=folder,
        clock_s=clock_s,
        memory=_free_memory(),
        device_memory=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else -1,
        disk=_free_disk(place),
        temporary=_free_disk(Path(tempfile.gettempdir())),
    )
    return [NodeFacts(*one) for one in gather_json(mine)]


def run_gemm(device: torch.device) -> tuple[float, float]:
    """Return the best FLOP/s of some products of whole numbers, and the sum of the product's elements."""
    size, dtype = _GEMM.get(device.type, _GEMM["cpu"])
    # Whole numbers whose products and sums fp32 holds exactly: the sum does not depend on the order of a kernel.
    left = (torch.arange(size * size, device=device).view(size, size) % 5 - 2).to(dtype)
    right = (torch.arange(size * size, device=device).view(size, size) % 3 - 1).to(dtype)
    product, seconds = _best(lambda: left @ right, device)
    return 2 * size**3 / seconds, float(product.double().sum())


def run_all_reduce(device: torch.device) -> tuple[float, float]:
    """Return an element of the sum of (rank + 1), and the bytes/s of the best all-reduce; a collective."""

    def reduce() -> torch.Tensor:
        message = torch.full((_MESSAGE_FLOATS,), dist.get_rank() + 1.0, device=device)
        dist.all_reduce(message)
        return message

    message, seconds = _best(reduce, device)
    low, high = float(message.min()), float(message.max())
    return (low if low == high else float("nan")), 4 * _MESSAGE_FLOATS / seconds


def run_links(device: torch.device, ranks: Ranks, *, nodes: Sequence[str]) -> tuple[float, ...]:
    """Return the bytes/s between this node and its neighbours in a ring, on the first rank of each node; a collective.

    The links are tried in three rounds, so that no node has two of them at a time.
    """
    leads = [rank for rank, node in enumerate(nodes) if node not in nodes[:rank]]
    found = []
    links = [(place, (place + 1) % len(leads)) for place in range(len(leads) if len(leads) > 2 else len(leads) - 1)]
    is_odd = len(links) > 2 and len(links) % 2
    rounds = [links[: len(links) - is_odd][0::2], links[: len(links) - is_odd][1::2], links[len(links) - is_odd :]]
    for one in rounds:
        for pair in one:
            if ranks.rank in (ends := [leads[place] for place in pair]):
                other = ends[0] if ends[1] == ranks.rank else ends[1]
                found.append(_exchange(device, other))
        dist.barrier()
    return tuple(found)


def try_folder(run_dir: Path, ranks: Ranks, *, nodes: Sequence[str]) -> str:
    """Write and read in the run folder on every node; return what is wrong here, "" where nothing is. A collective."""
    place = _existing(run_dir)
    token = broadcast_json(secrets.token_hex(8))
    own = place / f".preflight-{token}-{ranks.rank}"
    problem = ""
    try:
        own.write_text(token, encoding="utf-8")
    except OSError as error:
        problem = f"{place} cannot be written: {error.strerror}"
    wrote = gather_json(not problem)
    seen = [rank for rank in range(len(nodes)) if (place / f".preflight-{token}-{rank}").exists()] if wrote[0] else [0]
    gather_json(None)  # everybody has looked
    own.unlink(missing_ok=True) if not problem else None
    if problem or 0 in seen:
        return problem
    return f"{place} is not the folder that rank 0 on {nodes[0]} sees: wanted one folder shared by all nodes"


def _exchange(device: torch.device, other: int) -> float:
    message, received = (torch.zeros(_MESSAGE_FLOATS, device=device) for _ in range(2))

    def exchange() -> torch.Tensor:
        operations = [dist.P2POp(dist.isend, message, other), dist.P2POp(dist.irecv, received, other)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        return received

    return 4 * _MESSAGE_FLOATS / _best(exchange, device)[1]


def _best(action: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, float]:
    seconds = float("inf")
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        result = action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what is measured is its end
        seconds = min(seconds, time.perf_counter() - begun)
    return result, seconds


def _free_memory() -> int:
    """Free bytes of the host; all of it where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        facts = dict(line.split(":") for line in lines)
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_disk(place: Path) -> int:
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return -1


def _existing(path: Path) -> Path:
    return path if path.is_dir() else _existing(path.parent)
