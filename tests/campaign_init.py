"""What `bert-ds init` chooses and predicts beside what happens: minutes, steps, and the loss of the neighbours in size.

    python tests/campaign_init.py --text FOLDER --work FOLDER

For 5 and 10 minutes: the recipe that `init` writes for the cores here, and the same with the next smaller and the next
larger size. Each is trained and judged by its own evaluation at [MASK]. Rows: tests/results/init.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from campaign_rows import add_row, read_rows

from bert_ds.configuration.deepspeed_file.ds_config import load_ds_config
from bert_ds.configuration.run_choice import SIZES, Choice, choose, modern_model
from bert_ds.init import cpu_measure, given_sections, write_recipe
from bert_ds.launch.verb_arguments import init_arguments
from bert_ds.reporting.run_log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests/results/init.jsonl"
MINUTES = (5.0, 10.0)


def main() -> None:
    """Train what has no row yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    shards, tokenizer = args.work / "shards", args.work / "tokenizer"
    if not (tokenizer / "vocab.txt").exists():
        verb("train_wordpiece", "--input", args.text, "--output", tokenizer, "--vocab_size", 8192)
    if not (shards / "manifest.json").exists():
        places = ("--input", args.text, "--tokenizer", tokenizer, "--output", shards)
        verb("build_shards", *places, "--validation_fraction", 0.03)
    for minutes in MINUTES:
        own = choice_of(args.work, minutes)
        place = next(i for i, size in enumerate(SIZES) if size[:2] == shape(own))
        for step, name in ((0, "chosen"), (-1, "smaller"), (1, "larger")):
            if place + step >= 0 and not any(row["name"] == name and row["minutes"] == minutes for row in rows()):
                found = own if not step else choice_of(args.work, minutes, SIZES[place + step])
                add_row(RESULTS, {"name": name, "minutes": minutes, **trained(args.work, name, found)})


def choice_of(work: Path, minutes: float, size: tuple[int, int, int] | None = None) -> Choice:
    """Return what init chooses, or what it would make of a size."""
    words = [str(work / f"{minutes:g}.json"), "--corpus", str(work / "shards"), "--minutes", str(minutes)]
    base = given_sections(init_arguments(words))
    if size is not None:
        base["model"] |= modern_model(size, tokens=0)
    return choose(base, load_ds_config("zero1"), minutes=minutes, measure=cpu_measure(), world_size=1)


def trained(work: Path, name: str, choice: Choice) -> dict[str, object]:
    """Train a recipe; return what was predicted of it and what happened."""
    minutes = choice.plan.run.training.max_minutes
    recipe, run_dir = work / f"{name}-{minutes:g}.json", work / f"runs/{name}-{minutes:g}"
    write_recipe(recipe, choice)
    begun = time.perf_counter()
    verb("pretrain", "--run", recipe, "--run_dir", run_dir)
    wall = (time.perf_counter() - begun) / 60
    last = list(read_metrics(run_dir / "metrics.jsonl", "evaluation"))[-1]
    return {
        "size": shape(choice),
        "predicted_steps": choice.num_steps,
        "steps": last["step"],
        "real_minutes": round(wall, 2),
        "loss": last["loss_mlm_masked"],
        "cores": os.cpu_count(),
        "precision": json.loads((run_dir / "run_config.json").read_bytes())["training"]["precision"],
    }


def shape(choice: Choice) -> tuple[int, int]:
    """Return layers and hidden size."""
    model = choice.plan.run.model
    return (model.num_hidden_layers, model.hidden_size)


def rows() -> list[dict[str, object]]:
    """Return what is recorded."""
    return read_rows(RESULTS)


def verb(name: str, *arguments: object) -> None:
    """Run a verb."""
    subprocess.run([sys.executable, str(ROOT / f"bert_ds/{name}.py"), *map(str, arguments)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
