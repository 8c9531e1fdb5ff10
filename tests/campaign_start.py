"""A rank dies at a moment of the start, in every way of starting; rows into results/start.jsonl; `make campaign-start`.

Seconds are from the death to the end of the last other rank and launcher. A row that is there is not measured again.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import test_pretrain
from campaign_rows import add_row, read_rows
from slurm_cluster import SlurmCluster
from start_faults import MOMENTS, WAYS, die_at_start, srun

SRUN = "srun, 2 nodes"
RESULTS = Path(__file__).parent / "results/start.jsonl"


def main() -> None:
    done = {(row["way"], row["moment"], row["rank"]) for row in read_rows(RESULTS)}
    wanted = [(way, moment, rank) for rank in (1, 0) for moment in MOMENTS for way in (*WAYS, SRUN)]
    with tempfile.TemporaryDirectory() as folder, slurm(Path(folder) / "slurm") as cluster:
        ways = {**WAYS, SRUN: srun(cluster)}
        workshop = test_pretrain.make_workshop(Path(folder) / "workshop")
        for number, (way, moment, rank) in enumerate(wanted):
            if (way, moment, rank) in done:
                continue
            place = Path(folder) / str(number)
            place.mkdir()
            verb = [str(word) for word in test_pretrain.pretrain_command(workshop, place / "run")]
            found = die_at_start(place, ways[way], verb, moment=moment, rank=rank)
            facts = {"way": way, "moment": moment, "rank": rank, "seconds": round(found.seconds, 1)}
            facts |= {"exit_codes": found.exit_codes, "says": found.says, "load": round(os.getloadavg()[0], 1)}
            add_row(RESULTS, {**facts, "machine": platform.machine()})
    print(table())
    if bad := [row for row in read_rows(RESULTS) if row["seconds"] > 30 or not row["says"]]:
        sys.exit(f"{len(bad)} starts did not end within 30 s with the rank's name")


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[SlurmCluster]:
    """A Slurm of two nodes, for one of the ways."""
    cluster = SlurmCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def table() -> str:
    """Slowest end by way and moment."""
    lines = [f"| way of starting | {' | '.join(MOMENTS)} |", "|---" * (1 + len(MOMENTS)) + "|"]
    for way in (*WAYS, SRUN):
        cells = []
        for moment in MOMENTS:
            found = [row for row in read_rows(RESULTS) if (row["way"], row["moment"]) == (way, moment)]
            named = "" if all(row["says"] for row in found) else ", not named"
            cells.append(f"{max(row['seconds'] for row in found):.1f} s{named}" if found else "-")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
