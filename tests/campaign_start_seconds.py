"""Seconds of the start and the end of a training by one rank, into results/start_seconds.jsonl; `make campaign-start`.

    python tests/campaign_start_seconds.py --work FOLDER [--before TREE] [--rounds N]

`embedded_default` with its corpus built, and a classification of short texts; the rank alone, and `bert-ds`, which
checks the words before it starts one. The start is from that of the process to the end of the first step, the processor
seconds of that time beside it, which other work disturbs less. The end is from the end of the last step to that of the
process, with an evaluation (64 examples, 160 rows) and the save, without the export. With --before another checkout of
this project takes turns with this one.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from campaign_rows import add_row, commit_of, read_rows
from downstream_cases import review_task

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests/results/start_seconds.jsonl"
STEPS = 30
FIGURES = ("first_step_s", "first_step_cpu_s", "end_s")


def main() -> None:
    """Add rows, then print the medians of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    work = args.work.resolve()
    trees = {**({"before": args.before.resolve()} if args.before else {}), "now": ROOT}
    verbs = prepared(work)
    for number, verb, name in itertools.product(range(args.rounds), verbs, trees):
        run_dir = work / f"{verb}-{name}-{number}-{os.getpid()}"
        facts = {"verb": verb, "tree": name, "commit": commit_of(trees[name])}
        found = timed(trees[name], [*verbs[verb], "--run_dir", run_dir])
        add_row(RESULTS, {**facts, **found, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)})
    print(table())


def prepared(work: Path) -> dict[str, list[Any]]:
    """Build the corpus and a pre-trained folder once; return the words of each verb but for its run folder."""
    pretrain = ["pretrain.py", "--set", f"training.total_steps={STEPS}", "--set", "training.log_every_steps=1"]
    pretrain += ["--set", f"evaluation.every_steps={STEPS}", "--set", "evaluation.num_examples=64"]
    pretrain += ["--set", f"checkpoints.every_steps={STEPS}"]
    if not (work / "model/model.safetensors").exists():
        started(ROOT, [*pretrain, "--run_dir", work / "first"]).communicate()
        started(ROOT, ["export_hf.py", "--run_dir", work / "first", "--output", work / "model"]).communicate()
    training = {"train_batch_size": 32, "epochs": 2, "log_every_steps": 1}
    task = review_task(work / "task", rows=640, training=training)
    return {
        "pretrain": pretrain,
        "bert-ds pretrain": ["console.py", "pretrain", *pretrain[1:]],
        "finetune": ["finetune.py", "--task", task, "--model", work / "model"],
    }


def started(tree: Path, words: list[Any]) -> subprocess.Popen[str]:
    """Start a verb of a checkout as the only rank."""
    path = {"PYTHONPATH": f"{tree}:{tree / 'kernels'}", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(tree / "bert_ds" / words[0]), *map(str, words[1:])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **path})


def timed(tree: Path, words: list[Any]) -> dict[str, float]:
    """Return the figures of a run."""
    begun, first, first_cpu, step_at, exported = time.time(), 0.0, 0.0, 0.0, 0.0
    process = started(tree, words)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            step_at = time.time()
            if line.startswith("step 1/"):
                rank = psutil.Process(process.pid)
                times = [one.cpu_times() for one in (rank, *rank.children(recursive=True))]
                first, first_cpu = step_at, sum(each.user + each.system for each in times)
        elif line.startswith("exported to "):
            written = [path.stat().st_mtime for path in Path(words[-1]).glob("figures/*")]
            exported = time.time() - max(written)
    if process.wait():
        sys.exit(f"{words} of {tree} ended with exit code {process.returncode}")
    found = {"first_step_s": first - begun, "first_step_cpu_s": first_cpu, "end_s": time.time() - step_at - exported}
    return {name: round(value, 2) for name, value in {**found, "export_s": exported}.items()}


def table() -> str:
    """Medians, with the number of runs."""
    rows = read_rows(RESULTS)
    lines = ["| verb | tree | first step | processor seconds | end | runs |", "|---|---|---|---|---|---|"]
    for verb, tree in sorted({(row["verb"], row["tree"]) for row in rows}):
        found = [row for row in rows if (row["verb"], row["tree"]) == (verb, tree)]
        cells = [f"{statistics.median(row[name] for row in found):.1f} s" for name in FIGURES]
        lines.append(f"| {verb} | {tree} | {' | '.join(cells)} | {len(found)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
