"""What `training.few_shapes` costs and gives on a text: the share that is filled up, and the shapes that are left.

    python tests/campaign_few_shapes.py --text FOLDER --work FOLDER
    python tests/campaign_few_shapes.py --text FOLDER --work FOLDER --speed 3

Sequences of 128 and of 512 tokens, with and without sentence pairs, in micro-batches of at most 16,384 tokens and of
65,536: 400 micro-batches of each as the loader makes them. Shapes are counted by (T, N), which a layer sees, by P,
which the word head sees, and as they are without filling. With --speed a 4 x 256 BERT in bf16 and in fp32 trains for
120 steps on a CPU with and without, in turns, so many times each: tokens a second of the last 60 and peak memory.
Rows: tests/results/few_shapes.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from campaign_rows import add_row

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.configuration.recipe.run_config import MaskingConfig, SequenceConfig
from bert_ds.corpus.batches.batch_stages import DataSettings
from bert_ds.corpus.batches.loader import PretrainingData, Source
from bert_ds.reporting.run_log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests/results/few_shapes.jsonl"
NUM_BATCHES = 400
ACCUMULATION = 4
MODEL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}


def main() -> None:
    """Make a corpus, count shapes, and with --speed train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--speed", type=int, default=0, metavar="TURNS", help="train in turns instead")
    args = parser.parse_args()
    prepare(args.text, args.work)
    if args.speed:
        for precision in ("bf16", "fp32"):
            add_row(RESULTS, speed(args.work, precision, args.speed))
        return
    for length in (128, 512):
        for pair in ("none", "nsp"):
            for tokens in (16_384, 65_536):
                add_row(RESULTS, shapes(args.work, length, pair, tokens))


def prepare(text: Path, work: Path) -> None:
    """Make tokenizer and shards of the text, unless they are there."""
    if not (work / "tokenizer/vocab.txt").exists():
        verb("train_wordpiece.py", "--input", text, "--output", work / "tokenizer", "--vocab_size", 8192)
    if not (work / "shards/manifest.json").exists():
        verb("build_shards.py", "--input", text, "--tokenizer", work / "tokenizer", "--output", work / "shards")


def shapes(work: Path, length: int, pair: str, tokens: int) -> dict[str, Any]:
    """Count the shapes of micro-batches of at most so many tokens."""
    found: Counter[str] = Counter()
    seen: dict[str, set[tuple[int, ...]]] = {"exact": set(), "layer": set(), "words": set(), "all": set()}
    for batch in micro_batches(work, length, pair, tokens):
        filling, size = batch.fillings, len(batch.input_ids_T)
        layer, words = (size, len(batch.cu_seqlens) - 1), len(batch.targets["masked_labels"])
        seen["layer"].add(layer)
        seen["words"].add((words,))
        seen["all"].add((*layer, words))
        seen["exact"].add((batch.num_tokens, batch.num_sequences, words - filling.words))
        found.update(tokens=size, fillings=filling.tokens, words=words, word_fillings=filling.words)
    return {
        **{"what": "shapes", "length": length, "sentence_pair": pair, "tokens_at_most": tokens},
        **{"micro_batches": NUM_BATCHES, "shapes": {name: len(each) for name, each in seen.items()}},
        "filling_share": round(found["fillings"] / found["tokens"], 4),
        "filling_share_of_words": round(found["word_fillings"] / found["words"], 4),
    }


def micro_batches(work: Path, length: int, pair: str, tokens: int) -> Iterator[MicroBatch]:
    """Yield what the loader makes for one rank."""
    split = BatchSplit(tokens // length, ACCUMULATION, 1)
    sequences = SequenceConfig.model_validate({"max_seq_length": length, "sentence_pair": pair})
    settings = DataSettings(sequences, MaskingConfig(), 0, split.train_batch_size, few_shapes=True)
    data = PretrainingData([Source(work / "shards", "text")], work / "tokenizer", settings=settings)
    for step in range(NUM_BATCHES // ACCUMULATION):
        yield from data.rank_batches(step, rank=0, split=split)


def speed(work: Path, precision: str, turns: int) -> dict[str, Any]:
    """Train with and without in turns."""
    found: dict[str, list[tuple[float, float]]] = {"exact": [], "few": []}
    for turn in range(turns):
        for name in found if turn % 2 == 0 else reversed(found):
            found[name].append(trained(work, f"{precision}-{name}-{turn}", precision, few=name == "few"))
    rates, peaks = ({name: [each[i] for each in runs] for name, runs in found.items()} for i in (0, 1))
    pairs = zip(rates["few"], rates["exact"], strict=True)
    return {
        **{"what": "speed", "precision": precision, "model": "4 x 256", "threads": os.cpu_count()},
        **{"tokens_per_s": rates, "peak_gib": peaks},
        "few_over_exact": round(statistics.median(few / exact for few, exact in pairs), 4),
    }


def trained(work: Path, name: str, precision: str, *, few: bool) -> tuple[float, float]:
    """Make a run and return its tokens a second in the second half, and GiB at its peak."""
    run_dir, corpus = work / "runs" / name, work.resolve()
    sources = [{"path": str(corpus / "shards")}]
    recipe = {
        **{"name": "few-shapes", "model": MODEL, "sequences": {"max_seq_length": 128, "sentence_pair": "none"}},
        "corpus": {"type": "shards", "sources": sources, "tokenizer": str(corpus / "tokenizer")},
        **{"optimizer": {"type": "adamw", "lr": 1e-4}, "schedule": {"type": "linear", "warmup_steps": 10}},
        "training": {"total_steps": 120, "log_every_steps": 60, "train_batch_size": 32, "few_shapes": few},
        "evaluation": {"num_examples": 32},
    }
    recipe["training"]["precision"] = precision
    path = work / f"{name}.json"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    files = ("--run", path, "--deepspeed_config", ROOT / "ds_configs/zero0.json", "--run_dir", run_dir)
    peak = verb("pretrain.py", *files)
    return read_metrics(run_dir / "metrics.jsonl")[-1]["tokens_per_s"], round(peak / 2**30, 2)


def verb(name: str, *words: object) -> int:
    """Run a verb, which has to succeed, and return the bytes of its peak."""
    process = subprocess.Popen([sys.executable, str(ROOT / "bert_ds" / name), *map(str, words)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}")
    return usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
