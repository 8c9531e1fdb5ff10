"""Write the generated files: the table of DeepSpeed's settings and the JSON Schemas of a recipe and of a task.

    python ds_configs/generate.py

`bert_ds/configuration/deepspeed_file/ds_keys.json` comes from the installed DeepSpeed. Blocks that are pydantic models
are read from their fields. For the others DeepSpeed's own parser is run on a dictionary that records what is looked up
and with which default, so a setting that a new release reads appears by itself; one without a default needs a line in
KINDS below, and its absence is an error here. `ds_configs/schema.json` comes from the models of the recipe,
`task_schema.json` from those of a task.
"""

from __future__ import annotations

import enum
import json
import types
import typing
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.inference.config import WeightQuantConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime import config as ds
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from bert_ds.configuration.recipe.run_config import RunConfig
from bert_ds.configuration.task.task_config import TaskConfig

ROOT = Path(__file__).resolve().parents[1]

MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
    "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
    "hybrid_engine": ds.HybridEngineConfig,
    "tensor_parallel": TPTrainingConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
    "weight_quantization": WeightQuantConfig,
}

BLOCKS = (
    *("optimizer", "scheduler", "torch_autocast", "activation_checkpointing", "flops_profiler"),
    *("autotuning", "autotuning.model_info", "checkpoint", "checkpoint.parallel_write", "checkpoint.writer"),
    *("data_types", "aio", "data_efficiency", "data_efficiency.data_sampling", "data_efficiency.data_routing"),
    *("timers", "expert_parallel"),
)
"""Blocks that DeepSpeed reads with dictionary look-ups; outer before inner."""

COMMUNICATION = ["fp16", "bf16", "fp32"]
OPTIONAL_INT = {"kind": "int", "null": True}
DTYPES = ["fp16", "float16", "half", "bf16", "bfloat16", "fp32", "float32", "float"]
KINDS: dict[str, dict[str, Any]] = {
    "train_batch_size": {"kind": "int", "gt": 0},
    "train_micro_batch_size_per_gpu": {"kind": "int", "gt": 0},
    "gradient_accumulation_steps": {"kind": "int", "gt": 0},
    "steps_per_print": {"kind": "int", "gt": 0, "null": True, "default": None},
    "gradient_clipping": {"kind": "float", "ge": 0, "default": 1.0},
    "gradient_predivide_factor": {"kind": "float", "gt": 0, "default": 1.0},
    "gradient_allreduce_op": {"kind": "str", "choices": ["mean", "sum"], "default": "mean"},
    "vocabulary_size": {"kind": "int", "gt": 0, "null": True},
    "log_level": {"kind": "str", "choices": ["debug", "info", "warning", "error", "critical"], "null": True},
    "bfloat16": {"kind": "same_as", "name": "bf16"},
    "communication_data_type": {"kind": "str", "choices": COMMUNICATION, "null": True, "default": None},
    "seq_parallel_communication_data_type": {"kind": "str", "choices": COMMUNICATION, "default": "fp32"},
    "pipeline": {"kind": "object"},
    "datastates_ckpt": {"kind": "object", "null": True},
    "sequence_parallel_size": {"kind": "int", "gt": 0},
    "data_parallel_size": {"kind": "int", "gt": 0},
    "optimizer.type": {"kind": "str"},
    "optimizer.params": {"kind": "object"},
    "optimizer.legacy_fusion": {"kind": "bool"},
    "scheduler.type": {"kind": "str"},
    "scheduler.params": {"kind": "object"},
    "torch_autocast.dtype": {"kind": "str", "choices": DTYPES},
    "torch_autocast.lower_precision_safe_modules": {"kind": "list", "items": "str"},
    "activation_checkpointing.number_checkpoints": {"kind": "int", "gt": 0, "null": True, "default": None},
    "flops_profiler.output_file": {"kind": "str", "null": True, "default": None},
    "flops_profiler.profile_step": {"kind": "int", "gt": 0, "default": 1},
    "autotuning.metric_path": {"kind": "str", "null": True},
    "autotuning.arg_mappings": {"kind": "object", "null": True},
    "autotuning.max_train_batch_size": OPTIONAL_INT,
    **{f"autotuning.model_info.{name}": OPTIONAL_INT for name in ("num_params", "hidden_size", "num_layers")},
    "autotuning.model_info_path": {"kind": "str", "null": True},
    "checkpoint.tag_validation": {"kind": "str", "choices": ["Warn", "Ignore", "Fail"], "default": "Warn"},
    "checkpoint.writer.type": {"kind": "str"},
    "checkpoint.writer.data_parallel": {"kind": "str", "null": True},
    **{
        f"data_types.{name}": {"kind": "str", "choices": DTYPES, "null": True, "default": None}
        for name in ("grad_accum_dtype", "param_dtype", "buffer_dtype")
    },
    "data_types.keep_in_fp32_modules": {"kind": "list", "items": "str", "default": []},
    **{
        f"data_efficiency.data_sampling.{one}": {"kind": "object"}
        for one in ("curriculum_learning", "dynamic_batching")
    },
    "data_efficiency.data_routing.random_ltd": {"kind": "object"},
}
"""Settings whose default says less than their type, or that are read where the recording does not reach."""


PROFILER_LEAST = {"top_modules": 1, "module_depth": -1, "recompute_fwd_factor": 0}
BOUNDS: dict[str, dict[str, float]] = {
    "fp16.hysteresis": {"gt": 0},
    "fp16.initial_scale_power": {"ge": 0, "le": 32},
    "fp16.loss_scale": {"ge": 0},
    "fp16.loss_scale_window": {"gt": 0},
    "fp16.min_loss_scale": {"gt": 0},
    "zero_optimization.zero_hpz_partition_size": {"gt": 0},
    "zero_optimization.stage3_module_granularity_threshold": {"ge": 0},
    **{f"flops_profiler.{name}": {"ge": low} for name, low in PROFILER_LEAST.items()},
    "comet.samples_log_interval": {"gt": 0},
    **{f"aio.{name}": {"gt": 0} for name in ("block_size", "queue_depth", "intra_op_parallelism")},
}
"""Bounds that DeepSpeed leaves out or checks in code."""


def main() -> None:
    """Write all files."""
    (ROOT / "bert_ds/configuration/deepspeed_file/ds_keys.json").write_text(ds_keys_text(), encoding="utf-8")
    (ROOT / "ds_configs/schema.json").write_text(schema_text(RunConfig), encoding="utf-8")
    (ROOT / "ds_configs/task_schema.json").write_text(schema_text(TaskConfig), encoding="utf-8")


def schema_text(model: type[BaseModel]) -> str:
    """Return the JSON Schema of a recipe or of a task."""
    schema = model.model_json_schema(by_alias=True)
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def ds_keys_text() -> str:
    """Return the table of settings that the installed DeepSpeed knows."""
    keys: dict[str, Any] = {}
    for path, defaults in sorted(recorded_lookups().items()):
        top = path.split(".")[0]
        if top in ds._REMOVED_TOP_LEVEL_CONFIG_KEYS:
            continue
        if path in MODELS or path in BLOCKS:
            _put(keys, path, {"kind": "object", "keys": {}})
        elif path not in KINDS:
            _put(keys, path, _kind_of_default(path, defaults))
    for path, kind in KINDS.items():
        _put(keys, path, kind)
    for path, model in MODELS.items():
        _put(keys, path, _model_node(model))
    for path, bounds in BOUNDS.items():
        outer = keys
        *parents, last = path.split(".")
        for part in parents:
            outer = outer[part]["keys"]
        outer[last] |= bounds
    zero_removed = {f"zero_optimization.{key}": text for key, text in ds._REMOVED_ZERO_CONFIG_KEYS.items()}
    removed = {**ds._REMOVED_TOP_LEVEL_CONFIG_KEYS, **zero_removed}
    table = {"deepspeed": deepspeed.__version__, "removed": removed, "keys": keys}
    return json.dumps(table, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def recorded_lookups() -> dict[str, list[Any]]:
    """Run DeepSpeed's parser and return every dotted key it looked up, with the defaults it gave."""
    log: dict[str, list[Any]] = {}
    root = _Recording({"train_micro_batch_size_per_gpu": 1}, "", log)
    for block in BLOCKS:
        outer = root
        *parents, name = block.split(".")
        for parent in parents:
            outer = dict.__getitem__(outer, parent)
        # An empty expert_parallel block is not parsed at all.
        content = {"enabled": False} if name == "expert_parallel" else {}
        dict.__setitem__(outer, name, _Recording(content, block + ".", log))
    ds.DeepSpeedConfig(root)
    return log


class _Recording(dict[str, Any]):
    """A dictionary that notes what is asked of it."""

    def __init__(self, content: dict[str, Any], prefix: str, log: dict[str, list[Any]]) -> None:
        super().__init__(content)
        self._prefix, self._log = prefix, log

    def __copy__(self) -> _Recording:
        return self

    def _note(self, key: object) -> list[Any]:
        return self._log.setdefault(f"{self._prefix}{key}", [])

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key).append(default)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self._note(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return _RecordingKeys(self)


class _RecordingKeys:
    """`key in config.keys()` is noted too; iterating is not a look-up."""

    def __init__(self, owner: _Recording) -> None:
        self._owner = owner

    def __contains__(self, key: object) -> bool:
        return key in self._owner

    def __iter__(self) -> typing.Iterator[str]:
        return iter(list(dict.keys(self._owner)))


def _kind_of_default(path: str, defaults: list[Any]) -> dict[str, Any]:
    if path.startswith(("data_efficiency.", "expert_parallel.", "autotuning.")) and not defaults:
        return {"kind": "any"}
    value = defaults[0] if defaults else None
    kind = {bool: "bool", int: "int", float: "float", str: "str", dict: "object"}.get(type(value))
    if path.startswith("expert_parallel."):
        return {"kind": "any"}
    if kind is None:
        raise SystemExit(f"DeepSpeed {deepspeed.__version__} reads {path} with default {value!r}: add it to KINDS")
    return {"kind": kind} if kind == "object" else {"kind": kind, "default": value}


def _model_node(model: type[BaseModel]) -> dict[str, Any]:
    keys = {}
    for name, field in model.model_fields.items():
        node = _annotation_node(field.annotation)
        for rule in field.metadata:
            for bound in ("gt", "ge", "lt", "le"):
                if getattr(rule, bound, None) is not None:
                    node[bound] = getattr(rule, bound)
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        if extra.get("deprecated"):
            node = {"kind": "deprecated", "instead": extra["new_param"]}
        elif "keys" not in node and field.default is not PydanticUndefined:
            node["default"] = _plain(field.default)
        if field.alias:
            keys[name] = {"kind": "same_as", "name": field.alias}
        keys[field.alias or name] = node
    return {"kind": "object", "keys": keys}


def _annotation_node(annotation: Any) -> dict[str, Any]:
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        inner = [one for one in arguments if one is not type(None)]
        node = _annotation_node(inner[0]) if len(inner) == 1 else {"kind": "any"}
        return {**node, "null": True} if type(None) in arguments else node
    if origin is typing.Literal:
        return {"kind": "str", "choices": list(arguments)}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _model_node(annotation)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        choices = [item.value for item in annotation]
        return {"kind": "int" if isinstance(choices[0], int) else "str", "choices": choices}
    if annotation is list or origin is list:
        return {"kind": "list", "items": "str" if arguments in ((), (str,)) or origin is list else "any"}
    # Models turn 5e8 into 500000000, and DeepSpeed's own examples spell bucket sizes so.
    simple = {bool: "bool", int: "int", float: "float", str: "str", Path: "str", torch.dtype: "str", dict: "object"}
    if annotation in simple:
        return {"kind": simple[annotation], **({"exponent": True} if annotation is int else {})}
    return {"kind": "object" if origin is dict else "any"}


def _plain(value: Any) -> Any:
    """Return a default as JSON has it; None for what JSON does not have."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    return value if isinstance(value, bool | float | str | list) else None


def _put(keys: dict[str, Any], path: str, node: dict[str, Any]) -> None:
    *outer, last = path.split(".")
    for part in outer:
        keys = keys[part]["keys"]
    keys[last] = node


if __name__ == "__main__":
    main()
