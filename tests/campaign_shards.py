"""Measure the way from text to batches: speed beside bare tokenizers, memory against corpus size, bytes, loader speed.

    python tests/campaign_shards.py --text FOLDER --work FOLDER

1. MB of text per second and core: the whole `build_shards` (read, split sentences, encode, hash, write) against bare
   `tokenizers` `encode_batch` of the same documents, one process and one thread each, five times in turn.
2. Peak memory of the builder on the corpus once and four times over (largest of all its processes).
3. Bytes per token on disk.
4. Batches and tokens per second of one loader process, on the corpus once and four times over.

Prints what it has measured and writes it into tests/results/shards.json, beside that of other vocabulary sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.configuration.recipe.run_config import MaskingConfig, SequenceConfig
from bert_ds.corpus.batches.batch_stages import DataSettings
from bert_ds.corpus.batches.loader import PretrainingData, Source
from bert_ds.corpus.text.documents import read_documents
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests/results/shards.json"
ROUNDS = 5


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--vocab_size", type=int, default=8192)
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = work / "tokenizer"
    if not tokenizer.exists():
        _python(
            "train_wordpiece", "--input", arguments.text, "--output", tokenizer, "--vocab_size", arguments.vocab_size
        )
    once = [path for path in sorted(arguments.text.rglob("*.txt"))]
    four = four_times(once, work / "four")
    size = sum(path.stat().st_size for path in once)
    results: dict[str, Any] = {"corpus_bytes": size, "vocab_size": arguments.vocab_size}
    results |= compare_with_tokenizers(once, tokenizer, work, size)
    for name, paths in (("once", once), ("four_times", four)):
        shards = work / f"shards-{name}"
        shutil.rmtree(shards, ignore_errors=True)
        results[name] = {"peak_bytes": build(paths, tokenizer, shards)[1], **disk_and_loader(shards, tokenizer)}
    RESULTS.parent.mkdir(exist_ok=True)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**known, str(arguments.vocab_size): results}, indent=2) + "\n")
    print(json.dumps(results, indent=2))


def four_times(paths: list[Path], folder: Path) -> list[Path]:
    """Return four copies of every file."""
    folder.mkdir(exist_ok=True)
    copies = []
    for number in range(4):
        for path in paths:
            copy = folder / f"{number}-{path.name}"
            if not copy.exists():
                shutil.copyfile(path, copy)
            copies.append(copy)
    return copies


def compare_with_tokenizers(paths: list[Path], tokenizer: Path, work: Path, size: int) -> dict[str, Any]:
    """Return MB/s of both, in turn, and the median of the ratios."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    backend = load_tokenizer(tokenizer).backend
    texts = [document.text for document in read_documents(paths)]
    characters = sum(len(text.encode()) for text in texts)
    ours, bare = [], []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        for start in range(0, len(texts), 64):
            backend.encode_batch(texts[start : start + 64], add_special_tokens=False)
        bare.append(characters / 1e6 / (time.perf_counter() - begun))
        shards = work / "shards-timed"
        shutil.rmtree(shards, ignore_errors=True)
        ours.append(size / 1e6 / build(paths, tokenizer, shards)[0])
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    return {
        "build_mb_per_s": statistics.median(ours),
        "encode_batch_mb_per_s": statistics.median(bare),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def build(paths: list[Path], tokenizer: Path, shards: Path) -> tuple[float, int]:
    """Return the seconds of one build, start-up included, and the peak memory of its largest process in bytes."""
    script = ROOT / "bert_ds/build_shards.py"
    places = ["--input", *paths, "--tokenizer", tokenizer, "--output", shards, "--validation_fraction", 0.03]
    # A process starts with the peak of the one that forked it: a small one in between keeps ours out of the figure.
    between = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", between, sys.executable, script, *places, "--workers", 1]
    begun = time.perf_counter()
    done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    return time.perf_counter() - begun, int(done.stdout) * 1024


def disk_and_loader(shards: Path, tokenizer: Path) -> dict[str, Any]:
    """Return bytes per token, and the speed of `step_batches` with one worker at length 128 and 64 examples."""
    manifest = json.loads((shards / "manifest.json").read_text())
    num_tokens = sum(split["num_tokens"] for split in manifest["splits"].values())
    num_bytes = sum(path.stat().st_size for path in shards.rglob("*") if path.is_file())
    settings = DataSettings(SequenceConfig(), MaskingConfig(), seed=1, train_batch_size=64)
    data = PretrainingData([Source(shards, "text")], tokenizer, settings=settings)
    batches = data.step_batches(0, rank=0, split=BatchSplit(64, 1, 1), num_workers=1)
    for _ in range(20):
        next(batches)
    begun, tokens, num_batches = time.perf_counter(), 0, 1000
    for _ in range(num_batches):
        tokens += sum(batch.num_tokens for batch in next(batches))
    seconds = time.perf_counter() - begun
    return {
        "num_tokens": num_tokens,
        "bytes_per_token": num_bytes / num_tokens,
        "loader_batches_per_s": num_batches / seconds,
        "loader_tokens_per_s": tokens / seconds,
        "loader_process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _python(verb: str, *arguments: object) -> None:
    subprocess.run([sys.executable, str(ROOT / f"bert_ds/{verb}.py"), *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
