"""Score a Hugging Face folder on a task without training: metrics and predictions.

    python bert_ds/score.py --model runs/sst2/hf --task sst2 --data DATA
    python bert_ds/score.py --model runs/mine/hf --task blimp --data DATA
    python bert_ds/score.py --model ANY --task masked_words --data TEXT
    deepspeed bert_ds/score.py --model DIR --task mine.json --side test --output scores

A fine-tuned task takes any folder of its architecture. Prompts, minimal pairs and word similarity take a pre-trained
folder with its masked-word head, and run on one rank. So does masked_words, of any family that transformers opens: TEXT
is a file or folder of text, or of shards; the unigram cross-entropy wants the training text, or shards, beside it:
--set 'data.train=[{"path": "TRAIN", "format": "text"}]'. A retrieval takes any folder, pre-trained or of sentence
vectors, and has BM25 beside it. Exit codes: 0 done, 2 configuration, 3 data, 4 checkpoint.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

# First of all: a rank may end in the imports below, and the others would wait for it.
from bert_ds.launch.start_watch import watch_start

if __name__ == "__main__":
    watch_start()

from bert_ds.launch.command_line import answer_early, run_main
from bert_ds.launch.launch_checks import checked_scoring
from bert_ds.launch.verb_arguments import score_arguments

if __name__ == "__main__":
    answer_early(lambda: checked_scoring(score_arguments()))

# Nothing here may reach for the network; transformers reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from bert_ds.basics.ranks import DataError, Ranks, read_ranks
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.configuration.task.task_kinds import KIND_FACTS
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.downstream.kinds.table import KINDS, UNTRAINED
from bert_ds.downstream.scores.metrics import require_metrics
from bert_ds.downstream.tuning.outcome import (
    measure_side,
    part_figures,
    row_counts,
    write_predictions,
    write_results,
    write_side,
)
from bert_ds.downstream.tuning.retrieval import score_retrieval
from bert_ds.downstream.tuning.task_folder import read_task_folder, tokenizer_folder
from bert_ds.downstream.tuning.task_rows import read_task
from bert_ds.downstream.untrained.masked_words import score_masked_words
from bert_ds.encoder.pretrained import check_tokenizer, load_masked_lm
from bert_ds.folders.output_folders import open_results_folder
from bert_ds.training.agreement import on_main_rank
from bert_ds.training.launch.process_group import joined_ranks


def main() -> None:
    args = score_arguments()
    task = checked_scoring(args)
    require_metrics()
    ranks = read_ranks()
    if not KIND_FACTS[task.kind].is_trained:
        return score_untrained(task, args, ranks)
    with joined_ranks(ranks):
        score_fine_tuned(task, args, ranks)


def score_untrained(task: TaskConfig, args: argparse.Namespace, ranks: Ranks) -> None:
    """Score a pre-trained folder as it is."""
    if ranks.world_size > 1 or args.side != "validation":
        raise ConfigError(f"a {task.kind} task is scored on its validation rows by one rank; found {args.side} rows")
    if args.output is not None:
        open_results_folder(args.output)
    if task.kind == "masked_words":
        return report(task, args, {args.side: score_masked_words(args.model, task, print)}, facts={})
    tokenizer = load_tokenizer(args.model)
    check_tokenizer(args.model, **tokenizer.identity)
    if task.kind == "retrieval":
        found = score_retrieval(args.model, tokenizer, task, print)
    else:
        model = load_masked_lm(args.model, kernels=task.training.kernels)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        found = UNTRAINED[task.kind](model, tokenizer, task, print)
    if args.output is not None:
        write_predictions(args.output, args.side, found.files)
    report(task, args, {args.side: found.figures, **found.parts}, facts=found.facts)


def score_fine_tuned(task: TaskConfig, args: argparse.Namespace, ranks: Ranks) -> None:
    """Read model and rows, predict, measure, write; a collective."""
    if args.output is not None:
        on_main_rank(lambda: open_results_folder(args.output))
    kind = KINDS[task.kind]
    model, labels = read_task_folder(args.model, kind, kernels=task.training.kernels)
    folder = tokenizer_folder(args.model, kind)
    tokenizer = load_tokenizer(folder)
    check_tokenizer(folder, **tokenizer.identity)
    rows = read_task(task, tokenizer, labels=labels, say=print if ranks.is_main else lambda text: None)
    side = {"train": rows.train, "validation": rows.validation, "test": rows.test}[args.side]
    if side is None:
        raise DataError(f"task {task.name} has no test rows: wanted data.test, or another --side")
    found = measure_side(model.to("cuda" if torch.cuda.is_available() else "cpu"), task, side, labels)
    if args.output is not None:
        on_main_rank(lambda: write_side(args.output, args.side, task, side, found))
    figures = part_figures(args.side, task, side, found, labels)
    on_main_rank(lambda: report(task, args, figures, facts=row_counts(rows)))


def report(
    task: TaskConfig, args: argparse.Namespace, figures: Mapping[str, Mapping[str, float]], *, facts: Mapping[str, Any]
) -> None:
    """Print the figures of the side and its parts, and write them with the facts into results.json in --output."""
    if args.output is not None:
        results = {"task": task.name, "metric": task.chosen_metric, **facts, **figures}
        write_results(args.output, results)
    for part, values in figures.items():
        print(f"{task.name}, {part}: " + "  ".join(f"{name} {shown(value)}" for name, value in values.items()))


def shown(value: float) -> str:
    """Return a figure with four digits, a count with none."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


if __name__ == "__main__":
    run_main(main, leave_at_once=True)
