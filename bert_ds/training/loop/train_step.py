"""One optimizer step: agree on its targets, accumulate its gradients, apply it unless it is bad."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.basics.ranks import DivergedError
from bert_ds.training.agreement import sum_over_ranks
from bert_ds.training.loop.loss_guard import LossGuard
from bert_ds.training.loop.micro_losses import micro_losses
from bert_ds.training.loop.step_loss import poison_if_not_finite
from bert_ds.training.optimizers.factory import StepGuard


class StepTotals(NamedTuple):
    """Sums over all ranks and micro-steps of one step, known before its first backward."""

    counts: dict[str, float]
    """Targets by name."""
    num_tokens: float
    padded_tokens: float
    filling_tokens: float
    """Which are not among the others."""
    data_wait_s: float
    stop: bool


class Step(NamedTuple):
    """One optimizer step as it was taken."""

    number: int
    lr: float
    totals: StepTotals
    sums: Tensor
    """This rank's loss and metric sums, on the device."""
    applied: bool
    """Whether weights changed; the same on all ranks."""
    grad_norm: Any
    micro_batches: Sequence[MicroBatch]
    """Of this rank."""


class Judge(NamedTuple):
    """A guard, and whether it drops the spikes of this step."""

    guard: LossGuard
    armed: bool


def fetch(batches: Iterator[Sequence[MicroBatch]]) -> tuple[Sequence[MicroBatch], float]:
    """Return the next step's micro-batches and how long they were waited for, in seconds."""
    begun = time.perf_counter()
    micro_batches = next(batches)
    return micro_batches, time.perf_counter() - begun


def agree_on_totals(micro_batches: Sequence[MicroBatch], *, data_wait_s: float, stop: bool) -> StepTotals:
    """Return the step's totals; the one collective before the first backward."""
    names = list(micro_batches[0].counts)
    counts = [sum(batch.counts[name] for batch in micro_batches) for name in names]
    tokens: float = sum(batch.num_tokens for batch in micro_batches)
    padded: float = sum(batch.padded_tokens for batch in micro_batches)
    filling: float = sum(batch.fillings.tokens for batch in micro_batches)
    *counts, tokens, padded, filling, waited, stops = sum_over_ranks(
        [*counts, tokens, padded, filling, data_wait_s, float(stop)]
    )
    return StepTotals(dict(zip(names, counts, strict=True)), tokens, padded, filling, waited, stops > 0)


def forward_backward(
    engine: DeepSpeedEngine,
    micro_batches: Sequence[MicroBatch],
    *,
    counts: Mapping[str, float],
    seed: int | None,
    step: int,
    judge: Judge | None = None,
) -> Tensor:
    """Accumulate the gradients of one step and return this rank's loss and metric sums, on the device.

    Args:
        engine: from `make_engine`.
        micro_batches: of this rank.
        counts: targets by name over the whole step.
        seed: of the run; None where the model draws nothing.
        step: from 1; which dropout is drawn.
        judge: may keep the step out of the weights.
    """
    accumulation = engine.gradient_accumulation_steps()
    if len(micro_batches) != accumulation:
        raise ValueError(f"{len(micro_batches)} micro-batches for a step, wanted {accumulation} (accumulation steps)")
    terms, total = engine.module.terms, None
    losses = micro_losses(engine, micro_batches, counts=counts, seed=seed, step=step, device=engine.device)
    for micro_step, (loss, sums) in enumerate(losses):
        loss = poison_if_not_finite(loss)
        total = sums if total is None else total + sums
        is_last = micro_step == accumulation - 1
        if is_last and judge is not None:
            loss = loss * judge.guard.judge(total, counts=counts, terms=terms, armed=judge.armed)
        engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)
        if not is_last:
            engine.step()
    assert total is not None
    return total


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the rate of every group of a torch optimizer or of DeepSpeed's wrapper around one."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def take_step(engine: DeepSpeedEngine) -> tuple[bool, Any]:
    """Run the optimizer unless the step's gradients are not finite; a bad step leaves weights and moments alone.

    DeepSpeed's wrappers decide this together over all ranks. Without a wrapper (stage 0) the gradients are already
    reduced, hence the same on every rank, and so is the decision taken here.

    Returns:
        Whether the step was applied, and the gradient norm before clipping (infinite for a dropped step).
    """
    if engine.optimizer is not engine.basic_optimizer:
        _step_engine(engine)
        if not engine.was_step_applied():
            _drop_offloaded_gradients(engine.optimizer)
        return engine.was_step_applied(), engine.get_global_grad_norm()
    norm = gradient_norm(engine.module)
    guard = engine.basic_optimizer.step
    assert isinstance(guard, StepGuard), "the engine was not built by make_engine"
    guard.armed = math.isfinite(norm)
    _step_engine(engine)
    applied, guard.armed = guard.armed, True
    return applied, norm


def gradient_norm(module: torch.nn.Module) -> float:
    """Return the 2-norm of all gradients, summed in fp64."""
    squares = [
        torch.linalg.vector_norm(parameter.grad, dtype=torch.float64).square()
        for parameter in module.parameters()
        if parameter.grad is not None
    ]
    return float(torch.stack(squares).sum().sqrt())  # host sync: the step must not run if this is not finite


def sum_of_ranks(sums: Tensor) -> list[float]:
    """Return loss and metric sums over all ranks; a collective on the device, and a host sync."""
    total = sums.clone()
    dist.all_reduce(total)
    return total.tolist()


def _drop_offloaded_gradients(optimizer: Any) -> None:
    """Forget the gradients of a dropped step that DeepSpeed 0.19.8 keeps.

    With the optimizer on the CPU, `stage_1_and_2.step` does not clear its fp32 sums when it drops a step: their NaN
    would be found again in every later step.
    """
    if getattr(optimizer, "cpu_offload", False):  # `require_names` has seen it where there is offload
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None


def _step_engine(engine: DeepSpeedEngine) -> None:
    try:
        engine.step()
    except Exception as error:
        if "loss scale already at minimum" in str(error):
            raise DivergedError(f"fp16: {error}") from error
        raise
