"""Each setting that a DeepSpeed file may hold reaches the configuration object that DeepSpeed's engine reads."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from config_cases import RECIPE, changed, launched, write_json
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import BaseModel

from bert_ds.configuration.deepspeed_file.ds_config import load_ds_config, load_pair, resolve_ds_config
from bert_ds.configuration.deepspeed_file.ds_keys import default_of, leaves, setting_names
from bert_ds.configuration.recipe.run_config import ConfigError

VALUES = (True, False, 3, 4, 0.5, 2.0, "x", "fp32", "bf16", "cpu", "/tmp/x", "FAIL", "create", ["x"], {"x": "y"}, None)
RUN = changed(RECIPE, "optimizer", {"type": "adamw", "lr": 0.002})
BASES: tuple[dict[str, Any], ...] = (
    {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}},
    {"zero_optimization": {"stage": 1}},
    {"zero_optimization": {"stage": 1}, "wandb": {"enabled": False}, "comet": {"enabled": False}},
)
"""Files to which a setting is added, until one may hold it."""

REASONS = {
    "bf16.enabled": "can only repeat training.precision",
    "data_types.param_dtype": "can only repeat training.precision",
    "zero_allow_untested_optimizer": "can only repeat what this project sets",
    "zero_force_ds_cpu_optimizer": "can only repeat what this project sets",
    "optimizer.legacy_fusion": "can only be off: the optimizer is built by this project",
    "expert_parallel.enabled": "can only be off",
    "tensor_parallel.replace_with_kernel_inject": "can only be off",
    "weight_quantization.enabled": "can only be off",
}
"""Settings of which no accepted value changes DeepSpeed's configuration, and why."""


def read(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What DeepSpeed gets of a file, None where the file is refused."""
    file = write_json(folder, "ds.json", settings)
    try:
        load_ds_config(file)  # refuses most of them, and reads no recipe
        run, ds = load_pair(write_json(folder, "run.json", RUN), file)
        return resolve_ds_config(launched(run), ds, 1)
    except ConfigError:
        return None


def parts(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in DeepSpeed's configuration object by its place, but for the dictionary it was made of."""
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    elif hasattr(value, "__dict__") and not isinstance(value, Enum | type):
        value = vars(value)
    if isinstance(value, dict) and path.count(".") < 6:
        for name, part in value.items():
            if name not in ("_param_dict", "_deprecated_fields_check"):
                yield from parts(part, f"{path}.{name}")
    else:
        yield path, repr(value)


@cache
def base_of(index: int) -> tuple[dict[str, Any], dict[str, str]]:
    """What DeepSpeed gets of a base, and what its configuration object makes of it."""
    with tempfile.TemporaryDirectory() as folder:
        effective = read(Path(folder), BASES[index])
    assert effective is not None
    return dict(leaves(effective)), dict(parts(DeepSpeedConfig(effective)))


@pytest.mark.parametrize("name", setting_names())
def test_a_setting_reaches_deepspeed_or_is_refused(name: str, tmp_path: Path) -> None:
    taken = []
    for index, base in enumerate(BASES):
        before = base_of(index)[0].get(name, default_of(name))
        for value in VALUES:
            if value == before and isinstance(value, bool) == isinstance(before, bool):
                continue
            effective = read(tmp_path, changed(base, name, value))
            if effective is None:
                continue
            taken.append(value)
            if dict(parts(DeepSpeedConfig(effective))) != base_of(index)[1]:
                return
    assert not taken or name in REASONS, taken
