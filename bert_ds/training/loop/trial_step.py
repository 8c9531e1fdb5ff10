"""Before a run: the micro-batch that is left open, peak memory on the longest batch, the largest batch that fits."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from deepspeed import DeepSpeedEngine

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.configuration.auto_batch import micro_batch_text, with_auto_micro_batch
from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.configuration.run_plan import RunPlan
from bert_ds.reporting.run_log import RunLog
from bert_ds.training.agreement import max_over_ranks
from bert_ds.training.loop.dropout_seeds import dropout_seed
from bert_ds.training.loop.evaluation import named_means
from bert_ds.training.loop.step_loss import step_loss
from bert_ds.training.loop.train_step import agree_on_totals, forward_backward, sum_of_ranks, take_step


class TrialStep(NamedTuple):
    """What a step on the longest possible batch took; the worst of all ranks."""

    peak_bytes: int
    """Peak of the device's allocator; on the CPU the peak resident size of the process."""
    seconds: float
    """Of a step as all later ones are."""
    first_seconds: float
    """Of the first, in which kernels are compiled and the optimizer makes its state."""
    num_tokens: float
    """Tokens of the step over all ranks."""
    mean_loss: float
    """Weighted loss of the first step."""


def settle_micro_batch(plan: RunPlan, mean_lengths: Sequence[float], *, log: RunLog) -> RunPlan:
    """Return the plan with a micro-batch by the text and the smallest GPU where its file leaves it open; a collective.

    Args:
        plan: of the run.
        mean_lengths: tokens of an example in each stage, the same on all ranks.
        log: is told what was chosen.
    """
    memory = None
    if torch.cuda.is_available():
        memory = -int(max_over_ranks(-float(torch.cuda.get_device_properties(None).total_memory)))
    settled = with_auto_micro_batch(plan, mean_lengths=mean_lengths, memory_bytes=memory)
    if settled is not plan:
        log.info(micro_batch_text(settled.split, memory_bytes=memory))
    return settled


def try_longest(
    engine: DeepSpeedEngine, longest: Callable[[int], MicroBatch], *, split: BatchSplit, log: RunLog, search: bool
) -> None:
    """Take a step on the longest possible batch, or look for the largest micro-batch that fits; a collective.

    Args:
        engine: from `make_engine`; of no use afterwards.
        longest: the largest batch that can come of a micro-batch of so many examples.
        split: of the global batch.
        log: is told what was found.
        search: look for the largest, from the planned one on.
    """
    if search:
        start, limit = split.micro_batch_size, split.micro_batch_size * split.accumulation
        best = largest_that_fits(lambda size: fits_in_memory(engine, longest(size)), start=start, limit=limit)
        smaller = (
            f'set "train_micro_batch_size_per_gpu" to {start // 2} and look again' if start > 1 else "it is the least"
        )
        found = f'"train_micro_batch_size_per_gpu": {best}'
        log.info(found if best else f"a micro-batch of {start} does not fit: {smaller}")
        return
    probe = probe_longest(engine, longest(split.micro_batch_size))
    log.info(
        f"dry run: one step of {probe.num_tokens:.0f} tokens took {probe.seconds:.2f} s and "
        f"{probe.peak_bytes / 2**30:.2f} GiB at its peak, loss {probe.mean_loss:.4f}; the first took "
        f"{probe.first_seconds - probe.seconds:.2f} s more, for compiling kernels and making optimizer state"
    )


def probe_longest(engine: DeepSpeedEngine, batch: MicroBatch) -> TrialStep:
    """Take two whole optimizer steps with every micro-batch equal to `batch`; a collective.

    The optimizer state exists in the second, so the peak is that of training. The weights have changed: the engine is
    for looking at, not for training on.
    """
    engine.train()
    micro_batches = [batch] * engine.gradient_accumulation_steps()
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    losses, seconds = [], []
    for step in (1, 2):
        begun = time.perf_counter()
        totals = agree_on_totals(micro_batches, data_wait_s=0.0, stop=False)
        sums = sum_of_ranks(forward_backward(engine, micro_batches, counts=totals.counts, seed=0, step=step))
        take_step(engine)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)  # what is measured is its end
        seconds.append(max_over_ranks(time.perf_counter() - begun))
        losses.append(named_means(engine.module.terms, sums, counts=totals.counts)["loss"])
    first_s, second_s = seconds
    peak = int(max_over_ranks(_peak_bytes(engine.device)))
    return TrialStep(peak, second_s, first_s, totals.num_tokens, losses[0])


def fits_in_memory(engine: DeepSpeedEngine, batch: MicroBatch) -> bool:
    """Take a step on this micro-batch and say whether every rank had memory for it; a collective.

    Two micro-steps where the run accumulates, so that the gradients of one are held during the other. All ranks get
    batches of the same size and run out of memory at the same place; the engine is of no use after that. On the CPU
    memory ends in the kernel's killer and not in an error, so there the answer is always true.
    """
    engine.train()
    num_micro_steps = min(2, engine.gradient_accumulation_steps())
    fitted = True
    try:
        for micro_step in range(num_micro_steps):
            engine.set_gradient_accumulation_boundary(micro_step == num_micro_steps - 1)
            inputs = batch.to(engine.device).model_inputs()
            seed = dropout_seed(0, 1, micro_step, device=engine.device)
            loss_sums_L, _ = engine(**inputs, dropout_seed=seed)
            engine.backward(step_loss(loss_sums_L, batch.counts, terms=engine.module.terms))
            engine.step()
    except (torch.OutOfMemoryError, MemoryError):
        fitted = False
    return not max_over_ranks(float(not fitted))


def largest_that_fits(fits: Callable[[int], bool], *, start: int, limit: int) -> int | None:
    """Return the largest of start, 2 start, 4 start ... that divides limit and fits; None if not even start fits."""
    best = None
    size = start
    while size <= limit and limit % size == 0 and fits(size):
        best, size = size, 2 * size
    return best


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
