"""Train the same run at ZeRO 0, 1, 2 and 3, on one rank and on two, and say how far the loss curves lie apart.

    python tests/campaign_zero_curves.py --text FOLDER --work FOLDER

60 steps of a 2 x 128 BERT with next-sentence prediction, two micro-steps per rank, fp32 and bf16. The curves are
compared with stage 0 on one rank in the same precision. Results: tests/results/zero_curves.jsonl (one line per run) and
zero_curves.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from bert_ds.reporting.run_log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests/results/zero_curves.jsonl"
VOCAB_SIZE = 8192


def main() -> None:
    """Run every combination that has no finished run folder yet, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    prepare(arguments.text, arguments.work)
    rows = []
    for precision in ("fp32", "bf16"):
        for ranks in (1, 2):
            for stage in range(4):
                losses = train(arguments.work, precision, ranks, stage)
                rows.append({"precision": precision, "ranks": ranks, "stage": stage, "losses": losses})
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        reference = next(
            r["losses"] for r in rows if (r["precision"], r["ranks"], r["stage"]) == (row["precision"], 1, 0)
        )
        apart = max(abs(a - b) / b for a, b in zip(row["losses"], reference, strict=True))
        print(
            f"{row['precision']} stage {row['stage']} on {row['ranks']} ranks: at most {apart:.1e} relative, "
            f"last loss {row['losses'][-1]:.6f}"
        )
    draw(rows)


def prepare(text: Path, work: Path) -> None:
    """Train the tokenizer and build the shards once."""
    tokenizer, shards = work / "tokenizer", work / "shards"
    if not (tokenizer / "vocab.txt").exists():
        _python("bert_ds/train_wordpiece.py", "--input", text, "--output", tokenizer, "--vocab_size", VOCAB_SIZE)
    if not (shards / "manifest.json").exists():
        places = ("--input", text, "--tokenizer", tokenizer, "--output", shards)
        _python("bert_ds/build_shards.py", *places, "--validation_fraction", 0.03)


def train(work: Path, precision: str, ranks: int, stage: int) -> list[float]:
    """Return the 60 losses of one run."""
    run_dir = work / f"{precision}-{ranks}x-stage{stage}"
    if not (run_dir / "DONE").exists():
        settings = {
            "corpus.tokenizer": (work / "tokenizer").resolve(),
            "corpus.sources.0.path": (work / "shards").resolve(),
            "training.precision": precision,
        }
        overrides = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        deepspeed_config = work / f"zero{stage}-{ranks}.json"
        content = json.loads((ROOT / f"ds_configs/zero{stage}.json").read_text())
        content["train_micro_batch_size_per_gpu"] = 16 // ranks
        deepspeed_config.write_text(json.dumps(content))
        _python(
            "-m", "deepspeed.launcher.runner", "--num_gpus", ranks, ROOT / "bert_ds/pretrain.py",
            "--run", ROOT / "tests/campaign_zero_curves.json", "--deepspeed_config", deepspeed_config,
            "--run_dir", run_dir, *overrides,
        )  # fmt: skip
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl")]


def draw(rows: list[dict]) -> None:
    """Draw all curves of a precision into one panel."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, precision in zip(axes, ("fp32", "bf16"), strict=True):
        for row in (row for row in rows if row["precision"] == precision):
            style = {"linewidth": 6 - 1.5 * row["stage"] if row["ranks"] == 1 else 1, "alpha": 0.5}
            axis.plot(row["losses"], label=f"stage {row['stage']}, {row['ranks']} ranks", **style)
        axis.set_title(precision)
        axis.set_xlabel("step")
    axes[0].set_ylabel("loss (nats)")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120)


def _python(*arguments: object) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
