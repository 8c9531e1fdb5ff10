"""AdamW, StableAdamW and Lion with a weight decay per parameter, under DeepSpeed ZeRO 0, 1, 2 and 3.

One parameter group, as for LAMB: decay kept out of `param_groups` survives DeepSpeed's ZeRO-3 universal loader, and a
group is never so small that a rank owns nothing of it. AdamW and Lion are elementwise; StableAdamW divides its rate by
the root mean square of each whole tensor's update, which is summed over the ranks. AdamW runs on torch's fused kernel.

AdamW: Loshchilov and Hutter 2019, arXiv 1711.05101. StableAdamW: Wortsman et al. 2023, arXiv 2304.13013, algorithm 2.
Lion: Chen et al. 2023, arXiv 2302.06675.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bert_ds.training.optimizers.lamb import LambFlags, adam_scalars, adam_settings
from bert_ds.training.optimizers.sharded_optimizer import (
    GroupStep,
    NamedParameters,
    ShardedOptimizer,
    ShardStep,
    sum_over_ranks,
)
from bert_kernels.flat_shard import Piece
from bert_kernels.lamb import adam_denominator, squared_norm, update_moments

_FLAGS = LambFlags()


class AdamW(ShardedOptimizer):
    """AdamW; decay is multiplied by the learning rate, as torch does it."""

    def __init__(
        self,
        named_parameters: NamedParameters,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        weight_decay_of: Callable[[nn.Parameter], float] | None = None,
    ) -> None:
        """Take `model.named_parameters()`; arguments as `Lamb`."""
        settings = adam_settings(lr, betas, eps)
        super().__init__(named_parameters, settings, weight_decay=weight_decay, weight_decay_of=weight_decay_of)

    def _update(self, groups: Sequence[GroupStep]) -> None:
        for group in groups:
            by_kind: dict[tuple[int, float, float], list[Piece]] = {}
            for shard in group.shards:
                for segment in shard.flat.table.segments:
                    kind = (shard.step, segment.decay, group.lr_of(segment.row))
                    by_kind.setdefault(kind, []).append(shard.flat.cut(segment))
            for (step, decay, lr), pieces in by_kind.items():
                _fused_adamw(pieces, group.settings, step=step, decay=decay, lr=lr)


def _fused_adamw(pieces: Sequence[Piece], settings: dict[str, Any], *, step: int, decay: float, lr: float) -> None:
    """One kernel over all segments of one step, decay and rate; torch's own AdamW(fused=True) ends in the same call."""
    params, grads, exp_avgs, exp_avg_sqs = (list(buffers) for buffers in zip(*pieces, strict=True))
    steps = [torch.full((), float(step), device=params[0].device)] * len(params)
    beta1, beta2 = settings["betas"]
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=decay,
        eps=settings["eps"],
        amsgrad=False,
        maximize=False,
    )


class StableAdamW(AdamW):
    """AdamW whose rate is divided, per tensor, by the root mean square of g / sqrt(v) where that exceeds 1."""

    def _update(self, groups: Sequence[GroupStep]) -> None:
        sums = [group.zeros(2) for group in groups]
        for group, sums_R2 in zip(groups, sums, strict=True):
            for shard in group.shards:
                self._moments_and_squares(shard, group, sums_R2)
        sum_over_ranks(groups, sums)
        for group, sums_R2 in zip(groups, sums, strict=True):
            squares_R, counts_R = sums_R2.unbind(dim=1)
            lr_R = float(group.settings["lr"]) / (squares_R / counts_R).sqrt().clamp(min=1.0)
            lr_R = group.scale_by_rate(lr_R)
            for shard in group.shards:
                descend(shard, group, lr_R.float())

    def _moments_and_squares(self, shard: ShardStep, group: GroupStep, sums_R2: Tensor) -> None:
        """Update the moments; add the squares of g / max(sqrt(v / c2), eps), and their number, to each row."""
        scalars = adam_scalars(group.settings, shard.step, _FLAGS)
        for segment, piece in shard.flat.pieces():
            update_moments(piece, piece.grad, scalars)
            root = piece.exp_avg_sq.div(scalars.correction2).sqrt_().clamp_(min=scalars.eps)
            sums_R2[segment.row, 0] += squared_norm(piece.grad / root)
            sums_R2[segment.row, 1] += piece.grad.numel()


class Lion(ShardedOptimizer):
    """Lion: the sign of an interpolated momentum. One moment, so DeepSpeed's universal checkpoints cannot hold it."""

    moment_names: ClassVar[tuple[str, ...]] = ("exp_avg",)

    def __init__(
        self,
        named_parameters: NamedParameters,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        weight_decay_of: Callable[[nn.Parameter], float] | None = None,
    ) -> None:
        """Take `model.named_parameters()`; arguments as `Lamb`."""
        settings = adam_settings(lr, betas, 0.0)
        del settings["eps"]
        super().__init__(named_parameters, settings, weight_decay=weight_decay, weight_decay_of=weight_decay_of)

    def _update(self, groups: Sequence[GroupStep]) -> None:
        for group in groups:
            beta1, beta2 = group.settings["betas"]
            for shard in group.shards:
                for segment, piece in shard.flat.pieces():
                    update = piece.exp_avg.mul(beta1).add_(piece.grad, alpha=1 - beta1).sign_()
                    if segment.decay:
                        update.add_(piece.param, alpha=segment.decay)
                    piece.exp_avg.mul_(beta2).add_(piece.grad, alpha=1 - beta2)
                    piece.param.sub_(update, alpha=group.lr_of(segment.row))


def descend(shard: ShardStep, group: GroupStep, lr_R: Tensor | Sequence[float]) -> None:
    """w -= lr[row] (m / c1 / (sqrt(v / c2) + eps) + decay w), by operations that do not see where a tensor is cut."""
    scalars = adam_scalars(group.settings, shard.step, _FLAGS)
    for segment, piece in shard.flat.pieces():
        update = piece.exp_avg.div(scalars.correction1).div_(adam_denominator(piece, scalars))
        if segment.decay:
            update.add_(piece.param, alpha=segment.decay)
        piece.param.sub_(update.mul_(lr_R[segment.row]))
