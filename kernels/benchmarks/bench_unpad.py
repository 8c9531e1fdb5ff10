"""Real tokens a second of transformers models, plain and unpadded, side by side in turns.

On a CPU these are processor seconds of one thread, which others on the machine disturb least.

    python kernels/benchmarks/bench_unpad.py [--minutes 9] [--sizes small base] [--dry_run]

A cell is a size, a mix of lengths, a kind of call and a dtype. All ways of a cell take turns, round by round, after one
call each that is not counted; a row holds the median of the rounds and the lowest, median and highest of the ratios to
"plain" of the same round. Rows go to results/unpad.csv; cells that it has of this machine, these versions and this
commit are left out, so that the next call goes on. A dry run does every cell at tiny size and writes nothing.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_harness import HALF_FULL_512, RESULTS, Budget, append_rows, circumstances, lengths_of, recorded
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from bert_kernels.hf import unpad

SIZES = {"small": (4, 256, 32), "base": (12, 768, 8)}
"""Layers, hidden size, rows of a batch."""
# Pieces of SST-2's phrases at ten evenly spaced quantiles, as the mean of 13 and the longest of 66 have them.
_SHORT = (4, 5, 6, 7, 9, 11, 13, 16, 22, 38)
MIXES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "short texts, padded to 128": (_SHORT, 128),
    "short texts, padded to the longest": (_SHORT, None),
    "even spread to 128": (tuple(length // 4 for length in HALF_FULL_512), 128),
    "full 128": ((128,), 128),
}
"""Lengths by quantiles, and to what a batch is padded; None: its longest."""
CALLS = ("classify, train", "classify, infer", "words, train")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[], Any]


@dataclass(frozen=True)
class UnpadRow:
    """One line of the record."""

    time: str
    gpu: str
    torch: str
    triton: str
    commit: str
    transformers: str
    size: str
    mix: str
    call: str
    dtype: str
    way: str
    real_tokens: int
    padded_tokens: int
    tokens_per_s: str
    ratio_low: str
    ratio: str
    ratio_high: str
    peak_bytes: str
    """Of the card; empty on a CPU."""


@dataclass(frozen=True)
class Cell:
    """What is measured at once."""

    size: str
    mix: str
    call: str
    dtype: str


def main() -> None:
    """Measure what has no row yet, as long as the time lasts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--commit", help="the commit, where git cannot say it")
    parser.add_argument("--dry_run", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    facts, budget, longest_s = circumstances(device, args.commit), Budget(args.minutes), 0.0
    done = set() if args.dry_run else recorded(args.results / "unpad.csv", facts, ("size", "mix", "call", "dtype"))
    for names in itertools.product(args.sizes, args.dtypes, CALLS, MIXES):
        cell = Cell(names[0], names[3], names[2], names[1])
        if (cell.size, cell.mix, cell.call, cell.dtype) in done or not budget.allows(longest_s):
            continue
        start = time.monotonic()
        rows = measure(cell, device, facts, rounds=1 if args.dry_run else args.rounds, tiny=args.dry_run)
        longest_s = max(longest_s, time.monotonic() - start)
        for row in rows:
            print(
                f"{cell.size:5} {cell.dtype} {cell.call:15} {cell.mix:34} {row.way:9} {row.tokens_per_s:>9} {row.ratio}"
            )
        if not args.dry_run:
            append_rows(args.results / "unpad.csv", rows)


def measure(cell: Cell, device: torch.device, facts: dict[str, str], *, rounds: int, tiny: bool) -> list[UnpadRow]:
    """Return a row for each way of the cell."""
    batch = make_batch(cell, device, tiny=tiny)
    steps = dict(ways(cell, batch, device, tiny=tiny))
    times: dict[str, list[float]] = {way: [] for way in steps}
    peaks = {way: _seconds(step, device)[1] for way, step in steps.items()}
    for turn in range(rounds):  # the first of a round is another each time
        order = list(steps)
        for way in order[turn % len(order) :] + order[: turn % len(order)]:
            times[way].append(_seconds(steps[way], device)[0])
    real, padded = int(batch["attention_mask"].sum()), batch["attention_mask"].numel()
    facts = facts | {"transformers": importlib.metadata.version("transformers")}
    rows = []
    for way, seconds in times.items():
        ratios = sorted(plain / own for plain, own in zip(times["plain"], seconds, strict=True))
        numbers = {"real_tokens": real, "padded_tokens": padded, "peak_bytes": peaks[way]}
        speeds = {
            "tokens_per_s": f"{real / statistics.median(seconds):.0f}",
            "ratio": f"{statistics.median(ratios):.2f}",
        }
        ends = {"ratio_low": f"{ratios[0]:.2f}", "ratio_high": f"{ratios[-1]:.2f}"}
        rows.append(UnpadRow(**facts, **vars(cell), way=way, **numbers, **speeds, **ends))
    return rows


def ways(cell: Cell, batch: dict[str, Tensor], device: torch.device, *, tiny: bool) -> Iterator[tuple[str, Step]]:
    """Yield a step of each way that this machine has: "plain" is sdpa."""
    plain = make_model(cell, tiny=tiny).to(device)
    yield "plain", step_of(cell, plain, batch)
    yield "unpad", step_of(cell, unpad(copy.deepcopy(plain)), batch)
    if device.type != "cuda":
        return
    yield "compiled", step_of(cell, torch.compile(copy.deepcopy(plain)), batch)
    yield "unpad, compiled", step_of(cell, torch.compile(unpad(copy.deepcopy(plain))), batch)
    yield "unpad, layers of transformers", step_of(cell, _unfused(copy.deepcopy(plain)), batch)
    if _has("flash_attn") and cell.dtype == "bf16":
        flash = copy.deepcopy(plain)
        flash.set_attn_implementation("flash_attention_2")
        yield "flash-attention, padded", step_of(cell, flash, batch)
        if cell.call == "words, train":
            yield "flash-attention, flattened", step_of(cell, copy.deepcopy(flash), flattened(batch))


def _unfused(model: Any) -> Any:
    """Return the model unpadded, with a hook in every part: nothing but attention is fused."""
    for module in model.modules():
        if type(module) in (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Dropout):
            module.register_forward_hook(lambda module, args, output: None)
    return unpad(model)


def _has(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def make_model(cell: Cell, *, tiny: bool) -> Any:
    """Return a plain model with dropout 0.1."""
    layers, hidden, _ = (1, 64, 2) if tiny else SIZES[cell.size]
    config = BertConfig(
        vocab_size=101 if tiny else 30522,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = (BertForMaskedLM if cell.call.startswith("words") else BertForSequenceClassification)(config)
    return model.to(DTYPES[cell.dtype]).train(cell.call.endswith("train"))


def make_batch(cell: Cell, device: torch.device, *, tiny: bool) -> dict[str, Tensor]:
    """Return a padded batch, rows in random order, with labels for 15 % of the words or a class for each row."""
    rows = 2 if tiny else SIZES[cell.size][2]
    histogram, width = MIXES[cell.mix]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(lengths_of(histogram, rows))[torch.randperm(rows, generator=generator)]
    width = width or int(lengths.max())
    mask = (torch.arange(width) < lengths[:, None]).long()
    ids = torch.randint(5, 101 if tiny else 30522, mask.shape, generator=generator) * mask
    labels = torch.arange(rows) % 2
    if cell.call.startswith("words"):
        chosen = (torch.rand(mask.shape, generator=generator) < 0.15) & mask.bool()
        labels = torch.where(chosen | (torch.arange(width) == 1), ids, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def flattened(batch: dict[str, Tensor]) -> dict[str, Any]:
    """Return the batch as a flattening collator makes it."""
    keep = batch["attention_mask"].bool()
    lengths = keep.sum(1)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    positions = torch.arange(keep.shape[1], device=keep.device).expand(keep.shape)[keep][None]
    ids, labels = batch["input_ids"][keep][None], batch["labels"][keep][None]
    places = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return {"input_ids": ids, "labels": labels, "position_ids": positions, **places}


def step_of(cell: Cell, model: Any, batch: dict[str, Any]) -> Step:
    """Return a step: forward, backward and AdamW, or a forward."""
    if cell.call.endswith("infer"):
        inputs = {name: value for name, value in batch.items() if name != "labels"}

        def infer() -> None:
            with torch.inference_mode():
                model(**inputs)

        return infer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def train() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def _seconds(step: Step, device: torch.device) -> tuple[float, str]:
    """Return the time of a step and its peak of memory on a card."""
    if device.type != "cuda":
        start = time.process_time()
        step()
        return time.process_time() - start, ""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start, str(torch.cuda.max_memory_allocated())


if __name__ == "__main__":
    main()
