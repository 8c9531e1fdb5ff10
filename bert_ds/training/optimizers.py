"""The door from the optimizer section of a recipe to a torch optimizer, and the guard in front of its step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from bert_ds.optimizer_config import (
    AdamWConfig,
    ApexFusedLambConfig,
    DeepSpeedCpuAdamConfig,
    DeepSpeedFusedAdamConfig,
    DeepSpeedFusedLambConfig,
    LambConfig,
    LansConfig,
    LionConfig,
    OptimizerConfig,
    StableAdamWConfig,
)
from bert_ds.run_config import ConfigError
from bert_ds.training.elementwise_optimizers import Lion, StableAdamW
from bert_ds.training.lamb import Lamb, LambFlags, Lans
from bert_ds.training.param_groups import NO_DECAY_PATTERNS, NamedParameters, decay_groups, decay_per_tensor

_OWN: dict[type, Any] = {LambConfig: Lamb, LansConfig: Lans, StableAdamWConfig: StableAdamW, LionConfig: Lion}
_LAMB_FLAGS = (
    "bias_correction",
    "correct_lr",
    "grad_averaging",
    "adam_w_mode",
    "use_nvlamb",
    "min_trust",
    "max_trust",
    "weight_norm_clamp",
)


def make_optimizer(
    config: OptimizerConfig,
    named_parameters: NamedParameters,
    *,
    no_decay_patterns: Sequence[str] = NO_DECAY_PATTERNS,
) -> Optimizer:
    """Return the optimizer of a recipe over the trainable parameters; call it before `deepspeed.initialize`.

    Args:
        config: the optimizer section.
        named_parameters: `model.named_parameters()`; frozen parameters are left out.
        no_decay_patterns: names of the parameters that are not decayed.

    Raises:
        ConfigError: a foreign kernel is not installed or cannot be built here.
    """
    parameters = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if type(config) in _OWN:
        return _own(config, parameters, patterns=no_decay_patterns)
    groups = decay_groups(parameters, config.weight_decay, patterns=no_decay_patterns)
    if isinstance(config, AdamWConfig):
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    try:
        return _foreign(config, groups)
    except Exception as error:  # a kernel that is missing or does not compile fails in many ways
        raise ConfigError(f'optimizer.type "{config.type}" is not available here: {error}') from error


def _own(config: Any, parameters: NamedParameters, *, patterns: Sequence[str]) -> Optimizer:
    """One group, decay per tensor: what an optimizer that is exact under ZeRO wants."""
    settings = {"lr": config.lr, "betas": config.betas}
    if not isinstance(config, LionConfig):
        settings["eps"] = config.eps
    if isinstance(config, LambConfig | LansConfig):
        flags = {name: getattr(config, name) for name in _LAMB_FLAGS if hasattr(config, name)}
        settings["flags"] = LambFlags(**flags)
    decay_of = decay_per_tensor(parameters, config.weight_decay, patterns=patterns)
    return _OWN[type(config)](parameters, weight_decay_of=decay_of, **settings)


def _foreign(config: Any, groups: list[dict[str, Any]]) -> Optimizer:
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "bias_correction": config.bias_correction}
    match config:
        case DeepSpeedFusedAdamConfig():
            from deepspeed.ops.adam import FusedAdam

            return FusedAdam(groups, adam_w_mode=True, **settings)
        case DeepSpeedCpuAdamConfig():
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        case DeepSpeedFusedLambConfig():
            from deepspeed.ops.lamb import FusedLamb

            return FusedLamb(groups, min_coeff=config.min_coeff, max_coeff=config.max_coeff, **settings)
        case ApexFusedLambConfig():
            from apex.optimizers import FusedLAMB

            own = ("grad_averaging", "adam_w_mode", "use_nvlamb")
            # apex clips by itself; DeepSpeed already has.
            return FusedLAMB(groups, max_grad_norm=0.0, **settings, **{name: getattr(config, name) for name in own})
    raise ConfigError(f'optimizer.type "{config.type}" is unknown')


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
