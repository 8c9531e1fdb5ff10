"""LAMB and LANS that are exact under DeepSpeed ZeRO 0, 1, 2 and 3.

Under ZeRO a plain LAMB takes one trust ratio per flat shard; this one takes one per tensor, at the price of one
all-reduce of two fp64 numbers per tensor and step. Each tensor: moments m, v with t steps, c = 1 - beta^t,

    u = (m / c1) / (sqrt(v / c2) + eps) + decay w        w -= lr r u        r = |w| / |u|, 1 where either norm is 0

LAMB: You et al. 2020, arXiv 1904.00962. LANS: Zheng et al. 2020, arXiv 2006.13484.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bert_ds.training.optimizers.sharded_optimizer import (
    GroupStep,
    NamedParameters,
    RecipeContext,
    ShardedOptimizer,
    sum_over_ranks,
)
from bert_ds.training.optimizers.trust_statistics import RecordedRows, TrustStatistics, read_statistics
from bert_kernels.flat_shard import LambScalars, on_device
from bert_kernels.lamb import gradient_squares, lamb_apply, lamb_moments, lans_apply, lans_moments


@dataclass(frozen=True, kw_only=True)
class LambFlags:
    """Which LAMB: the differences between the published versions and their implementations."""

    bias_correction: bool = True
    """Divide the moments by 1 - beta^t."""
    correct_lr: bool = False
    """Multiply lr by sqrt(1 - beta2^t) / (1 - beta1^t) instead, decay included (DeepSpeed's kernel)."""
    grad_averaging: bool = True
    """Weigh the gradient by 1 - beta1 in the first moment, else by 1."""
    adam_w_mode: bool = True
    """Decay in the update (True) or added to the gradient before the moments (False)."""
    use_nvlamb: bool = False
    """Trust ratio for every tensor (True, the paper) or only for those with decay (False, NVIDIA's BERT recipe)."""
    min_trust: float = 0.0
    """Lower clamp of a measured ratio; a ratio that is 1 because a norm is 0 is not clamped."""
    max_trust: float | None = None
    """Upper clamp of a measured ratio; 1.0 is LAMBC."""
    weight_norm_clamp: tuple[float, float] | None = None
    """The paper's phi: |w| is clamped to this range before the ratio is taken."""

    def __post_init__(self) -> None:
        if self.max_trust is not None and self.min_trust > self.max_trust:
            raise ValueError(f"min_trust {self.min_trust} is larger than max_trust {self.max_trust}")
        if self.min_trust < 0 or (self.max_trust is not None and self.max_trust <= 0):
            raise ValueError(f"min_trust {self.min_trust} must be >= 0 and max_trust {self.max_trust} > 0")
        clamp = self.weight_norm_clamp
        if clamp is not None and not 0 <= clamp[0] <= clamp[1]:
            raise ValueError(f"weight_norm_clamp {clamp} must be (low, high) with 0 <= low <= high")
        if self.correct_lr and self.bias_correction:
            raise ValueError("correct_lr replaces bias_correction: switch one of them off")


class Lamb(ShardedOptimizer):
    """LAMB with one trust ratio per tensor at any ZeRO stage and world size."""

    default_flags: ClassVar[LambFlags] = LambFlags()
    kernels: str = "auto"
    """The recipe's training.kernels: which side of `bert_kernels.lamb` computes."""

    def __init__(
        self,
        named_parameters: NamedParameters,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        weight_decay_of: Callable[[nn.Parameter], float] | None = None,
        flags: LambFlags | None = None,
    ) -> None:
        """Take `model.named_parameters()`, before `deepspeed.initialize`.

        Args:
            named_parameters: all parameters, in one group; names are for messages and statistics.
            lr: learning rate; a schedule may change it in `param_groups`.
            betas: decay rates of the two moments.
            eps: added to the root of the second moment.
            weight_decay: decay of every parameter, unless weight_decay_of is given.
            weight_decay_of: decay of each trainable parameter.
            flags: which LAMB; by default the one of NVIDIA's BERT recipe, as in the recipes of this project. LANS takes
                a ratio for every tensor.
        """
        settings = adam_settings(lr, betas, eps)
        super().__init__(named_parameters, settings, weight_decay=weight_decay, weight_decay_of=weight_decay_of)
        self.flags = flags if flags is not None else self.default_flags
        self._records: dict[int, RecordedRows] = {}

    @classmethod
    def of_recipe(cls, named_parameters: NamedParameters, context: RecipeContext) -> Lamb:
        """Return the optimizer that a recipe describes: what is no number of Adam's is a flag."""
        settings = dict(context.settings)
        common = {name: settings.pop(name) for name in ("lr", "betas", "eps")}
        flags = replace(cls.default_flags, **settings)
        optimizer = cls(named_parameters, weight_decay_of=context.weight_decay_of, flags=flags, **common)
        optimizer.kernels = context.kernels
        return optimizer

    def trust_statistics(self) -> dict[str, TrustStatistics]:
        """Return ratio and norms of every tensor at its last step, by name; the same on all ranks (host sync)."""
        return read_statistics(self._records.values())

    def _update(self, groups: Sequence[GroupStep]) -> None:
        sums = [group.zeros(2) for group in groups]
        for group, sums_R2 in zip(groups, sums, strict=True):
            for shard in group.shards:
                scalars = self._scalars(group.settings, shard.step)
                lamb_moments(shard.flat, scalars, sums_R2=sums_R2, kernels=self.kernels)
        sum_over_ranks(groups, sums)
        for group, sums_R2 in zip(groups, sums, strict=True):
            ratios_R = trust_ratios(sums_R2, self._adapted(group, sums_R2.device), self.flags)
            self._record(group, ratios_R, sums_R2)
            for shard in group.shards:
                scalars = self._scalars(group.settings, shard.step)
                lr = float(group.settings["lr"]) * self._lr_factor(group.settings, shard.step)
                steps_R = group.scale_by_rate(ratios_R).float()
                lamb_apply(shard.flat, scalars, ratios_R=steps_R, lr=lr, kernels=self.kernels)

    def _scalars(self, settings: dict[str, Any], step: int) -> LambScalars:
        return adam_scalars(settings, step, self.flags)

    def _lr_factor(self, settings: dict[str, Any], step: int) -> float:
        if not self.flags.correct_lr:
            return 1.0
        beta1, beta2 = settings["betas"]
        return math.sqrt(1 - beta2**step) / (1 - beta1**step)

    def _adapted(self, group: GroupStep, device: torch.device) -> Tensor | None:
        """Return which rows get a trust ratio, bool [R]; None for all."""
        if self.flags.use_nvlamb:
            return None
        return on_device(group.layout.rows.decays, torch.float64, device) != 0

    def _record(self, group: GroupStep, ratios_R: Tensor, sums_R2: Tensor) -> None:
        names = group.layout.names
        if len(group.shards) < len(group.layout.shards):  # whole tensors, some without a gradient
            rows = [segment.row for shard in group.shards for segment in shard.flat.table.segments]
            names, ratios_R, sums_R2 = tuple(names[row] for row in rows), ratios_R[rows], sums_R2[rows]
        self._records[id(group.layout)] = RecordedRows(names, ratios_R, sums_R2)


class Lans(Lamb):
    """LANS: gradients normalised per tensor, and two directions with a trust ratio each."""

    default_flags: ClassVar[LambFlags] = LambFlags(use_nvlamb=True)

    def _update(self, groups: Sequence[GroupStep]) -> None:
        squares = [group.zeros(1) for group in groups]
        for group, sums_R1 in zip(groups, squares, strict=True):
            for shard in group.shards:
                gradient_squares(shard.flat, sums_R1=sums_R1)
        sum_over_ranks(groups, squares)
        scales = [
            (sums_R1[:, 0].sqrt() + group.settings["eps"]).reciprocal().float()
            for group, sums_R1 in zip(groups, squares, strict=True)
        ]
        sums = [group.zeros(3) for group in groups]
        for group, scales_R, sums_R3 in zip(groups, scales, sums, strict=True):
            for shard in group.shards:
                scalars = self._scalars(group.settings, shard.step)
                lans_moments(shard.flat, scalars, grad_scales_R=scales_R, sums_R3=sums_R3)
        sum_over_ranks(groups, sums)
        for group, scales_R, sums_R3 in zip(groups, scales, sums, strict=True):
            self._apply(group, scales_R, sums_R3)

    def _apply(self, group: GroupStep, scales_R: Tensor, sums_R3: Tensor) -> None:
        adapted = self._adapted(group, sums_R3.device)
        by_momentum = trust_ratios(sums_R3[:, :2], adapted, self.flags)
        by_gradient = trust_ratios(sums_R3[:, ::2], adapted, self.flags)
        self._record(group, by_momentum, sums_R3)
        for shard in group.shards:
            scalars = self._scalars(group.settings, shard.step)
            lr = float(group.settings["lr"])
            sizes = [scalars.beta1 * by_momentum, scalars.beta3 * by_gradient]
            sizes_R2 = lr * torch.stack([group.scale_by_rate(size_R) for size_R in sizes], dim=1)
            lans_apply(shard.flat, scalars, grad_scales_R=scales_R, sizes_R2=sizes_R2.float())


def trust_ratios(sums_R2: Tensor, adapted_R: Tensor | None, flags: LambFlags) -> Tensor:
    """Return the trust ratio of every row from (|w|^2, |u|^2), fp64 [R].

    Args:
        sums_R2: fp64 [R, 2], complete over the ranks.
        adapted_R: bool [R], rows that get a ratio; None for all. The others get 1.
        flags: clamps of |w| and of the ratio.
    """
    weight_norms, update_norms = sums_R2.sqrt().unbind(dim=1)
    if flags.weight_norm_clamp is not None:
        weight_norms = weight_norms.clamp(*flags.weight_norm_clamp)
    measured = (weight_norms > 0) & (update_norms > 0)
    if adapted_R is not None:
        measured &= adapted_R
    ratios = (weight_norms / update_norms).clamp(flags.min_trust, flags.max_trust)
    return torch.where(measured, ratios, torch.ones_like(ratios))


def adam_settings(lr: float, betas: tuple[float, float], eps: float) -> dict[str, Any]:
    """Check and return the settings of a parameter group with Adam's moments."""
    if not lr >= 0.0:
        raise ValueError(f"lr is {lr}, must be at least 0")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas are {betas}, must be two numbers in [0, 1)")
    if not eps >= 0.0:
        raise ValueError(f"eps is {eps}, must be at least 0")
    return {"lr": lr, "betas": (float(betas[0]), float(betas[1])), "eps": eps}


def adam_scalars(settings: dict[str, Any], step: int, flags: LambFlags) -> LambScalars:
    """Return the constants of step `step` (1 is the first)."""
    beta1, beta2 = settings["betas"]
    return LambScalars(
        beta1=beta1,
        beta2=beta2,
        beta3=1 - beta1 if flags.grad_averaging else 1.0,
        eps=settings["eps"],
        correction1=1 - beta1**step if flags.bias_correction else 1.0,
        correction2=1 - beta2**step if flags.bias_correction else 1.0,
        decay_in_update=flags.adam_w_mode,
    )
