"""The one place that builds a DeepSpeed engine."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.training.checkpoints.checkpoint_engine import VerifiedCheckpointEngine
from bert_ds.training.deepspeed_names import named_release, require_names
from bert_ds.training.one_rank import shorten_step
from bert_ds.training.optimizers.factory import StepGuard, refuse_unsupported_settings, share_replicated_work

with named_release():
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param


def make_engine(model: nn.Module, optimizer: Optimizer, ds_config: dict[str, Any]) -> DeepSpeedEngine:
    """Return the engine; every rank calls this, after `deepspeed.init_distributed`.

    Weights, optimizer state and step count are the same before and after, in fp32 too where the engine computes in bf16
    or fp16. The engine saves and loads through `VerifiedCheckpointEngine` only.

    Args:
        model: on the CPU, or already partitioned by `deepspeed.zero.Init`.
        optimizer: over the model's parameters.
        ds_config: the resolved configuration, every value written out.

    Raises:
        ValueError: the configuration switches off what keeps a NaN out of the weights.
        ConfigError: the optimizer would be wrong under the configuration, or this DeepSpeed lacks a name that is used.
    """
    _refuse_unguarded(ds_config)
    _refuse_unsupported_precision(ds_config)
    names = parameter_names(model, optimizer)
    weights = _full_precision_weights(model, ds_config)
    guard = StepGuard(optimizer)
    _import_muon_uncompiled()
    with _prints_logged():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    require_names(engine)
    refuse_unsupported_settings(engine)
    share_replicated_work(optimizer, zero_stage=int(engine.zero_optimization_stage()))
    engine.checkpoint_engine = VerifiedCheckpointEngine(parameter_names=names)
    # DeepSpeed copies zero_to_fp32.py beside every checkpoint: a script that unpickles, and a write that may fail on
    # rank 0 alone, inside a collective.
    engine._copy_recovery_script = lambda save_path: None
    _restore_masters(engine, weights)
    shorten_step(engine)
    if engine.optimizer is optimizer:
        guard.armed = True
    else:  # DeepSpeed's wrapper drops a step with gradients that are not finite, on all ranks alike
        guard.remove()
    return engine


@contextmanager
def _prints_logged() -> Iterator[None]:
    """Let what DeepSpeed prints go where it logs: its bf16 optimizer prints the memory, whatever the level."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            yield
        finally:
            for line in filter(str.strip, printed.getvalue().splitlines()):
                logging.getLogger("DeepSpeed").info(line.rstrip())


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon with its functions compiled at their first call, not now.

    Every wrapper of ZeRO imports it to ask whether the optimizer is one, and torch.compile then imports all that a
    compiler needs, which takes two seconds. A release that compiles it otherwise takes them.
    """
    with named_release():
        compiler = importlib.import_module("deepspeed.runtime.compiler")
        with mock.patch.object(compiler, "compile", lambda: _compiled_at_first_call, create=True):
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")


def _compiled_at_first_call(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = functools.cache(lambda: torch.compile(function))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call


def parameter_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Return the names of the parameters of each group, in the optimizer's order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


def _full_precision_weights(model: nn.Module, ds_config: dict[str, Any]) -> dict[str, Tensor]:
    """Return a copy of the trainable weights if DeepSpeed is about to round them; it makes its masters afterwards."""
    rounds = any(ds_config.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
    # The masters of reordered gradients cannot be set by name (`_hp_mapping` ignores the order), and a model that
    # zero.Init has already cut was rounded there.
    reordered = ds_config.get("zero_optimization", {}).get("round_robin_gradients", False)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not rounds or reordered or any(hasattr(parameter, "ds_id") for parameter in trainable.values()):
        return {}
    return {name: parameter.detach().float().clone() for name, parameter in trainable.items()}


def _restore_masters(engine: DeepSpeedEngine, weights: dict[str, Tensor]) -> None:
    """Give the fp32 masters the weights as they were before DeepSpeed rounded them."""
    if not weights:
        return
    if engine.zero_optimization():
        for name, parameter in engine.module.named_parameters():
            if name in weights:
                _set_master(parameter, weights[name])
        return
    for names, masters in zip(engine.checkpoint_engine.parameter_names, engine.optimizer.fp32_groups, strict=True):
        for name, master in zip(names, masters, strict=True):
            master.data.copy_(weights[name])


def _set_master(parameter: Any, weight: Tensor) -> None:
    """Set the part of a sharded fp32 master that this rank owns."""
    if not hasattr(parameter, "ds_id"):
        safe_set_full_fp32_param(parameter, weight)
        return
    # safe_set_full_fp32_param of stage 3 fails where the ranks do not divide the weight: its shards are padded.
    size, rank = parameter.ds_tensor.numel(), dist.get_rank(parameter.ds_process_group)
    padding = size * dist.get_world_size(parameter.ds_process_group) - weight.numel()
    padded = torch.nn.functional.pad(weight.flatten(), (0, padding))
    safe_set_local_fp32_param(parameter, padded[rank * size : (rank + 1) * size])


def _refuse_unsupported_precision(ds_config: dict[str, Any]) -> None:
    accelerator = get_accelerator()
    supported = {"bf16": accelerator.is_bf16_supported, "fp16": accelerator.is_fp16_supported}
    for name, is_supported in supported.items():
        if ds_config.get(name, {}).get("enabled") and not is_supported():
            raise ConfigError(
                f'training.precision is "{name}", which DeepSpeed does not support on this machine\'s '
                f"{accelerator.device_name()}; wanted {'fp32' if name == 'bf16' else 'bf16 or fp32'}"
            )


def _refuse_unguarded(ds_config: dict[str, Any]) -> None:
    zero = ds_config.get("zero_optimization", {})
    if zero.get("compute_grad_norm", True) is False:
        raise ValueError("zero_optimization.compute_grad_norm is false: a NaN would reach the weights; wanted true")
    bf16 = ds_config.get("bf16", {})
    if bf16.get("enabled") and bf16.get("check_grad_overflow", True) is False:
        raise ValueError("bf16.check_grad_overflow is false: a NaN would reach the weights; wanted true")
    if ds_config.get("fp16", {}).get("enabled") and zero.get("stage", 0) == 0:
        raise ValueError(
            "fp16 with zero_optimization.stage 0: DeepSpeed never scales that loss; wanted stage 1, 2 or 3"
        )
