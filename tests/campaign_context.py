"""A ModernBERT's context made longer: 1,024 tokens, then a second run of 8,192 with another global theta.

    python tests/campaign_context.py --text FOLDER --work FOLDER

A 3 x 128 ModernBERT with windows of 128, as in the two phases of ModernBERT-base: global theta 10,000 at 1,024 tokens,
160,000 at 8,192, from the weights of the first run. The second run is exported; its scores of every token of 8,192
tokens of text are compared with transformers'. Then one sequence of 1,024 to 8,192 tokens goes forward and back through
it, each in a process of its own: the memory that this takes at its peak, above what the process had before. Rows:
tests/results/context.jsonl, one for the runs and one for each length.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from campaign_rows import add_row

from bert_ds.corpus.text.documents import read_documents
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.encoder.pretrained import load_masked_lm
from bert_ds.reporting.run_log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests/results/context.jsonl"
LENGTHS = (1024, 2048, 4096, 8192)
TEXT_BYTES = 3_000_000
MODEL = {
    **{"type": "modernbert", "vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"intermediate_size": 192, "local_attention": 128, "initializer_range": 0.05},
}


def main() -> None:
    """Train twice, export, compare, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--measure", type=int, help="be the process that measures this length")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure is not None:
        print(json.dumps(peak_of(args.work, args.measure)))
        return
    prepare(args.text, args.work)
    short = trained(args.work, "short", length=1024, steps=12, examples=4, theta=10_000.0)
    settings = (f"init_from={args.work / 'short'}",)
    long = trained(args.work, "long", *settings, length=8192, steps=3, examples=2, theta=160_000.0)
    hf = args.work / "long/hf"
    if not hf.exists():
        verb("export_hf.py", "--run_dir", args.work / "long")
    facts = json.loads((hf / "config.json").read_text())
    assert (facts["max_position_embeddings"], facts["global_rope_theta"]) == (8192, 160_000.0)
    difference = difference_at(args.work, LENGTHS[-1])
    assert difference < 1e-4 and short[-1] < short[0] and long[0] < short[0]
    losses = {"first": short[0], "last_at_1024": short[-1], "first_at_8192": long[0], "last_at_8192": long[-1]}
    add_row(RESULTS, {"what": "two runs", "losses": losses, "difference_at_8192_tokens": difference})
    for length in LENGTHS:
        command = [sys.executable, __file__, "--text", args.text, "--work", args.work, "--measure", length]
        done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
        add_row(RESULTS, json.loads(done.stdout.splitlines()[-1]))


def prepare(text: Path, work: Path) -> None:
    """Make a corpus of the first documents of the text."""
    source = work / "text.txt"
    if not source.exists():
        work.mkdir(parents=True, exist_ok=True)
        documents, size = [], 0
        for document in read_documents([text]):
            documents.append(document.text)
            size += len(document.text.encode())
            if size > TEXT_BYTES:
                break
        source.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    if not (work / "tokenizer/vocab.txt").exists():
        verb("train_wordpiece.py", "--input", source, "--output", work / "tokenizer", "--vocab_size", 4096)
    if not (work / "shards/manifest.json").exists():
        places = ("--input", source, "--tokenizer", work / "tokenizer", "--output", work / "shards")
        verb("build_shards.py", *places, "--validation_fraction", 0.1)


def trained(work: Path, name: str, *settings: str, length: int, steps: int, examples: int, theta: float) -> list[float]:
    """Make a run, if it is not there, and return its losses."""
    run_dir = work / name
    if not (run_dir / "DONE").exists():
        model = {**MODEL, "max_position_embeddings": length, "global_rope_theta": theta}
        corpus = {
            "type": "shards",
            "sources": [{"path": str((work / "shards").resolve())}],
            "tokenizer": str((work / "tokenizer").resolve()),
        }
        changes = {
            **{"model": model, "corpus": corpus, "sequences.max_seq_length": length, "training.total_steps": steps},
            **{"training.train_batch_size": examples, "training.log_every_steps": 1, "schedule.warmup_steps": 2},
            **{"training.precision": "fp32", "evaluation.num_examples": 4, "evaluation.batch_size": 1},
        }
        words = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        recipe = ROOT / "ds_configs/recipes/modernbert_small.json"
        files = ("--run", recipe, "--deepspeed_config", ROOT / "ds_configs/zero2.json", "--run_dir", run_dir)
        verb("pretrain.py", *files, *(f"--set={word}" for word in (*words, *settings)))
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl")]


def packed(work: Path, length: int) -> dict[str, Any]:
    """Return so many pieces of the text as one sequence."""
    text = (work / "text.txt").read_text(encoding="utf-8")[: 10 * length]
    ids = load_tokenizer(work / "tokenizer").encode_sentences([text])[0][:length].astype(np.int64)
    assert len(ids) == length
    return {
        "input_ids_T": torch.from_numpy(ids),
        "token_type_ids_T": torch.zeros(length, dtype=torch.int64),
        "position_ids_T": torch.arange(length),
        "cu_seqlens": torch.tensor([0, length], dtype=torch.int32),
        "max_seqlen": length,
    }


@torch.no_grad()
def difference_at(work: Path, length: int) -> float:
    """Return the largest difference of any score from transformers', over the largest score."""
    batch = packed(work, length)
    found = load_masked_lm(work / "long/hf").logits(**batch, masked_positions_P=torch.arange(length)).mlm_PV
    theirs = transformers.ModernBertForMaskedLM.from_pretrained(work / "long/hf", dtype=torch.float32).eval()
    wanted = theirs(input_ids=batch["input_ids_T"][None]).logits[0]
    return float((found - wanted).abs().max() / wanted.abs().max())


def peak_of(work: Path, length: int) -> dict[str, Any]:
    """Return the memory of one forward and backward pass."""
    model, batch = load_masked_lm(work / "long/hf").train(), packed(work, length)
    places = torch.arange(0, length, 3)
    targets = {"masked_positions": places, "masked_labels": batch["input_ids_T"][places]}
    small = packed(work, 64)
    few = {"masked_positions": places[:8], "masked_labels": small["input_ids_T"][places[:8]]}
    model(**small, targets=few)[0].sum().backward()  # gradients and what torch sets up once
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    model(**batch, targets=targets)[0].sum().backward()
    peak = (_status("VmHWM") - before) / 1024
    return {
        "what": "memory",
        "tokens": length,
        "peak_MiB": round(peak),
        "KiB_per_token": round(1024 * peak / length, 1),
    }


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def verb(name: str, *arguments: object) -> None:
    subprocess.run([sys.executable, str(ROOT / "bert_ds" / name), *map(str, arguments)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
