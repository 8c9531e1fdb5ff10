"""The door from the optimizer section of a recipe to a torch optimizer, and the guard in front of its step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from bert_ds.configuration.recipe.optimizer_config import (
    AdamWConfig,
    LambConfig,
    LansConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    OptimizerSettings,
    StableAdamWConfig,
)
from bert_ds.configuration.recipe.precision import Precision
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
from bert_ds.training.optimizers.sharded_optimizer import RecipeContext, ShardedOptimizer
from bert_ds.training.optimizers.zero_limits import unsupported_settings

OWN_OPTIMIZERS: dict[type[OptimizerSettings], type[ShardedOptimizer]] = {
    AdamWConfig: AdamW,
    LambConfig: Lamb,
    LansConfig: Lans,
    StableAdamWConfig: StableAdamW,
    LionConfig: Lion,
    MuonConfig: Muon,
}
"""Ours: one more is a row."""


def make_optimizer(
    config: OptimizerConfig,
    named_parameters: NamedParameters,
    *,
    facts: TensorFacts = NO_FACTS,
    kernels: str = "auto",
    precision: Precision = "fp32",
    lr_scale_of: Callable[[str], float] | None = None,
) -> Optimizer:
    """Return the optimizer of a recipe over the trainable parameters; call it before `deepspeed.initialize`.

    Ours hold all parameters in one group, with a decay per tensor: DeepSpeed's universal checkpoints need that.

    Args:
        config: the optimizer section.
        named_parameters: `model.named_parameters()`; frozen parameters are left out.
        facts: which parameters are not decayed, which hold several weights, which are matrices.
        kernels: "auto", "triton" or "torch", for LAMB; the other optimizers have no Triton kernel.
        precision: what the run computes in: Muon's polynomial on a CPU is evaluated in bf16 only where that is bf16.
        lr_scale_of: factor of the learning rate of a parameter, by name; foreign kernels have one rate.

    Raises:
        ConfigError: a foreign kernel is not installed, cannot be built here, or was given factors; Muon has no matrix.
    """
    parameters = list(named_parameters)
    if type(config) not in OWN_OPTIMIZERS:
        if lr_scale_of is not None:
            raise ConfigError(
                f'optimizer.type "{config.type}" has one learning rate for all layers: wanted one of ours'
            )
        return make_foreign_optimizer(config, decay_groups(parameters, config.weight_decay, patterns=facts.no_decay))
    decay_of = decay_per_tensor(parameters, config.weight_decay, patterns=facts.no_decay)
    settings = config.model_dump(exclude={"type", "weight_decay"})
    context = RecipeContext(settings, decay_of, facts.matrices, kernels, precision)
    optimizer = OWN_OPTIMIZERS[type(config)].of_recipe(parameters, context)
    if lr_scale_of is not None:
        optimizer.declare_rates(lr_scale_of)
    optimizer.declare_parts(facts.equal_parts or {})
    return optimizer


def share_replicated_work(optimizer: Optimizer, *, zero_stage: int) -> None:
    """Let the ranks share the work where each of them holds everything, at stage 0; after `initialize`."""
    if isinstance(optimizer, ShardedOptimizer) and zero_stage == 0:
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

    It replaces the bound method on the instance: DeepSpeed asks for the optimizer's exact type. `make_engine` leaves it
    there only in the second case.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer, self._step = optimizer, optimizer.step
        self.armed = False
        optimizer.step = self  # type: ignore[method-assign, assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward the call while armed."""
        return self._step(*args, **kwargs) if self.armed else None

    def remove(self) -> None:
        """Give the optimizer its own method back."""
        self._optimizer.step = self._step  # type: ignore[method-assign]
