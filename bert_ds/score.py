"""Score a Hugging Face folder on a task without training: figures and predictions.

    python bert_ds/score.py --task sst2 --data DATA --model runs/sst2/hf     a fine-tuned model, on its validation rows
    python bert_ds/score.py --task blimp --data DATA --model runs/mine/hf    a pre-trained one: grammar, words, prompts

Figures are printed and written to OUTPUT/results.json, predictions in the form of their task beside them.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# Nothing here may reach for the network; transformers reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from bert_ds.command_line import make_parser, run_main
from bert_ds.corpus.wordpiece import load_tokenizer
from bert_ds.downstream.kinds import KINDS
from bert_ds.downstream.outcome import measure_side, write_side
from bert_ds.downstream.task_folder import read_task_folder
from bert_ds.downstream.task_rows import read_task
from bert_ds.downstream.untrained import UNTRAINED
from bert_ds.encoder.pretrained import check_tokenizer, load_masked_lm
from bert_ds.ranks import Ranks
from bert_ds.run_log import write_json
from bert_ds.task_config import TaskConfig, load_task
from bert_ds.training.process_group import joined_ranks


def main() -> None:
    args = parse_arguments()
    task = load_task(args.task, args.set, data=args.data)
    output: Path = args.output or Path("runs") / f"{task.name}-score"
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(args.model)
    check_tokenizer(args.model, vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if task.kind in UNTRAINED:
        model = load_masked_lm(args.model, kernels=task.training.kernels).to(device)
        found = UNTRAINED[task.kind](model, tokenizer, task, print)
        for name, text in found.files.items():
            (output / name).write_text(text, encoding="utf-8")
        figures = {"validation": found.figures}
    else:
        figures = score_fine_tuned(task, args.model, output, device=device)
    write_json(output / "results.json", {"task": task.name, **figures})
    for side, values in figures.items():
        for name, value in values.items():
            print(f"{side} {name}: {value:.4f}")


def parse_arguments() -> argparse.Namespace:
    parser = make_parser("Score a Hugging Face folder on a task without training.")
    parser.add_argument("--task", required=True, help="task file, or the name of a shipped task")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder, fine-tuned or pre-trained")
    parser.add_argument("--data", type=Path, help="folder of the data files (default: that of the task file)")
    parser.add_argument("--output", type=Path, help="folder of results and predictions (default: runs/NAME-score)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one setting")
    return parser.parse_args()


def score_fine_tuned(task: TaskConfig, folder: Path, output: Path, *, device: str) -> dict[str, dict[str, float]]:
    """Predict and measure the validation and test rows; returns figures by side."""
    model, labels = read_task_folder(folder, KINDS[task.kind], kernels=task.training.kernels)
    rows = read_task(task, load_tokenizer(folder), labels=labels, say=print)
    sides = {"validation": rows.validation, **({"test": rows.test} if rows.test else {})}
    figures = {}
    with joined_ranks(Ranks(0, 0, 1)):
        for name, side in sides.items():
            found = measure_side(model.to(device), task, side, labels)
            write_side(output, name, task, side, found)
            figures[name] = found.figures
    return figures


if __name__ == "__main__":
    run_main(main)
