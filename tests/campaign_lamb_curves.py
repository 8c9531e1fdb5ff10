"""Pre-train with exact LAMB at ZeRO 0, 1, 2 and 3 on two ranks, and say how far the loss curves lie apart.

    python tests/campaign_lamb_curves.py --text FOLDER --work FOLDER [--steps 60]

NVIDIA's LAMB recipe (batch by accumulation, clipping, polynomial decay after a long warm-up) scaled to a 2 x 128 BERT:
128 examples per step, 16 per micro-step, 4 micro-steps on each of two ranks, dropout on, fp32. Every stage is compared
with stage 0, where nothing is sharded. Results: tests/results/lamb_curves.jsonl (one line per stage: losses and trust
ratios) and lamb_curves.png; with another number of steps they are written to the work folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bert_ds.configuration.recipe.run_config import load_run_config
from bert_ds.reporting.run_log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "tests/campaign_lamb_curves.json"
NUM_STEPS, NUM_RANKS, MICRO_BATCH = 60, 2, 16


def main() -> None:
    """Run every stage that has no finished run folder yet, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    arguments = parser.parse_args()
    prepare(arguments.text, arguments.work)
    rows = [{"stage": stage, **train(arguments.work, stage, arguments.steps)} for stage in range(4)]
    folder = ROOT / "tests/results" if arguments.steps == NUM_STEPS else arguments.work
    folder.mkdir(exist_ok=True)
    (folder / "lamb_curves.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw(rows, folder / "lamb_curves.png")
    for row in rows:
        apart = max(abs(a - b) / b for a, b in zip(row["losses"], rows[0]["losses"], strict=True))
        print(f"stage {row['stage']}: at most {apart:.1e} relative from stage 0, last loss {row['losses'][-1]:.6f}")


def prepare(text: Path, work: Path) -> None:
    """Train the tokenizer and build the shards once."""
    tokenizer, shards = work / "tokenizer", work / "shards"
    if not (tokenizer / "vocab.txt").exists():
        vocab_size = load_run_config(RECIPE, corpus(work)).model.vocab_size
        _python("bert_ds/train_wordpiece.py", "--input", text, "--output", tokenizer, "--vocab_size", vocab_size)
    if not (shards / "manifest.json").exists():
        places = ("--input", text, "--tokenizer", tokenizer, "--output", shards)
        _python("bert_ds/build_shards.py", *places, "--validation_fraction", 0.03)


def corpus(work: Path) -> list[str]:
    """Return the overrides that point the recipe at the work folder."""
    return [
        f"corpus.tokenizer={(work / 'tokenizer').resolve()}",
        f"corpus.sources.0.path={(work / 'shards').resolve()}",
    ]


def train(work: Path, stage: int, num_steps: int) -> dict[str, Any]:
    """Return losses and trust ratios of one run."""
    run_dir = work / f"{num_steps}-steps-stage{stage}"
    if not (run_dir / "DONE").exists():
        overrides = [*corpus(work), f"training.total_steps={num_steps}"]
        settings = json.loads((ROOT / f"ds_configs/zero{stage}.json").read_text())
        deepspeed_config = work / f"lamb-zero{stage}.json"
        deepspeed_config.write_text(json.dumps({**settings, "train_micro_batch_size_per_gpu": MICRO_BATCH}))
        _python(
            "-m", "deepspeed.launcher.runner", "--num_gpus", NUM_RANKS, ROOT / "bert_ds/pretrain.py",
            "--run", RECIPE, "--deepspeed_config", deepspeed_config,
            "--run_dir", run_dir, "--resume", "auto", *(f"--set={one}" for one in overrides),
        )  # fmt: skip
    logged = read_metrics(run_dir / "metrics.jsonl")
    median_of = {kind: [row["trust"][kind]["trust_ratio"]["median"] for row in logged] for kind in logged[0]["trust"]}
    return {"losses": [row["loss"] for row in logged], "median_trust_ratios": median_of}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss of all stages, and the trust ratios of the last."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, ratios) = plt.subplots(1, 2, figsize=(12, 4.5))
    for row in rows:
        steps = range(1, len(row["losses"]) + 1)
        losses.plot(steps, row["losses"], label=f"ZeRO {row['stage']}", linewidth=7 - 2 * row["stage"], alpha=0.6)
    for kind, values in rows[-1]["median_trust_ratios"].items():
        if set(values) != {1.0}:  # tensors without decay keep their rate
            ratios.plot(steps, values, label=kind.removeprefix("bert."))
    losses.set(xlabel="step", ylabel="loss (nats)", title=f"exact LAMB on {NUM_RANKS} ranks")
    ratios.set(xlabel="step", ylabel="trust ratio (median over layers)", yscale="log", title="ZeRO 3")
    for axis in (losses, ratios):
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _python(*arguments: object) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
