"""ZeRO-1 of one rank, on a CPU in fp32: DeepSpeed's step to the bit, without the work that only several ranks need.

DeepSpeed 0.19.8 copies each gradient into a bucket, divides it by 1, reduces it over its one rank, copies it into a
second buffer and from there into the flat gradient, clips that, and copies the flat masters back into the flat weights:
over a third of a step on a few hundred tokens. Here a gradient stays where autograd left it until it is clipped into
the flat gradient, and the masters are the weights. The rest is done by DeepSpeed's operations in DeepSpeed's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bert_ds.training.deepspeed_names import named_release, require_one_rank_names

with named_release():
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

_SQUARED_TOGETHER = 32_000
"""Numbers of a gradient: in fp64 they stay in the cache of a core, and torch wakes no threads for so few (2^15)."""


def shorten_step(engine: Any) -> None:
    """Let a built engine step the short way from now on, where that is the same step."""
    zero = engine.optimizer
    if type(zero) is not DeepSpeedZeroOptimizer:
        return
    require_one_rank_names(zero)
    if not _is_alone(engine, zero):
        return
    step = _ShortStep(zero)
    for hook in zero._grad_acc_hooks:  # they allocate buckets
        hook.remove()
    zero.reduce_gradients, zero.step = step.take_gradients, step


def _is_alone(engine: Any, zero: Any) -> bool:
    precisions = (zero.dtype, zero.gradient_accumulation_dtype, zero.communication_data_type)
    otherwise = (zero.partition_gradients, zero.cpu_offload, zero.zenflow, zero.has_moe_layers, zero.overlap_comm)
    return (
        dist.get_world_size() == 1
        and engine.device.type == "cpu"
        and {*precisions, zero.master_weights_and_grads_dtype} == {torch.float32}
        and zero.torch_autocast_gradscaler is None
        and not any(otherwise)
        and zero.gradient_predivide_factor == 1.0
        and not any(any(padding) for padding in zero.round_robin_bit16_padding)
        and not engine.wall_clock_breakdown()  # it reads timers inside the step
    )


class _ShortStep:
    """Stands in for the `step` of a `DeepSpeedZeroOptimizer`."""

    def __init__(self, zero: Any) -> None:
        self.zero = zero
        self._flat_gradients = [torch.zeros_like(flat) for flat in zero.bit16_groups_flat]
        for master, flat in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups_flat, strict=True):
            master.data = flat.data
        zero._link_all_hp_params()

    def take_gradients(self, pipeline_parallel: bool = False) -> None:
        """Stand in for `reduce_gradients`; behind the last backward of a step."""
        zero = self.zero
        for group, parameters in enumerate(zero.params_in_partition):
            zero.averaged_gradients[group] = [
                torch.zeros_like(one) if one.grad is None else one.grad for one in parameters
            ]
            for one in parameters:
                one.grad = None

    @torch.no_grad()
    def __call__(self, closure: Any = None) -> None:
        """Clip the gradients and let the optimizer step, unless one is not finite."""
        zero = self.zero
        norm = self._gradient_norm()
        zero.overflow = not bool(torch.isfinite(norm))
        zero._global_grad_norm = float("inf") if zero.overflow else norm
        for group, master in enumerate(zero.single_partition_of_fp32_groups):
            gradients, zero.averaged_gradients[group] = zero.averaged_gradients[group], None
            if not zero.overflow:
                self._fill(self._flat_gradients[group], gradients, norm)
                master.grad = self._flat_gradients[group]
                zero._optimizer_step(group)
                master.grad = None

    def _gradient_norm(self) -> Tensor:
        """Return the 2-norm of all gradients, fp32 []; squares are summed in fp64."""
        norms = []
        for gradients in self.zero.averaged_gradients.values():
            square = sum_of_squares(gradients)
            if square is None:
                parts = [torch.linalg.vector_norm(one.double()) for one in gradients]
                square = torch.stack(parts).pow(2.0).sum().float()
            norms.append(square.pow(0.5))
        return torch.linalg.vector_norm(torch.stack(norms))

    def _fill(self, flat: Tensor, gradients: list[Tensor], norm: Tensor) -> None:
        """Write the clipped gradients end to end; what is behind them stays zero."""
        factor = torch.ones(())
        if self.zero.clip_grad > 0.0:
            factor = 1.0 / torch.clamp((norm + 1e-6) / self.zero.clip_grad, min=1.0)
        begin = 0
        for one in gradients:
            torch.mul(one.reshape(-1), factor, out=flat[begin : begin + one.numel()])
            begin += one.numel()


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return the sum of the squares of fp32 tensors on the CPU, fp32 [], or None where its last bit is in doubt.

    The sum is rounded to fp32 from fp64, in which n additions of squares, in any order, are within n units of 2^-53 of
    the exact sum (Higham, Accuracy and Stability of Numerical Algorithms, 4.2). Where both ends of twice that, and of
    what a root of each tensor's sum and its square may add, are rounded to one number, DeepSpeed's order gives it too.
    """
    wide = torch.empty(_SQUARED_TOGETHER, dtype=torch.float64)
    parts = [part for one in tensors for part in one.reshape(-1).split(_SQUARED_TOGETHER)]
    norms = torch.stack([torch.linalg.vector_norm(wide[: len(part)].copy_(part)) for part in parts])
    square = norms.pow(2.0).sum()
    if len(parts) == len(tensors):  # DeepSpeed's order
        return square.float()
    doubt = 2.1 * 2.0**-53 * (max(one.numel() for one in tensors) + len(parts) + 8)
    low, high = (square * (1 - doubt)).float(), (square * (1 + doubt)).float()
    return low if bool(low == high) else None
