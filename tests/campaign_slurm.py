"""Faults against a real Slurm: each at random steps, one row per fault into results/slurm.jsonl; `make campaign-slurm`.

A row that is there already is not measured again. Seconds are those of a machine whose cores two ranks share.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import test_pretrain
from slurm_cluster import REQUEUE_WAIT_S, SlurmCluster, processes_of
from slurm_runs import (
    FAULTS,
    LONG,
    OPTIMIZER,
    STEPS,
    TIME_LIMIT,
    launches,
    log_of,
    submit,
    wait_for_step,
    wait_for_the_time_limit,
)

RESULTS = Path(__file__).parent / "results/slurm.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="times that each fault is tried (default %(default)s)")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="these alone")
    args = parser.parse_args()
    done = {(row["fault"], row["round"]) for row in recorded() if row["optimizer"] == OPTIMIZER}
    wanted = [(fault, number) for number in range(args.rounds) for fault in args.faults if (fault, number) not in done]
    if wanted:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), wanted)
    print(table(recorded()))
    if bad := [row for row in recorded() if not row["survived"]]:
        sys.exit(f"{len(bad)} faults were not survived")


def measure(folder: Path, wanted: list[tuple[str, int]]) -> None:
    """Run a job for each fault and append its row."""
    cluster = SlurmCluster(folder / "slurm")
    workshop = test_pretrain.make_workshop(folder / "workshop")
    site = folder / "site.env"
    site.write_text(f"PYTHON={sys.executable}\nexport MASTER_ADDR=127.0.0.1\n", encoding="utf-8")
    cluster.environment.update(BERT_DS_SITE=str(site), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    try:
        cluster.start()
        reference = workshop / "reference"
        assert cluster.wait_for_end(submit(cluster, workshop, reference), seconds=300) == ("COMPLETED", 0)
        for fault, number in wanted:
            if FAULTS[fault] is wait_for_the_time_limit and not (workshop / "long").exists():
                ended = cluster.wait_for_end(submit(cluster, workshop, workshop / "long", *LONG), seconds=400)
                assert ended == ("COMPLETED", 0)
            row = try_fault(cluster, workshop, fault=fault, number=number)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    finally:
        cluster.stop()


def try_fault(cluster: SlurmCluster, workshop: Path, *, fault: str, number: int) -> dict[str, Any]:
    """Let one fault happen to one run, and return its row."""
    at_step = random.Random(f"{fault} {number}").randint(1, STEPS - 25)
    run_dir = workshop / f"{re.sub('[^a-z0-9]', '_', fault)}_{number}"
    is_long = FAULTS[fault] is wait_for_the_time_limit
    reference = workshop / ("long" if is_long else "reference")
    job = submit(cluster, workshop, run_dir, *(LONG if is_long else ()), flags=TIME_LIMIT if is_long else ())
    wait_for_step(run_dir, at_step)
    FAULTS[fault](cluster, job, run_dir)
    ended, code = cluster.wait_for_end(job, seconds=400)
    losses = test_pretrain.losses(run_dir)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_bytes().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    gaps = [row["time"] - before["time"] for before, row in pairwise(rows) if row["kind"] == "start"]
    return {
        "fault": fault,
        "optimizer": OPTIMIZER,
        "round": number,
        "at_step": at_step,
        "survived": (ended, code) == ("COMPLETED", 0) and losses == test_pretrain.losses(reference),
        "orphans": len(processes_of(run_dir)),
        "launches": launches(run_dir),
        "requeues": int(cluster.job_fact(job, "Restarts")),
        "steps_repeated": len(steps) - len(set(steps)),
        "seconds_without_training": round(sum(gaps), 1),
        "requeue_wait_s": REQUEUE_WAIT_S,
        "reason": re.sub(r"\S*/", "", re.findall(r"^job \d+: (.*)$", log_of(run_dir), re.MULTILINE)[0])[:200],
        "machine": platform.machine(),
    }


def recorded() -> list[dict[str, Any]]:
    """Rows of earlier campaigns."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table, one line per kind of fault."""
    lines = [
        "| fault | optimizer | survived | steps repeated | requeues | seconds without training |",
        "|---|---|---|---|---|---|",
    ]
    for fault, optimizer in dict.fromkeys((row["fault"], row["optimizer"]) for row in rows):
        found = [row for row in rows if (row["fault"], row["optimizer"]) == (fault, optimizer)]
        seconds = sorted(row["seconds_without_training"] for row in found)
        repeated = sorted(row["steps_repeated"] for row in found)
        survived = sum(row["survived"] and not row["orphans"] for row in found)
        requeues = sum(row["requeues"] for row in found)
        figures = f"{survived}/{len(found)} | {_range(repeated)} | {requeues} | {_range(seconds)}"
        lines.append(f"| {fault} | {optimizer} | {figures} |")
    return "\n".join(lines)


def _range(values: list[float]) -> str:
    low, high = f"{values[0]:.0f}", f"{values[-1]:.0f}"
    return low if low == high else f"{low} to {high}"


if __name__ == "__main__":
    main()
