"""What a rank has measured of its node, and the limits by which a node is not fit to train."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bert_ds.configuration.run_plan import RunPlan, size_text
from bert_ds.training.checkpoints.checkpoint_folder import candidates

SLOW_SHARE = 0.5
"""A GEMM below this share of the median over the ranks is slow; of two ranks it is one third of the other."""
MIN_LINK_BYTES_PER_S = 10e6
"""A node whose best link to a neighbour carries less is cut off in practice: a tenth of gigabit Ethernet."""
LINK_SHARE = 0.25
"""Neither may it be below this share of the median over the nodes."""
MAX_CLOCK_S = 30.0
"""Clocks this far from the median make the time stamps of locks and logs useless."""
MIN_MEMORY_BYTES = 2**30
"""Free host memory per rank of the node, beside what the run offloads to it."""
MIN_TEMPORARY_BYTES = 2**28
"""Free disk for temporary files of a node."""


class Needs(NamedTuple):
    """What the run will take, in bytes."""

    disk: int = 0
    """In the run folder, by all ranks together."""
    device: int = 0
    """On each GPU."""
    host: int = 0
    """Of each rank, beside MIN_MEMORY_BYTES."""


class NodeFacts(NamedTuple):
    """What a rank has measured; JSON values."""

    node: str
    gemm_flops: float
    """Best of some, FLOP/s."""
    gemm_sum: float
    """Of the product's elements, the same on every rank; -1 where the GEMM failed."""
    reduced: float
    """An element of the all-reduce of (rank + 1)."""
    all_reduce_bytes_per_s: float
    links: tuple[float, ...]
    """Bytes/s to the neighbours of the node; empty on all but one rank of a node."""
    folder: str
    """What is wrong with the shared folder; empty where it is fine."""
    clock_s: float
    """time.time() just after a barrier."""
    memory: int
    """Free bytes of the node's host memory."""
    device_memory: int
    """Free bytes of this rank's GPU; -1 without one."""
    disk: int
    """Free bytes of the run folder's file system; -1 where it cannot be asked."""
    temporary: int
    """Free bytes for temporary files."""


def needs_of(plan: RunPlan, run_dir: Path) -> Needs:
    """Return what a run will take beside the checkpoints that its folder holds already."""
    held = sum(path.stat().st_size for folder in candidates(run_dir) for path in folder.iterdir())
    memory = plan.memory()
    return Needs(disk=max(0, plan.disk_bytes - held), device=memory.device, host=memory.host)


def node_problems(facts: Sequence[NodeFacts], needs: Needs) -> list[str]:
    """Return a clause for everything that is wrong, each naming rank and node; one per node where it is the node's."""
    flops = statistics.median(one.gemm_flops for one in facts)
    clock = statistics.median(one.clock_s for one in facts)
    total = statistics.mode(one.gemm_sum for one in facts)
    wanted = len(facts) * (len(facts) + 1) / 2
    problems: dict[tuple[str, str], str] = {}
    for rank, one in enumerate(facts):
        host = MIN_MEMORY_BYTES + needs.host
        here = sum(other.node == one.node for other in facts)
        for kind, is_wrong, text in (
            (f"gemm {rank}", one.gemm_sum != total, "its GEMM computes something else than the others'"),
            (
                f"slow {rank}",
                one.gemm_flops < SLOW_SHARE * flops,
                f"a GEMM of {_flops(one.gemm_flops)}, wanted {SLOW_SHARE:.0%} of the median, {_flops(flops)}",
            ),
            (f"sum {rank}", one.reduced != wanted, f"an all-reduce gave {one.reduced:g}, wanted {wanted:g}"),
            ("folder", bool(one.folder), one.folder),
            (
                "clock",
                abs(one.clock_s - clock) > MAX_CLOCK_S,
                f"its clock is {one.clock_s - clock:+.0f} s from the median, wanted at most {MAX_CLOCK_S:.0f} s",
            ),
            (
                "memory",
                one.memory < here * host,
                f"{size_text(one.memory)} of memory free, wanted {size_text(here * host)}",
            ),
            (
                f"device {rank}",
                0 <= one.device_memory < needs.device,
                f"{size_text(one.device_memory)} of GPU memory free, wanted {size_text(needs.device)}",
            ),
            (
                "disk",
                0 <= one.disk < needs.disk,
                f"{size_text(one.disk)} free for the run, wanted {size_text(needs.disk)}",
            ),
            (
                "temporary",
                0 <= one.temporary < MIN_TEMPORARY_BYTES,
                f"{size_text(one.temporary)} free for temporary files, wanted {size_text(MIN_TEMPORARY_BYTES)}",
            ),
        ):
            if is_wrong:
                problems.setdefault((one.node, kind), f"node {one.node} (rank {rank}): {text}")
    return [*problems.values(), *_link_problems(facts)]


def summary(facts: Sequence[NodeFacts]) -> str:
    """Return what was measured, in one line."""
    flops, clocks = [one.gemm_flops for one in facts], [one.clock_s for one in facts]
    slowest_link = min((link for one in facts for link in one.links), default=None)
    link = "" if slowest_link is None else f", links from {slowest_link / 1e6:,.0f} MB/s"
    num_nodes = len({one.node for one in facts})
    return (
        f"{num_nodes} node{'s fit' if num_nodes > 1 else ' fits'}: GEMM {_flops(min(flops))} to {_flops(max(flops))}, "
        f"all-reduce {min(one.all_reduce_bytes_per_s for one in facts) / 1e6:,.0f} MB/s{link}, clocks within "
        f"{max(clocks) - min(clocks):.1f} s, from {size_text(min(one.memory for one in facts))} of memory and "
        f"{size_text(min(one.disk for one in facts))} of disk free"
    )


def _link_problems(facts: Sequence[NodeFacts]) -> list[str]:
    best = {one.node: (rank, max(one.links)) for rank, one in enumerate(facts) if one.links}
    if not best:
        return []
    limit = max(MIN_LINK_BYTES_PER_S, LINK_SHARE * statistics.median(speed for _, speed in best.values()))
    return [
        f"node {node} (rank {rank}): {speed / 1e6:.1f} MB/s to its neighbours, wanted {limit / 1e6:.0f} MB/s"
        for node, (rank, speed) in best.items()
        if speed < limit
    ]


def _flops(value: float) -> str:
    return f"{value / 1e12:.1f} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.1f} GFLOP/s"
