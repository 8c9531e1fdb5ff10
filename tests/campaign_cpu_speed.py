"""Tokens a second of our unpadded step on a CPU beside transformers' padded one, on the same weights and sequences.

    python tests/campaign_cpu_speed.py --text FOLDER --work FOLDER [--minutes M]

Sequences are taken in the order of the text; a batch is padded to its longest, as a collator does. Three mixes of
lengths: paragraphs of at most 512 pieces, sentences of at most 64, and running text cut every 128 pieces, which has no
padding. Theirs is sdpa, once as it comes and once with the scores of masked words alone, as ours. Training is a forward
and a backward pass with 30% of the words to predict and without dropout, inference the hidden states of all tokens. One
process, two threads; the contestants take turns on every batch, and what is recorded are medians, with quartiles, of
the ratio of their seconds on one batch: of the clock, and of the processors, which other processes disturb less. Only
real tokens count. Rows: tests/results/cpu_speed.jsonl; what is there for this kind of machine stays. Whole steps of
fine-tuning are measured by `campaign_cpu_fine_tuning`.
"""

from __future__ import annotations

import argparse
import itertools
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
from campaign_rows import add_row, commit_of, read_rows
from family_cases import SPECIAL_IDS
from torch import Tensor
from torch.nn.functional import cross_entropy

from bert_ds.configuration.families.bert import BertConfig
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.families.modernbert import ModernBertConfig
from bert_ds.corpus.text.documents import read_documents
from bert_ds.corpus.text.sentences import split_sentences
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.corpus.tokenizer.wordpiece import WordPieceTokenizer
from bert_ds.encoder.hf_mapping import hf_config, to_hf
from bert_ds.encoder.pretraining_model import PretrainingModel

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests/results/cpu_speed.jsonl"
_SMALL: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
_DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIGS: dict[tuple[str, str], EncoderConfig] = {
    ("bert", "4 x 256"): BertConfig(**_SMALL, **_DRY, intermediate_size=1024, max_position_embeddings=512),
    ("modernbert", "4 x 256"): ModernBertConfig(**_SMALL, intermediate_size=640),
    ("bert", "base"): BertConfig(**_DRY),
    ("modernbert", "base"): ModernBertConfig(),
}
ROWS_OF_BATCH = {"4 x 256": 32, "base": 8}
MIXES = {"paragraphs": 512, "sentences": 64, "running text": 128}
"""Name -> most pieces of a sequence."""
MASKED = 0.3
KEY = ("family", "size", "mix", "dtype")


class Batch(NamedTuple):
    """Sequences in both forms."""

    padded: dict[str, Tensor]
    """input_ids, attention_mask and labels, [N, S]."""
    packed: dict[str, Any]
    targets: dict[str, Tensor]
    num_tokens: int


def main() -> None:
    """Measure what has no row yet, the small sizes first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=6, help="batches of each row, of the small size")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no row after that")
    args = parser.parse_args()
    torch.set_num_threads(2)
    begun, has_amx = time.monotonic(), bool(torch.cpu._is_amx_tile_supported())
    done = {tuple(row[name] for name in KEY) for row in read_rows(RESULTS) if row["amx"] == has_amx}
    dtypes = (torch.float32, torch.bfloat16)
    for ((family, size), config), mix, dtype in itertools.product(CONFIGS.items(), MIXES, dtypes):
        if (family, size, mix, str(dtype)) in done or time.monotonic() - begun > 60 * args.minutes:
            continue
        number = args.batches if size == "4 x 256" else max(2, args.batches // 2)
        batches = list(made_batches(args.text, args.work, mix=mix, number=number, rows=ROWS_OF_BATCH[size]))
        for row in measured(config, dtype, batches):
            record({"family": family, "size": size, "mix": mix, "dtype": str(dtype), **row})


def record(row: dict[str, Any], results: Path = RESULTS) -> None:
    """Add a row with what it was measured on."""
    machine = {"amx": bool(torch.cpu._is_amx_tile_supported()), "load": os.getloadavg()[0], "torch": torch.__version__}
    add_row(results, {**row, **machine, "commit": commit_of(ROOT), "transformers": transformers.__version__})


def made_batches(text: Path, work: Path, *, mix: str, number: int, rows: int) -> Iterator[Batch]:
    """Yield the first batches of a mix."""
    if not (work / "tokenizer/vocab.txt").exists():
        words = ("--input", text, "--output", work / "tokenizer", "--vocab_size", 8192)
        subprocess.run([sys.executable, ROOT / "bert_ds/train_wordpiece.py", *map(str, words)], check=True)
    generator = torch.Generator().manual_seed(1)
    sequences = (
        torch.from_numpy(one.astype(np.int64)) for one in pieces(text, load_tokenizer(work / "tokenizer"), mix)
    )
    for _ in range(number):
        yield batch_of(list(itertools.islice(sequences, rows)), generator)


def pieces(text: Path, tokenizer: WordPieceTokenizer, mix: str) -> Iterator[np.ndarray]:
    """Yield the pieces of sequence after sequence."""
    longest, kept = MIXES[mix], np.empty(0, np.uint16)
    lines = (line for document in read_documents([text]) for line in document.text.splitlines() if line.strip())
    for line in lines:
        if mix == "running text":
            kept = np.concatenate([kept, tokenizer.encode_sentences([line])[0]])
            while len(kept) >= longest:
                yield kept[:longest]
                kept = kept[longest:]
        else:
            for one in tokenizer.encode_sentences(split_sentences(line) if mix == "sentences" else [line]):
                yield one[:longest]


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


def measured(config: EncoderConfig, dtype: torch.dtype, batches: list[Batch]) -> Iterator[dict[str, Any]]:
    """Yield a row for training and one for inference."""
    ours = PretrainingModel(config, kernels="torch", has_pair_head=False).to(dtype)
    content = hf_config(config, sentence_pair="none", special_ids=SPECIAL_IDS)
    theirs = transformers.AutoModelForMaskedLM.from_config(transformers.AutoConfig.for_model(**content)).to(dtype)
    assert theirs.config._attn_implementation == "sdpa"
    theirs.load_state_dict(to_hf(ours.state_dict(), config), strict=False)
    theirs.tie_weights()

    def train_ours(batch: Batch) -> Tensor:
        loss = ours(**batch.packed, targets=batch.targets)[0][0] / len(batch.targets["masked_labels"])
        return backward(ours, loss)

    def train_theirs(batch: Batch) -> Tensor:
        return backward(theirs, theirs(**batch.padded).loss)

    def train_masked_alone(batch: Batch) -> Tensor:
        labels_NS = batch.padded["labels"]
        hidden_PD = hidden(batch)[labels_NS >= 0]
        scores_PV = theirs.cls(hidden_PD) if hasattr(theirs, "cls") else theirs.decoder(theirs.head(hidden_PD))
        return backward(theirs, cross_entropy(scores_PV.float(), labels_NS[labels_NS >= 0]))

    def hidden(batch: Batch) -> Tensor:
        return theirs.base_model(batch.padded["input_ids"], batch.padded["attention_mask"]).last_hidden_state

    @torch.no_grad()
    def infer_ours(batch: Batch) -> Tensor:
        return ours.bert(**batch.packed).float().square().mean()

    @torch.no_grad()
    def infer_theirs(batch: Batch) -> Tensor:
        return hidden(batch)[batch.padded["attention_mask"].bool()].float().square().mean()

    training = {"ours": train_ours, "padded": train_theirs, "padded, masked words alone": train_masked_alone}
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


def backward(model: torch.nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return loss.detach()


if __name__ == "__main__":
    main()
