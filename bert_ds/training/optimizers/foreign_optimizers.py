"""Optimizer kernels of DeepSpeed and apex, selected by name for comparison.

Nothing of them is imported before one is chosen. Each either comes back working or says what this machine lacks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from bert_ds.configuration.recipe.optimizer_config import (
    ApexFusedLambConfig,
    DeepSpeedCpuAdamConfig,
    DeepSpeedFusedAdamConfig,
    DeepSpeedFusedLambConfig,
)
from bert_ds.configuration.recipe.run_config import ConfigError

_APEX = "NVIDIA's apex, built from https://github.com/NVIDIA/apex with its CUDA extensions"


def make_foreign_optimizer(config: Any, groups: list[dict[str, Any]]) -> Optimizer:
    """Return the optimizer of a foreign kernel, compiled where it comes as source.

    Args:
        config: its section of a recipe.
        groups: parameter groups with their decay.

    Raises:
        ConfigError: it is not installed or cannot be built or run here; the message says what is missing.
    """
    missing, build = _KINDS[type(config)]
    if lacks := missing():
        raise ConfigError(f'optimizer.type "{config.type}" needs {", ".join(lacks)}')
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "bias_correction": config.bias_correction}
    try:
        return build(config, groups, settings)
    except Exception as error:  # a kernel that does not compile or load fails in many ways
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f'optimizer.type "{config.type}" cannot be built here: {first_line}') from error


def _missing_compiler() -> list[str]:
    tools = {"a C++ compiler (c++, g++ or $CXX)": (os.environ.get("CXX", "c++"), "g++"), "ninja": ("ninja",)}
    return [what for what, names in tools.items() if not any(shutil.which(name) for name in names)]


def _missing_cuda_compiler() -> list[str]:
    from torch.utils.cpp_extension import CUDA_HOME

    lacks = [] if torch.cuda.is_available() else ["a CUDA device"]
    return [*lacks, *([] if CUDA_HOME else ["the CUDA toolkit (nvcc, $CUDA_HOME)"]), *_missing_compiler()]


def _missing_apex() -> list[str]:
    lacks = [] if torch.cuda.is_available() else ["a CUDA device"]
    try:
        from apex.optimizers import FusedLAMB  # noqa: F401
    except Exception as error:  # the package "apex" of PyPI is another one and fails in its own ways
        lacks.append(f"{_APEX}; what is installed as apex, if anything, is not that ({type(error).__name__}: {error})")
    return lacks


def _fused_adam(config: Any, groups: list[dict[str, Any]], settings: dict[str, Any]) -> Optimizer:
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam(groups, adam_w_mode=True, **settings)


def _cpu_adam(config: Any, groups: list[dict[str, Any]], settings: dict[str, Any]) -> Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)


def _fused_lamb(config: Any, groups: list[dict[str, Any]], settings: dict[str, Any]) -> Optimizer:
    from deepspeed.ops.lamb import FusedLamb

    return FusedLamb(groups, min_coeff=config.min_coeff, max_coeff=config.max_coeff, **settings)


def _apex_lamb(config: Any, groups: list[dict[str, Any]], settings: dict[str, Any]) -> Optimizer:
    from apex.optimizers import FusedLAMB

    own = ("grad_averaging", "adam_w_mode", "use_nvlamb")
    # apex clips by itself; DeepSpeed already has.
    return FusedLAMB(groups, max_grad_norm=0.0, **settings, **{name: getattr(config, name) for name in own})


_KINDS: dict[type, tuple[Callable[[], list[str]], Callable[..., Optimizer]]] = {
    DeepSpeedFusedAdamConfig: (_missing_cuda_compiler, _fused_adam),
    DeepSpeedCpuAdamConfig: (_missing_compiler, _cpu_adam),
    DeepSpeedFusedLambConfig: (_missing_cuda_compiler, _fused_lamb),
    ApexFusedLambConfig: (_missing_apex, _apex_lamb),
}
