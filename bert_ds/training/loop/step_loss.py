"""From sums over one micro-batch to its share of the loss of a whole optimizer step.

The loss of a step is sum_k weight_k * (sum of term k over all ranks and micro-steps) / (count of term k over all of
them). Both are known before the first backward except the sums themselves, so every micro-batch back-propagates
weight_k * sum_k / global_count_k and the gradients merely add up: how the step is cut into ranks and micro-steps does
not matter, however unequal the counts are.

DeepSpeed averages gradients over ranks (`engine.allreduce_bucket`, `stage_1_and_2.average_tensor`, stage 3's
`_avg_scatter_grads`); multiplying by the world size undoes it. Its division by the accumulation steps is switched off
at its source: `engine.backward(loss, scale_wrt_gas=False)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from bert_ds.basics.loss_term import LossTerm


def term_factors(terms: Sequence[LossTerm], counts: Mapping[str, float]) -> list[float]:
    """Return what each sum of a step is multiplied by: weight / count; a term without targets counts for nothing."""
    return [term.weight / counts[term.count] if counts[term.count] else 0.0 for term in terms]


def step_loss(loss_sums_L: Tensor, global_counts: Mapping[str, float], *, terms: Sequence[LossTerm]) -> Tensor:
    """Return this micro-batch's share of the step's loss.

    Args:
        loss_sums_L: fp32, one sum per loss term over this micro-batch.
        global_counts: number of targets in the whole step, by name.
        terms: what the sums are.

    Returns:
        fp32 scalar; the shares of all micro-batches of all ranks add up to the loss of the step.
    """
    if len(loss_sums_L) != len(terms):
        raise ValueError(f"{len(loss_sums_L)} loss sums of {len(terms)} loss terms")
    return weighted_sum(loss_sums_L, term_factors(terms, global_counts))


def weighted_sum(sums_L: Tensor, factors: Sequence[float]) -> Tensor:
    """Return the sum of factor times sum; the factors are arguments of kernels, so nothing is copied to a device."""
    return reduce(torch.add, [sum_ * factor for sum_, factor in zip(sums_L.unbind(), factors, strict=True)])


def poison_if_not_finite(loss: Tensor) -> Tensor:
    """Return the loss unchanged if it is finite, else one whose gradient is NaN everywhere.

    An infinite loss can have finite gradients. With this, one guard on the reduced gradients sees every bad loss on
    every rank, without a collective and without a host sync per micro-step.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))
