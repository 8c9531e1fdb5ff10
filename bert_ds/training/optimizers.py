"""The door from an optimizer section of the recipe to a torch optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from bert_ds.run_config import AdamWConfig, LambConfig
from bert_ds.training.lamb import Lamb, LambFlags
from bert_ds.training.param_groups import NO_DECAY_PATTERNS, NamedParameters, decay_groups, decay_per_tensor


def make_optimizer(
    config: AdamWConfig | LambConfig,
    named_parameters: NamedParameters,
    *,
    no_decay_patterns: Sequence[str] = NO_DECAY_PATTERNS,
) -> Optimizer:
    """Return the optimizer of a recipe over the given parameters.

    Args:
        config: the optimizer section.
        named_parameters: `model.named_parameters()`; frozen parameters are left out.
        no_decay_patterns: names of the parameters that are not decayed.
    """
    named_parameters = list(named_parameters)
    if isinstance(config, LambConfig):
        return _lamb(config, named_parameters, no_decay_patterns=no_decay_patterns)
    groups = decay_groups(named_parameters, config.weight_decay, patterns=no_decay_patterns)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _lamb(config: LambConfig, named_parameters: NamedParameters, *, no_decay_patterns: Sequence[str]) -> Optimizer:
    named_parameters = list(named_parameters)
    flags = LambFlags(
        bias_correction=config.bias_correction,
        correct_lr=config.correct_lr,
        grad_averaging=config.grad_averaging,
        adam_w_mode=config.adam_w_mode,
        use_nvlamb=config.use_nvlamb,
        min_trust=config.min_trust,
        max_trust=config.max_trust,
        weight_norm_clamp=config.weight_norm_clamp,
    )
    return Lamb(
        named_parameters,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay_of=decay_per_tensor(named_parameters, config.weight_decay, patterns=no_decay_patterns),
        flags=flags,
    )


class StepGuard:
    """Stands in front of `optimizer.step` and lets it act only while armed.

    Two callers need it. DeepSpeed's stage 0 wrapper for bf16 and fp16 calls `optimizer.step()` once with zero
    gradients while it is built (`unfused_optimizer.initialize_optimizer_states`), which would decay the weights and
    advance the step count before training starts. And where the engine drives the optimizer directly (stage 0 without
    a wrapper) nothing else keeps a NaN gradient out of the weights.

    It replaces the bound method on the instance: DeepSpeed asks for the optimizer's exact type.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._step = optimizer.step
        self.armed = False
        self.num_ignored = 0
        optimizer.step = self  # type: ignore[method-assign, assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward the call, or count it as ignored."""
        if self.armed:
            return self._step(*args, **kwargs)
        self.num_ignored += 1
        return None


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the rate of every group of a torch optimizer or of DeepSpeed's wrapper around one."""
    for group in optimizer.param_groups:
        group["lr"] = lr
