"""The door from the optimizer section of a recipe to a torch optimizer, and the guard in front of its step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from bert_ds.configuration.recipe.optimizer_config import (
    AdamWConfig,
    LambConfig,
    LansConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    StableAdamWConfig,
)
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.training.optimizers.elementwise_optimizers import AdamW, Lion, StableAdamW
from bert_ds.training.optimizers.foreign_optimizers import make_foreign_optimizer
from bert_ds.training.optimizers.lamb import Lamb, Lans
from bert_ds.training.optimizers.muon import Muon
from bert_ds.training.optimizers.param_groups import (
    NO_FACTS,
    NamedParameters,
    TensorFacts,
    decay_groups,
    decay_per_tensor,
)
from bert_ds.training.optimizers.sharded_optimizer import ShardedOptimizer
from bert_ds.training.optimizers.zero_limits import unsupported_settings

_OWN: dict[type, Any] = {
    AdamWConfig: AdamW,
    LambConfig: Lamb,
    LansConfig: Lans,
    StableAdamWConfig: StableAdamW,
    LionConfig: Lion,
    MuonConfig: Muon,
}
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


_MUON_SETTINGS = ("adamw_lr", "momentum", "nesterov", "ns_coefficients", "ns_steps")


def make_optimizer(
    config: OptimizerConfig,
    named_parameters: NamedParameters,
    *,
    facts: TensorFacts = NO_FACTS,
    kernels: str = "auto",
    lr_scale_of: Callable[[str], float] | None = None,
) -> Optimizer:
    """Return the optimizer of a recipe over the trainable parameters; call it before `deepspeed.initialize`.

    Ours hold all parameters in one group, with a decay per tensor: DeepSpeed's universal checkpoints need that.

    Args:
        config: the optimizer section.
        named_parameters: `model.named_parameters()`; frozen parameters are left out.
        facts: which parameters are not decayed, which hold several weights, which are matrices.
        kernels: "auto", "triton" or "torch", for LAMB; the other optimizers have no Triton kernel.
        lr_scale_of: factor of the learning rate of a parameter, by name; foreign kernels have one rate.

    Raises:
        ConfigError: a foreign kernel is not installed, cannot be built here, or was given factors; Muon has no matrix.
    """
    parameters = list(named_parameters)
    if type(config) not in _OWN:
        if lr_scale_of is not None:
            raise ConfigError(
                f'optimizer.type "{config.type}" has one learning rate for all layers: wanted one of ours'
            )
        return make_foreign_optimizer(config, decay_groups(parameters, config.weight_decay, patterns=facts.no_decay))
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas}
    if not isinstance(config, LionConfig):
        settings["eps"] = config.eps
    if isinstance(config, LambConfig | LansConfig):
        flags = {name: getattr(config, name) for name in _LAMB_FLAGS if hasattr(config, name)}
        settings["flags"] = replace(_OWN[type(config)].default_flags, **flags)
    decay_of = decay_per_tensor(parameters, config.weight_decay, patterns=facts.no_decay)
    if isinstance(config, MuonConfig):
        settings |= {name: getattr(config, name) for name in _MUON_SETTINGS}
        settings["matrices"] = _trainable_matrices(parameters, facts)
    optimizer = _OWN[type(config)](parameters, weight_decay_of=decay_of, **settings)
    if lr_scale_of is not None:
        optimizer.declare_rates(lr_scale_of)
    if isinstance(optimizer, Lamb):
        optimizer.kernels = kernels
    optimizer.declare_parts(facts.equal_parts or {})
    return optimizer


def _trainable_matrices(parameters: Sequence[tuple[str, nn.Parameter]], facts: TensorFacts) -> Sequence[str]:
    names = [name for name, parameter in parameters if parameter.requires_grad]
    if not any(fnmatchcase(name, pattern) for name in names for pattern in facts.matrices):
        raise ConfigError(
            f'optimizer.type "muon" wants a matrix of the layers to train: none of the {len(names)} trainable '
            'parameters is one (are the layers frozen?); wanted "adamw"'
        )
    return facts.matrices


def share_replicated_work(optimizer: Optimizer, *, zero_stage: int) -> None:
    """Let Muon deal its matrices to the ranks where each of them holds everything, at stage 0; after `initialize`."""
    if isinstance(optimizer, Muon) and zero_stage == 0:
        optimizer.replicas = dist.group.WORLD


def refuse_unsupported_settings(engine: Any) -> None:
    """Raise ConfigError if our optimizers would be wrong under a setting of a built engine."""
    if isinstance(engine.basic_optimizer, ShardedOptimizer) and (reasons := unsupported_settings(engine)):
        name = type(engine.basic_optimizer).__name__
        raise ConfigError(f"{name} does not run under this DeepSpeed configuration: " + "; ".join(reasons))


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
