"""Rows per second of `bert_ds.load_predictor` and of a transformers pipeline on the same folder and texts, in turns.

    python tests/campaign_predict.py --data FOLDER --work FOLDER

FOLDER holds sst2. A classifier of 4 layers of 256 with random weights, fp32, batches of 32 on all cores; one process,
each in turn, five times. The pipeline batches rows in the order in which they come, padded to the longest; a second
one is given them sorted by length. A row in tests/results/predict.jsonl: medians and the ratios of each turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from campaign_rows import add_row

import bert_ds
from bert_ds.configuration.families.modernbert import ModernBertConfig
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.corpus.tokenizer.wordpiece_training import train_wordpiece
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.tuning.task_folder import TaskFacts, make_task_model, write_task_folder

RESULTS = Path(__file__).resolve().parents[1] / "tests/results/predict.jsonl"
TURNS, ROWS = 5, 1000


def main() -> None:
    """Make the folder, take turns, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    texts = [line.split("\t")[0] for line in (args.data / "sst2/train.tsv").read_text().splitlines()[1:]]
    if not (args.work / "hf").exists():
        write_folder(args.work, texts)
    texts = texts[:ROWS]
    predict = bert_ds.load_predictor(args.work / "hf")
    pipeline = transformers.pipeline("text-classification", model=str(args.work / "hf"), device="cpu")
    by_length = sorted(texts, key=len)
    ways: dict[str, Callable[[], object]] = {
        "load_predictor": lambda: predict(texts),
        "pipeline": lambda: pipeline(texts, batch_size=32, truncation=True),
        "pipeline, sorted": lambda: pipeline(by_length, batch_size=32, truncation=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TURNS + 1):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - begun)
    ours = seconds["load_predictor"]
    ratios = {
        name: [round(other / own, 2) for own, other in zip(ours, of_way, strict=True)]
        for name, of_way in seconds.items()
        if of_way is not ours
    }
    speeds = {name: round(ROWS / statistics.median(of_way)) for name, of_way in seconds.items()}
    facts = {"cores": os.cpu_count(), "torch": torch.__version__, "transformers": transformers.__version__}
    add_row(RESULTS, {"rows_per_s": speeds, "times_as_fast": ratios, "load": os.getloadavg()[0], **facts})


def write_folder(work: Path, texts: list[str]) -> None:
    """Write a classifier that has learned nothing."""
    work.mkdir(parents=True, exist_ok=True)
    train_wordpiece(texts[:20_000], vocab_size=4096, lowercase=True, output=work / "tokenizer")
    tokenizer = load_tokenizer(work / "tokenizer")
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 640}
    config = ModernBertConfig(vocab_size=tokenizer.vocab_size, **sizes, max_position_embeddings=128)
    labels = {"label": ("0", "1")}
    model = make_task_model(KINDS["classification"], config, labels, kernels="torch")
    facts = TaskFacts("sst2", "classification", labels, tokenizer.fingerprint, 128, {})
    write_task_folder(work / "hf", model.eval(), facts=facts, tokenizer=work / "tokenizer")


if __name__ == "__main__":
    main()
