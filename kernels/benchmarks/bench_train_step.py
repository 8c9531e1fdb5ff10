"""Time whole training steps of BERT against transformers on this GPU and append the rows to results/train_step.csv.

    python kernels/benchmarks/bench_train_step.py                     BERT-base and BERT-large; needs a CUDA device
    python kernels/benchmarks/bench_train_step.py --models large --batches half_full_512
    TRITON_INTERPRET=1 python kernels/benchmarks/bench_train_step.py --dry_run    a tiny model, anywhere, writes nothing

A step is forward, backward and torch's fused AdamW, over bf16 weights, dropout 0.1, both objectives, 15 % of the tokens
masked; the same for all. Ours takes the sequences packed, transformers takes them padded (without a mask where none is
needed) and computes the scores of every position. Counted are tokens that are no padding. MFU = FLOPs per token x
tokens per second / the data sheet's dense bf16 rate, with n the lengths of a batch, T = sum n and P the masked tokens:

    FLOPs per token = 6 L (4 D^2 + 2 D F) + 12 L D sum(n^2) / T + 6 (D^2 + V D) P / T
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from bench_harness import (
    RESULTS,
    Budget,
    append_rows,
    circumstances,
    reason,
    recorded,
    red_ops,
)
from bench_ops import OPS
from bench_step_cases import BATCHES, MODELS, TINY, Batch, flops_per_token, make_batch, make_model
from torch import nn

from bert_ds.configuration.families.bert import BertConfig
from bert_ds.training.loop.throughput import peak_flops

# In order of importance, and the most seconds that each may take, most of them torch.compile.
PROVIDERS = {"ours": 40.0, "transformers compiled": 150.0, "transformers eager": 40.0, "ours compiled": 150.0}
# Parts of kernel names, in the order in which they are tried.
KINDS = {
    "attention": ("attention", "flash", "fmha", "sdp"),
    "matrix products": ("gemm", "cutlass", "nvjet", "cublas", "xmma"),
    "optimizer": ("multi_tensor", "adam"),
    "masked-LM loss": ("mlm_cross_entropy", "nll_loss", "softmax"),
    "LayerNorm and dropout": ("layer_norm", "column_sums", "dropout"),
    "GELU": ("gelu",),
    "embedding": ("embedding", "segment_sum", "shared_rows", "indexing", "sort"),
}


@dataclass(frozen=True)
class StepRow:
    """One line of the record."""

    time: str
    gpu: str
    torch: str
    triton: str
    commit: str
    model: str
    batch: str
    provider: str
    num_tokens: int
    padded_tokens: int
    step_ms: str
    tokens_per_s: str
    mfu_percent: str
    peak_memory_bytes: int
    shares: str
    """Percent of the GPU's busy time by kind of kernel."""


def step_of(provider: str, model: nn.Module, batch: Batch, *, dry_run: bool) -> Callable[[], None]:
    """Return a function that takes one training step."""
    device = batch.packed["input_ids_T"].device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda")
    forward: Callable[..., Any] = model
    if provider.endswith("compiled"):
        forward = torch.compile(model, backend="eager" if dry_run else "inductor")

    def step() -> None:
        if provider.startswith("ours"):
            sums, _ = forward(**batch.packed)
            loss = sums[0] / batch.num_masked + sums[1] / len(batch.lengths)
        else:
            loss = forward(**batch.padded).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds_per_step(step: Callable[[], None], device: torch.device, *, dry_run: bool) -> float:
    """Return the time of a step, the mean of several that follow each other without a pause."""
    warmup, repeats = (0, 1) if dry_run else (5, 20)
    for _ in range(warmup):
        step()
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def shares_of_time(step: Callable[[], None]) -> str:
    """Return where the time of a step goes on the GPU, by the names of the kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    sums = dict.fromkeys((*KINDS, "other"), 0.0)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = event.name.lower()
            kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
            sums[kind] += event.device_time_total
    total = sum(sums.values()) or 1.0
    return "; ".join(f"{kind} {100 * value / total:.1f}" for kind, value in sums.items() if value > 0)


def measure(
    model_name: str, batch_name: str, *, provider: str, facts: dict[str, str], device: torch.device, dry_run: bool
) -> StepRow | None:
    """Return the row of a provider; one that cannot do the step is printed and gives None."""
    config = TINY if dry_run else MODELS[model_name]
    lengths = [16, 11, 9] if dry_run else BATCHES[batch_name]
    num_tokens = sum(lengths)
    peak = peak_flops(facts["gpu"], "bf16")
    torch.manual_seed(0)
    batch = make_batch(lengths, config, device)
    try:
        seconds, memory, shares = _measure_provider(provider, config, batch, dry_run=dry_run)
    except Exception as error:
        # Other people's code may raise anything.
        if provider == "ours":
            raise
        print(f"{model_name} {batch_name}: {provider} left out: {reason(error)}", file=sys.stderr)
        return None
    mfu = "" if peak is None else f"{100 * flops_per_token(config, batch) * num_tokens / seconds / peak:.1f}"
    return StepRow(
        **facts,
        model=model_name,
        batch=batch_name,
        provider=provider,
        num_tokens=num_tokens,
        padded_tokens=len(lengths) * max(lengths),
        step_ms=f"{1e3 * seconds:.3f}",
        tokens_per_s=f"{num_tokens / seconds:.0f}",
        mfu_percent=mfu,
        peak_memory_bytes=memory,
        shares=shares,
    )


def _measure_provider(provider: str, config: BertConfig, batch: Batch, *, dry_run: bool) -> tuple[float, int, str]:
    """Return (seconds per step, peak memory, shares); what one provider allocates is gone before the next."""
    device = batch.packed["input_ids_T"].device
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    step = step_of(provider, make_model(provider, config, device), batch, dry_run=dry_run)
    seconds = seconds_per_step(step, device, dry_run=dry_run)
    if device.type != "cuda":
        return seconds, 0, ""
    return seconds, torch.cuda.max_memory_allocated(device), shares_of_time(step)


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batches", nargs="+", default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument("--minutes", type=float, default=120.0, help="begin no measurement that would end later")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--commit", help="what the rows say in a copy of the files that git does not know")
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="a tiny model on any device, writes nothing"
    )
    return parser.parse_args()


def main() -> int:
    """Parse, test, time, append."""
    args = parse()
    budget, device = Budget(args.minutes), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.dry_run:
        raise SystemExit("no CUDA device: nothing here is worth timing; --dry_run tries the script itself")
    facts, path = circumstances(device, args.commit), args.results / "train_step.csv"
    red = [] if args.dry_run else red_ops(list(OPS), facts, args.results)
    if red:
        raise SystemExit(f"the tests of {', '.join(red)} fail, so nothing is timed")
    known = recorded(path, facts, ("model", "batch", "provider"))
    # A batch after the other, the most important one first, each for all models.
    pairs = [("tiny", "tiny")] if args.dry_run else [(m, b) for b in args.batches for m in args.models]
    left = [(m, b, provider) for m, b in pairs for provider in PROVIDERS if (m, b, provider) not in known]
    for model_name, batch_name, provider in left:
        if not budget.allows(PROVIDERS[provider]):
            print(f"{model_name} {batch_name}: no time left for {provider}, run again to go on", file=sys.stderr)
            continue
        row = measure(model_name, batch_name, provider=provider, facts=facts, device=device, dry_run=args.dry_run)
        if row is None:
            continue
        figures = "ran" if args.dry_run else f"{row.tokens_per_s:>9} tokens/s  MFU {row.mfu_percent} %  {row.shares}"
        print(f"{row.model:6} {row.batch:14} {row.provider:22} {figures}", flush=True)
        if not args.dry_run:
            append_rows(path, [row])
    return 0


if __name__ == "__main__":
    sys.exit(main())
