"""How long one call of a fine-tuned classifier takes: transformers, ONNX Runtime, ONNX Runtime with int8 matrices.

    python tests/campaign_latency.py --work FOLDER [--calls N]

A BERT of 6 layers of 384 with random weights (the shape of MiniLM-L6), sequences of 64 tokens, batches of 1 and of 32,
all cores, one process, the three in turns at every call. A row a way and a batch in tests/results/latency.jsonl: p50
and p99 of the calls in milliseconds, tokenisation not counted, and how many times as fast as transformers, the median
over the turns: on a machine that does other things too, that alone says something.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import onnxruntime
import torch
import transformers
from campaign_rows import add_row

from bert_ds.configuration.families.bert import BertConfig
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.corpus.tokenizer.wordpiece import SPECIAL_PIECES, TextRules, WordPieceTokenizer
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.tuning.task_folder import TaskFacts, make_task_model, write_task_folder
from bert_ds.encoder.hf_onnx import ONNX_FILE, quantise, write_onnx

RESULTS = Path(__file__).resolve().parents[1] / "tests/results/latency.jsonl"
PIECES, TOKENS, BATCHES = 8192, 64, (1, 32)
SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


def main() -> None:
    """Make the folders, take turns, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--calls", type=int, default=200, help="of a batch of 1; of 32 a quarter (default %(default)s)")
    args = parser.parse_args()
    if not (args.work / "int8" / ONNX_FILE).exists():
        write_folders(args.work)
    ways = opened(args.work)
    facts = {"cores": os.cpu_count(), "tokens": TOKENS, "onnxruntime": onnxruntime.__version__}
    facts |= {"torch": torch.__version__, "transformers": transformers.__version__}
    for batch in BATCHES:
        ids = np.random.default_rng(0).integers(len(SPECIAL_PIECES), PIECES, (batch, TOKENS))
        num_calls = args.calls if batch == 1 else args.calls // 4
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for call in range(num_calls + 3):
            for name, way in ways.items():
                begun = time.perf_counter()
                way(ids)
                if call >= 3:  # the first ones warm up
                    seconds[name].append(time.perf_counter() - begun)
        for name, of_way in seconds.items():
            p50, p99 = np.percentile(of_way, (50, 99)) * 1000
            row = {"way": name, "batch": batch, "p50_ms": round(p50, 2), "p99_ms": round(p99, 2), "calls": num_calls}
            row["times_as_fast"] = round(float(np.median(np.divide(seconds["transformers fp32"], of_way))), 2)
            size = sum(path.stat().st_size for path in (args.work / name.split()[-1]).glob("model.*"))
            add_row(RESULTS, {**row, "mb": round(size / 1e6, 1), "load": os.getloadavg()[0], **facts})


def write_folders(work: Path) -> None:
    """Write a classifier that has learned nothing, as fp32/, onnx/ and int8/."""
    work.mkdir(parents=True, exist_ok=True)
    pieces = [*SPECIAL_PIECES, *(f"w{number}" for number in range(PIECES - len(SPECIAL_PIECES)))]
    WordPieceTokenizer(pieces, TextRules()).save(work / "tokenizer")
    config = BertConfig(vocab_size=PIECES, **SIZES, max_position_embeddings=128)
    labels = {"label": ("0", "1")}
    model = make_task_model(KINDS["classification"], config, labels, kernels="torch")
    facts = TaskFacts("latency", "classification", labels, load_tokenizer(work / "tokenizer").fingerprint, 128, {})
    write_task_folder(work / "fp32", model.eval(), facts=facts, tokenizer=work / "tokenizer")
    for name in ("onnx", "int8"):
        (work / name).mkdir(exist_ok=True)
        write_onnx(work / "fp32", work / name)
    quantise(work / "int8" / ONNX_FILE)


def opened(work: Path) -> dict[str, Callable[[np.ndarray], object]]:
    """Return what computes scores of ids, int64 [N, tokens], by the name of the way; its last word is the folder's."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(work / "fp32").eval()

    @torch.inference_mode()
    def plain(ids: np.ndarray) -> object:
        given = torch.from_numpy(ids)
        return model(input_ids=given, attention_mask=torch.ones_like(given)).logits

    def session(name: str) -> Callable[[np.ndarray], object]:
        opened = onnxruntime.InferenceSession(str(work / name / ONNX_FILE), providers=["CPUExecutionProvider"])
        return lambda ids: opened.run(
            ["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        )

    return {"transformers fp32": plain, "ONNX Runtime onnx": session("onnx"), "ONNX Runtime int8": session("int8")}


if __name__ == "__main__":
    main()
