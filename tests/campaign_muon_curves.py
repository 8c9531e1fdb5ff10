"""What a small BERT has learned under AdamW, LAMB and Muon after the same steps, and after the same minutes.

    python tests/campaign_muon_curves.py --text FOLDER --work FOLDER

A 2 x 128 BERT of 4,096 pieces, pre-norm because post-norm stays at the unigram plateau for longer than this;
sequences of 64, 80 a step, fp32, ZeRO-2 on one rank; loss at [MASK] on held-out documents. Three rates each are
screened for SCREENED_STEPS steps with one seed. The best of each is trained with three seeds for NUM_STEPS steps, and
once more for as many steps as fit into the time that AdamW takes for NUM_STEPS, by the step times of the screening.
One run after the other. Rows: tests/results/muon_curves.jsonl; what is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from campaign_lamb_curves import corpus
from campaign_rows import add_row, read_rows

from bert_ds.reporting.run_log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "tests/campaign_muon_curves.json"
RESULTS = ROOT / "tests/results/muon_curves.jsonl"
RATES = {"adamw": (0.0015, 0.003, 0.006), "lamb": (0.005, 0.01, 0.02), "muon": (0.003, 0.006, 0.012)}
SCREENED_STEPS, NUM_STEPS, SEEDS = 300, 800, (1, 2, 3)


def main() -> None:
    """Screen, choose, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    prepare(arguments.text, arguments.work)
    screened = {
        kind: [row_of(arguments.work, "screen", kind, lr, 1, SCREENED_STEPS) for lr in RATES[kind]] for kind in RATES
    }
    seconds = {kind: statistics.median(row["step_s"] for row in rows) for kind, rows in screened.items()}
    for kind, rows in screened.items():
        best = min(rows, key=lambda row: row["loss_mlm_masked"])
        fitting = round(NUM_STEPS * seconds["adamw"] / seconds[kind])
        for seed in SEEDS:
            row_of(arguments.work, "same steps", kind, best["lr"], seed, NUM_STEPS)
            if kind != "adamw":
                row_of(arguments.work, "same minutes", kind, best["lr"], seed, fitting)
    print_table()


def prepare(text: Path, work: Path) -> None:
    """Train the tokenizer and build the shards once."""
    tokenizer, shards = work / "tokenizer", work / "shards"
    if not (tokenizer / "vocab.txt").exists():
        _verb("train_wordpiece.py", "--input", text, "--output", tokenizer, "--vocab_size", 4096)
    if not (shards / "manifest.json").exists():
        places = ("--input", text, "--tokenizer", tokenizer, "--output", shards)
        _verb("build_shards.py", *places, "--validation_fraction", 0.03)


def row_of(work: Path, what: str, kind: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Return the recorded row of a run, or train it and record it."""
    wanted = {"what": what, "optimizer": kind, "lr": lr, "seed": seed, "steps": steps}
    for row in read_rows(RESULTS):
        if all(row[name] == value for name, value in wanted.items()):
            return row
    run_dir = work / f"{what.replace(' ', '_')}-{kind}-{lr}-{seed}-{steps}"
    section = {"type": kind, "lr": lr, "betas": [0.9, 0.98]}
    overrides = [*corpus(work), f"optimizer={json.dumps(section)}", f"seed={seed}", f"training.total_steps={steps}"]
    _verb(
        "pretrain.py", "--run", RECIPE, "--deepspeed_config", ROOT / "ds_configs/zero2.json", "--run_dir", run_dir,
        *(f"--set={one}" for one in overrides),
    )  # fmt: skip
    log = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    evaluation = [row for row in log if row["kind"] == "evaluation"][-1]
    training = read_metrics(run_dir / "metrics.jsonl")[2:]
    per_step = [row["num_tokens"] / row["tokens_per_s"] for row in training]
    facts = {name: evaluation[name] for name in ("loss_mlm_masked", "mlm_masked_accuracy", "mlm_masked_targets")}
    unigram = next(row["data"]["unigram_cross_entropy"] for row in log if row["kind"] == "start")
    machine = {"amx": torch.cpu._is_amx_tile_supported(), "cores": os.cpu_count(), "commit": _commit()}
    row = {**wanted, **facts, "unigram": unigram, "step_s": statistics.median(per_step), **machine}
    add_row(RESULTS, row)
    return row


def print_table() -> None:
    """Print what is recorded as Markdown."""
    rows = read_rows(RESULTS)
    for what in ("screen", "same steps", "same minutes"):
        print(f"\n{what}\n\n| optimizer | rate | steps | loss at [MASK] | seeds | seconds a step |")
        print("|---|---|---|---|---|---|")
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in rows:
            if row["what"] == what:
                groups.setdefault((row["optimizer"], row["lr"], row["steps"]), []).append(row)
        for (kind, lr, steps), of_group in groups.items():
            losses = [row["loss_mlm_masked"] for row in of_group]
            spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
            step_s = statistics.median(row["step_s"] for row in of_group)
            print(f"| {kind} | {lr} | {steps} | {statistics.mean(losses):.3f}{spread} | {len(losses)} | {step_s:.3f} |")


def _verb(name: str, *arguments: object) -> None:
    subprocess.run([sys.executable, str(ROOT / "bert_ds" / name), *map(str, arguments)], cwd=ROOT, check=True)


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


if __name__ == "__main__":
    main()
