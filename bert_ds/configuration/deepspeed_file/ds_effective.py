"""The dictionary that DeepSpeed gets: defaults written out, open values filled in, ours set."""

from __future__ import annotations

import os
from typing import Any

from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.configuration.deepspeed_file.ds_keys import known_settings
from bert_ds.configuration.deepspeed_file.ds_support import SWITCHED_OFF
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.recipe.precision import Precision, decided
from bert_ds.configuration.recipe.run_config import TrainedRun

_WRITTEN_OUT = (
    *("zero_optimization", "bf16", "fp16", "data_types", "activation_checkpointing", "flops_profiler", "checkpoint"),
    *("timers", "tensorboard", "csv_monitor", "wandb", "comet"),
)
"""Blocks whose defaults are spelled out even where the file does not mention them."""

LARGEST_BUCKET = 50_000_000
"""Numbers in a bucket of ZeRO that is "auto", at most."""

_LEFT_OUT = ("optimizer", "scheduler", "api_key", "writer", "leaf_module")
"""Handed over as objects, secret, or blocks whose presence alone changes what DeepSpeed does."""


def effective_settings(
    run: TrainedRun, settings: dict[str, Any], split: BatchSplit, *, run_dir: str | None
) -> dict[str, Any]:
    """Return the settings with every value explicit; `settings` is consumed.

    Args:
        run: the recipe, or a task; its precision is decided.
        settings: a checked DeepSpeed file that agrees with it.
        split: of the global batch.
        run_dir: where monitors write that have no output_path.
    """
    for name in ("optimizer", "scheduler", *SWITCHED_OFF):
        settings.pop(name, None)
    # DeepSpeed's throughput timer waits for the device in every step, and metrics.jsonl has the figure already.
    settings.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    result = _with_defaults(settings, known_settings()["keys"], top=True)
    zero, training = result["zero_optimization"], run.training
    result |= {
        "train_batch_size": training.train_batch_size,
        "train_micro_batch_size_per_gpu": split.micro_batch_size,
        "gradient_accumulation_steps": split.accumulation,
        "gradient_clipping": training.gradient_clipping,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    precision = decided(training.precision)
    for name in ("bf16", "fp16"):
        result[name]["enabled"] = precision == name
    _fill_data_types(result["data_types"], precision, stage=zero["stage"])
    if result["communication_data_type"] in (None, "auto"):
        # DeepSpeed's own default rounds what was summed in fp32 to the precision of the model on its way to the other
        # ranks: by 0.4 % in bf16, and differently for every number of ranks.
        result["communication_data_type"] = result["data_types"]["grad_accum_dtype"]
    _fill_zero(zero, run.model)
    if run_dir is not None:
        for monitor in ("tensorboard", "csv_monitor"):
            result[monitor]["output_path"] = os.path.join(run_dir, result[monitor]["output_path"] or "monitor")
        if result["flops_profiler"].get("output_file"):
            result["flops_profiler"]["output_file"] = os.path.join(run_dir, result["flops_profiler"]["output_file"])
    return result


def _with_defaults(block: dict[str, Any], keys: dict[str, Any], *, top: bool = False) -> dict[str, Any]:
    result = {}
    for name, node in keys.items():
        if name in block:
            value = block[name]
            result[name] = _with_defaults(value, node["keys"]) if _is_block(value, node) else value
        elif name in _LEFT_OUT:
            continue
        elif "keys" in node:
            if not node.get("null") and name not in _LEFT_OUT and (not top or name in _WRITTEN_OUT):
                result[name] = _with_defaults({}, node["keys"])
        elif "default" in node:
            result[name] = node["default"]
    return result


def _is_block(value: Any, node: dict[str, Any]) -> bool:
    return isinstance(value, dict) and "keys" in node


def _fill_data_types(data_types: dict[str, Any], precision: Precision, *, stage: int) -> None:
    # Stage 0 refuses to accumulate in another dtype than the weights' (engine.py, _do_optimizer_sanity_check). Stage 1
    # in bf16 with fp32 accumulation and no offload becomes BF16_Optimizer there.
    if data_types["grad_accum_dtype"] in (None, "auto"):
        data_types["grad_accum_dtype"] = precision if stage == 0 else "fp32"
    data_types["param_dtype"] = precision
    if data_types["keep_in_fp32_modules"] == "auto":
        data_types["keep_in_fp32_modules"] = []


def bucket_size(model: EncoderConfig) -> int:
    """Return what a bucket of ZeRO that is "auto" holds: a model whole, at most LARGEST_BUCKET; an even number.

    Hugging Face's integration fills in hidden_size squared, which reduces the gradients of a BERT-large in 320 parts.
    """
    number = model.count_parameters(has_pair_head=False)
    return min(LARGEST_BUCKET, number + number % 2)


def _fill_zero(zero: dict[str, Any], model: EncoderConfig) -> None:
    if zero["overlap_comm"] in (None, "auto"):
        zero["overlap_comm"] = zero["stage"] == 3
    names = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
    # The threshold that Hugging Face's integration fills in.
    sizes = {**dict.fromkeys(names, bucket_size(model)), "stage3_param_persistence_threshold": 10 * model.hidden_size}
    for name, size in sizes.items():
        if zero[name] == "auto":
            zero[name] = size
    for name in ("offload_optimizer", "offload_param", "zenflow"):
        if zero.get(name) is None:
            zero.pop(name, None)
