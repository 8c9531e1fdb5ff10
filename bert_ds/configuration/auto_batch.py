"""The micro-batch of a DeepSpeed file that leaves it open, once it is known how long the text is and what a GPU holds.

Before that, `ds_batch` takes every sequence as full and no memory as known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from bert_ds.configuration.deepspeed_file.ds_batch import AUTO_TOKENS, BatchSplit, divisors
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.run_plan import RunPlan, make_plan

GPU_AUTO_TOKENS = 65_536
"""Upper bound on the real tokens of a micro-batch where a GPU has room: the host launches as much for few of them."""
MEMORY_SHARE = 0.8
"""Of a GPU, that a plan may fill: its estimate leaves out the allocator, workspaces and libraries."""


def with_auto_micro_batch(
    plan: RunPlan, *, mean_lengths: Sequence[float] | None = None, memory_bytes: int | None = None
) -> RunPlan:
    """Return the plan with the largest micro-batch whose real tokens and memory are within bounds.

    A plan whose DeepSpeed file says the micro-batch, or the accumulation, is returned as it is.

    Args:
        plan: of a checked pair of files.
        mean_lengths: tokens of an example in each stage of the run; None takes them as full.
        memory_bytes: of the smallest GPU; None where there is none. A micro-batch that would not fit if all of its
            sequences were full is not taken, however short they are; one of 1 always is.
    """
    if plan.ds.micro_batch_size is not None or plan.ds.accumulation is not None:
        return plan
    lengths = mean_lengths or [stage.run.max_seq_length for stage in plan.stages]
    most = AUTO_TOKENS if memory_bytes is None else GPU_AUTO_TOKENS
    best = None
    for candidate in _candidates(plan, memory_bytes):
        tokens = max(
            stage.split.micro_batch_size * length for stage, length in zip(candidate.stages, lengths, strict=True)
        )
        fits = memory_bytes is None or candidate.memory().device <= MEMORY_SHARE * memory_bytes
        if best is not None and not (tokens <= most and fits):
            break
        best = candidate
    return plan if best is None else best


def _candidates(plan: RunPlan, memory_bytes: int | None) -> Iterator[RunPlan]:
    """Yield the plan with every micro-batch that divides a rank's share and all stages' batches, the smallest first."""
    for micro in divisors(plan.train_batch_size // plan.world_size):
        settings = {**plan.ds.settings, "train_micro_batch_size_per_gpu": micro}
        ds = replace(plan.ds, settings=settings)
        try:
            yield make_plan(plan.run, ds, plan.world_size, gpu_memory_bytes=memory_bytes)
        except ConfigError:  # a stage's batch is no multiple of so many parts
            continue


def micro_batch_text(split: BatchSplit, *, memory_bytes: int | None) -> str:
    """Say what was chosen, and by what."""
    by = "real tokens" if memory_bytes is None else f"real tokens and {memory_bytes / 2**30:.0f} GiB of a GPU"
    return f'"train_micro_batch_size_per_gpu" auto: {split.micro_batch_size}, by {by}'
