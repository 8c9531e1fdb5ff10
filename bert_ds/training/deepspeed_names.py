"""The names inside DeepSpeed that this project relies on, and what a user sees when a release has changed one.

DeepSpeed promises none of them. So they are imported under `named_release`, or looked up by `require_names` when an
engine is built, or read by `parameter_layout` at the first step: each way ends in an error that has the name and
DeepSpeed's version, before a weight is changed. What lies where in a shard is proven against the data besides. Nothing
here imports DeepSpeed.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bert_ds.configuration.recipe.run_config import ConfigError

TESTED = "0.19.8"

ENGINE = (
    *("backward", "step", "train", "eval", "module", "device", "optimizer", "basic_optimizer", "monitor"),
    *("gradient_accumulation_steps", "set_gradient_accumulation_boundary", "global_samples", "destroy"),
    *("train_batch_size", "train_micro_batch_size_per_gpu"),
    *("was_step_applied", "get_global_grad_norm", "get_data_types", "fp16_enabled"),
    *("bf16_master_weights_and_gradients", "fp16_master_weights_and_gradients"),
    *("torch_autocast_enabled", "torch_autocast_dtype", "autotp_size", "super_offload", "zenflow_config"),
    *("zero_optimization", "zero_optimization_stage", "zero_offload_optimizer", "zero_partial_offload"),
    *("zero_compute_grad_norm", "zero_elastic_checkpoint", "zero_round_robin_gradients"),
    *("checkpoint_engine", "_copy_recovery_script", "save_checkpoint", "load_checkpoint", "_config"),
    "wall_clock_breakdown",
)
"""Of the engine."""

CONFIG = ("load_universal_checkpoint",)
"""Of the engine's `_config`."""

WRAPPER = ("overflow", "param_groups")
"""Of the wrapper around the optimizer, where there is one."""

MASTERS = ("fp32_groups",)
"""Of the wrapper without ZeRO, in low precision."""

OFFLOADED = ("cpu_offload", "averaged_gradients")
"""Of the wrapper of stages 1 and 2 with the optimizer on the CPU."""

ONE_RANK = (
    *("dtype", "gradient_accumulation_dtype", "communication_data_type", "master_weights_and_grads_dtype"),
    *("partition_gradients", "cpu_offload", "zenflow", "has_moe_layers", "overlap_comm", "torch_autocast_gradscaler"),
    *("gradient_predivide_factor", "round_robin_bit16_padding", "clip_grad", "overflow", "_global_grad_norm"),
    *("bit16_groups_flat", "single_partition_of_fp32_groups", "params_in_partition", "averaged_gradients"),
    *("_grad_acc_hooks", "_link_all_hp_params", "_optimizer_step", "reduce_gradients", "step"),
)
"""Of the wrapper of stages 1 and 2 of DeepSpeed's own, for `one_rank`."""

ZERO3 = ("fp16_groups", "fp32_partitioned_groups_flat", "swap_optimizer")
"""Of the wrapper of stage 3."""

PARAMETER_FLAT = ("_dp_group", "_hp_mapping")
"""Of every trainable parameter at stages 1 and 2."""

PARAMETER_ZERO3 = ("ds_id", "ds_numel", "ds_shape", "ds_tensor", "ds_process_group", "_z3_optimizer")
"""Of every trainable parameter at stage 3."""

PART_ZERO3 = ("ds_numel",)
"""Of the `ds_tensor` of a parameter at stage 3: this rank's part."""


def require_names(engine: Any) -> None:
    """Raise ConfigError unless a built engine has every name that this project will read from it."""
    _require(engine, ENGINE, "the engine")
    _require(engine._config, CONFIG, "the engine's configuration")
    stage = int(engine.zero_optimization_stage())
    if engine.optimizer is not engine.basic_optimizer:
        _require(engine.optimizer, WRAPPER, "the optimizer's wrapper")
        if stage == 0:
            _require(engine.optimizer, MASTERS, "the optimizer's wrapper")
    if stage in (1, 2) and _is_offloaded(engine):
        _require(engine.optimizer, OFFLOADED, "the optimizer of ZeRO-1 and 2")
    if stage == 3:
        _require(engine.optimizer, ZERO3, "the ZeRO-3 optimizer")
    names = {0: (), 3: PARAMETER_ZERO3}.get(stage, PARAMETER_FLAT)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            _require(parameter, names, name)
            if stage == 3:
                _require(parameter.ds_tensor, PART_ZERO3, f"ds_tensor of {name}")


def require_one_rank_names(wrapper: Any) -> None:
    """Raise ConfigError unless the wrapper of stages 1 and 2 has every name that `one_rank` reads or replaces."""
    _require(wrapper, ONE_RANK, "the optimizer of ZeRO-1 and 2")


def missing_name(what: str, attribute: str) -> str:
    """Return the sentence that says which name is gone, and from which DeepSpeed."""
    return f"{what} has no {attribute!r} in DeepSpeed {deepspeed_version()}, {_ADVICE}"


@contextmanager
def named_release() -> Iterator[None]:
    """Say which DeepSpeed it is when a name cannot be imported from it."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"DeepSpeed {deepspeed_version()}: {error}, {_ADVICE}") from error


def deepspeed_version() -> str:
    """Return the version of the DeepSpeed in use."""
    loaded = getattr(sys.modules.get("deepspeed"), "__version__", None)
    return loaded or importlib.metadata.version("deepspeed")


_ADVICE = f"on which this project relies; it was tested with {TESTED}"


def _require(holder: Any, attributes: tuple[str, ...], what: str) -> None:
    for attribute in attributes:
        if not hasattr(holder, attribute):
            raise ConfigError(missing_name(what, attribute))


def _is_offloaded(engine: Any) -> bool:
    offload = engine.zero_offload_optimizer()
    return offload is not None and str(getattr(offload.device, "value", offload.device)) == "cpu"
