"""Tokens a second of our unpadded ModernBERT beside transformers' padded one, on the same weights and sequences.

    python tests/campaign_modernbert_speed.py --text FOLDER --work FOLDER

Sequences are paragraphs (lines) of documents, at most 512 pieces, in the order of the text; a batch is padded to its
longest, as a collator does. Theirs is ModernBertForMaskedLM with sdpa as it comes, and once more with its
`sparse_prediction`, which computes scores of masked words alone as ours does. Training is a forward and a backward pass
with 30% of the words to predict, inference the hidden states of all tokens. One process, two threads; the contestants
take turns on every batch, and what is recorded are medians, with quartiles, of the ratio of their seconds on one batch:
of the clock, and of the processors, which other processes disturb less. Only real tokens count. Rows:
tests/results/modernbert_speed.jsonl; what is there is not repeated.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from campaign_rows import add_row, read_rows
from family_cases import SPECIAL_IDS
from torch import Tensor

from bert_ds.configuration.families.modernbert import ModernBertConfig
from bert_ds.corpus.text.documents import read_documents
from bert_ds.corpus.tokenizer.wordpiece import load_tokenizer
from bert_ds.encoder.hf_mapping import hf_config, to_hf
from bert_ds.encoder.pretraining_model import PretrainingModel

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests/results/modernbert_speed.jsonl"
SIZES = {
    "4 x 256": ModernBertConfig(
        vocab_size=8192, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384
    ),
    "base": ModernBertConfig(),
}
BATCH, BATCHES = {"4 x 256": 32, "base": 6}, {"4 x 256": 6, "base": 4}
LONGEST, MASKED = 512, 0.3


class Batch(NamedTuple):
    """Sequences in both forms."""

    padded: dict[str, Tensor]
    """input_ids, attention_mask and labels, [N, S]."""
    packed: dict[str, Any]
    targets: dict[str, Tensor]
    num_tokens: int


def main() -> None:
    """Measure what has no row yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(2)
    done = {(row["size"], row["dtype"]) for row in read_rows(RESULTS)}
    for size, config in SIZES.items():
        batches = list(made_batches(args.text, args.work, number=BATCHES[size], rows=BATCH[size]))
        for dtype in (torch.float32, torch.bfloat16):
            if (size, str(dtype)) not in done:
                for row in measured(config, dtype, batches):
                    add_row(RESULTS, {"size": size, "dtype": str(dtype), **row, "load": os.getloadavg()[0]})


def made_batches(text: Path, work: Path, *, number: int, rows: int) -> Iterator[Batch]:
    """Yield batches of the first paragraphs."""
    if not (work / "tokenizer/vocab.txt").exists():
        words = ("--input", text, "--output", work / "tokenizer", "--vocab_size", 8192)
        subprocess.run([sys.executable, ROOT / "bert_ds/train_wordpiece.py", *map(str, words)], check=True)
    tokenizer, sequences = load_tokenizer(work / "tokenizer"), []
    generator = torch.Generator().manual_seed(1)
    lines = (line for document in read_documents([text]) for line in document.text.splitlines() if line.strip())
    for line in lines:
        sequences.append(torch.from_numpy(tokenizer.encode_sentences([line])[0][:LONGEST].astype(np.int64)))
        if len(sequences) == rows:
            yield batch_of(sequences, generator)
            number, sequences = number - 1, []
        if not number:
            return


def batch_of(sequences: list[Tensor], generator: torch.Generator) -> Batch:
    """Return a batch in both forms, with the same words to predict."""
    ids_NS = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask_NS = torch.arange(ids_NS.shape[1]) < torch.tensor([len(one) for one in sequences])[:, None]
    chosen_NS = (torch.rand(ids_NS.shape, generator=generator) < MASKED) & mask_NS
    places = chosen_NS[mask_NS].nonzero().squeeze(1)
    packed = {
        "input_ids_T": ids_NS[mask_NS],
        "token_type_ids_T": torch.zeros_like(ids_NS[mask_NS]),
        "position_ids_T": torch.arange(ids_NS.shape[1]).expand_as(ids_NS)[mask_NS],
        "cu_seqlens": torch.tensor([0, *map(len, sequences)]).cumsum(0).int(),
        "max_seqlen": ids_NS.shape[1],
    }
    labels_NS = torch.where(chosen_NS, ids_NS, -100)
    padded = {"input_ids": ids_NS, "attention_mask": mask_NS.long(), "labels": labels_NS}
    return Batch(padded, packed, {"masked_positions": places, "masked_labels": ids_NS[chosen_NS]}, int(mask_NS.sum()))


def measured(config: ModernBertConfig, dtype: torch.dtype, batches: list[Batch]) -> Iterator[dict[str, Any]]:
    """Yield a row for training and one for inference."""
    ours = PretrainingModel(config, kernels="torch", has_pair_head=False).to(dtype)
    content = hf_config(config, sentence_pair="none", special_ids=SPECIAL_IDS)
    theirs = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig.from_dict(content)).to(dtype)
    assert theirs.config._attn_implementation == "sdpa"
    theirs.load_state_dict(to_hf(ours.state_dict(), config), strict=False)
    theirs.tie_weights()

    def train_ours(batch: Batch) -> Tensor:
        loss = ours(**batch.packed, targets=batch.targets)[0][0] / len(batch.targets["masked_labels"])
        return _backward(ours, loss)

    def train_theirs(batch: Batch) -> Tensor:
        theirs.config.sparse_prediction = theirs.sparse_prediction = False
        return _backward(theirs, theirs(**batch.padded).loss)

    def train_sparse(batch: Batch) -> Tensor:
        theirs.config.sparse_prediction = theirs.sparse_prediction = True
        return _backward(theirs, theirs(**batch.padded).loss)

    @torch.no_grad()
    def infer_ours(batch: Batch) -> Tensor:
        return ours.bert(**batch.packed).float().square().mean()

    @torch.no_grad()
    def infer_theirs(batch: Batch) -> Tensor:
        found = theirs.model(batch.padded["input_ids"], batch.padded["attention_mask"]).last_hidden_state
        return found[batch.padded["attention_mask"].bool()].float().square().mean()

    training = {"ours": train_ours, "padded": train_theirs, "padded, sparse prediction": train_sparse}
    yield {"what": "training", **compared(training, batches, is_exact=dtype == torch.float32)}
    ours.eval(), theirs.eval()
    inference = {"ours": infer_ours, "padded": infer_theirs}
    yield {"what": "inference", **compared(inference, batches, is_exact=dtype == torch.float32)}


def compared(
    contestants: dict[str, Callable[[Batch], Tensor]], batches: list[Batch], *, is_exact: bool
) -> dict[str, Any]:
    """Let them take turns on every batch; the first batch warms up."""
    clock: dict[str, list[float]] = {name: [] for name in contestants}
    processors: dict[str, list[float]] = {name: [] for name in contestants}
    for number, batch in enumerate([batches[0], *batches]):
        order = list(contestants) if number % 2 else list(contestants)[::-1]
        values = {}
        for name in order:
            begun = time.perf_counter(), time.process_time()
            values[name] = float(contestants[name](batch))
            clock[name].append(time.perf_counter() - begun[0])
            processors[name].append(time.process_time() - begun[1])
        if is_exact:
            assert all(abs(value / values["ours"] - 1) < 1e-4 for value in values.values()), values
    tokens = sum(batch.num_tokens for batch in batches)
    places = sum(batch.padded["input_ids"].numel() for batch in batches)
    row: dict[str, Any] = {"batches": len(batches), "tokens": tokens, "padding": round(1 - tokens / places, 3)}
    for name, seconds in clock.items():
        row[name] = {"tokens_per_s": round(tokens / sum(seconds[1:]), 1)}
        if name != "ours":
            row[name] |= {"clock": ratios(seconds[1:], clock["ours"][1:])}
            row[name] |= {"processors": ratios(processors[name][1:], processors["ours"][1:])}
    return row


def ratios(theirs: list[float], ours: list[float]) -> list[float]:
    """Return the quartiles of their seconds over ours, the median in the middle."""
    found = [one / other for one, other in zip(theirs, ours, strict=True)]
    return [round(value, 3) for value in statistics.quantiles(found, n=4, method="inclusive")]


def _backward(model: torch.nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return loss.detach()


if __name__ == "__main__":
    main()
