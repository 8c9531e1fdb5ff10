"""Twenty steps worked out plainly: what a run has to log, by a script that imports nothing of this project.

Loss of a step: sums over its whole batch divided by the number of targets. Then the 2-norm of all gradients, clipping
to a norm, and AdamW (Loshchilov and Hutter 2019) with decay on matrices alone. A step whose loss is not finite, or more
than some standard deviations above the mean of a full window of earlier losses once the warm-up is over, changes
nothing and is not kept in the window.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Weights = dict[str, Tensor]
TWO_64 = 2**64


class Settings(NamedTuple):
    """What is trained how."""

    total_steps: int = 20
    seed: int = 11
    peak_lr: float = 0.02
    warmup: int = 4
    final_share: float = 0.1
    clip: float = 2.0
    betas: tuple[float, float] = (0.8, 0.95)
    eps: float = 1e-5
    decay: float = 0.3
    not_decayed: tuple[str, ...] = ()
    loss_weights: tuple[float, ...] = (1.0, 0.5)
    sigmas: float = 4.0
    window: int = 8


class PlainStep(NamedTuple):
    """What a step has to log."""

    applied: bool
    loss: float
    means: list[float]
    lr: float
    norm: float
    seeds: list[int]


def mixed(value: int) -> int:
    """splitmix64 of an unsigned 64-bit number."""
    value = (value + 0x9E3779B97F4A7C15) % TWO_64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % TWO_64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % TWO_64
    return value ^ (value >> 31)


def seed_of(seed: int, step: int, part: int) -> int:
    """The dropout seed of a micro-batch, as a signed 64-bit number."""
    value = mixed(mixed(mixed(seed) ^ step) ^ part)
    return value - TWO_64 if value >= TWO_64 // 2 else value


def rate(step: int, at: Settings) -> float:
    """Linear warm-up to the peak, then half a cosine down to a share of it at the last step."""
    if step <= at.warmup:
        return at.peak_lr * step / at.warmup
    way = (step - at.warmup) / (at.total_steps - at.warmup)
    height = (1 + math.cos(math.pi * way)) / 2
    return at.peak_lr * (at.final_share + (1 - at.final_share) * height)


def work_out(
    weights: Weights,
    parts_of: Callable[[int], Sequence[Any]],
    sums_of: Callable[[Weights, Any, int | None], Tensor],
    counts_of: Callable[[Any], Iterable[float]],
    at: Settings,
) -> list[PlainStep]:
    """Train `weights` in place and return the steps.

    Args:
        weights: by name, fp32.
        parts_of: the micro-batches of a step, from 1.
        sums_of: the summed loss terms of a micro-batch under weights and a dropout seed.
        counts_of: targets of each loss term of a micro-batch.
        at: see above.
    """
    first = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    window: list[float] = []
    steps, num_applied = [], 0
    for step in range(1, at.total_steps + 1):
        parts = parts_of(step)
        seeds = [seed_of(at.seed, step, part) for part in range(len(parts))]
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        sums = sum(sums_of(leaves, part, seed) for part, seed in zip(parts, seeds, strict=True))
        counts = [sum(column) for column in zip(*map(counts_of, parts), strict=True)]
        terms = [total / count for total, count in zip(sums, counts, strict=True)]
        loss = sum(weight * term for weight, term in zip(at.loss_weights, terms, strict=True))
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
        value = float(loss.detach())
        spikes = False
        if step > at.warmup and len(window) == at.window:
            spikes = value > statistics.fmean(window) + at.sigmas * statistics.stdev(window)
        applied = math.isfinite(value) and not spikes
        steps.append(PlainStep(applied, value, [float(term.detach()) for term in terms], rate(step, at), norm, seeds))
        if not applied:
            continue
        window = [*window, value][-at.window :]
        num_applied += 1
        factor = min(1.0, at.clip / norm)
        for name, weight in weights.items():
            gradient = gradients[name].double() * factor
            first[name] = at.betas[0] * first[name] + (1 - at.betas[0]) * gradient
            second[name] = at.betas[1] * second[name] + (1 - at.betas[1]) * gradient**2
            m = first[name] / (1 - at.betas[0] ** num_applied)
            v = second[name] / (1 - at.betas[1] ** num_applied)
            decay = 0.0 if name in at.not_decayed else at.decay
            moved = weight.double() * (1 - rate(step, at) * decay) - rate(step, at) * m / (v.sqrt() + at.eps)
            weights[name] = moved.float()
    return steps
