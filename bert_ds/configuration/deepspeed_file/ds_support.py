"""What of DeepSpeed this project does not do: refused with a reason, never ignored."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import Any

from bert_ds.configuration.deepspeed_file.ds_keys import default_of, leaves
from bert_ds.configuration.reading.config_problems import Problem, describe, found_wanted, one_of

_ELSEWHERE = "this project does not do that"
_OWN_CHECKPOINTS = "checkpoints are written and verified by this project's own engine"
_FP32_STATE = "master weights and optimizer state are fp32 here"
_NAN_GUARD = "without it a NaN would reach the weights"
_QUANTIZED = "quantised communication is not supported here"
_UNUSED = "nothing here would read it"
_OWN_LOADER = "batches come from this project's own loader"
_RECOMPUTE = "number_checkpoints alone is understood: layers are recomputed by torch.utils.checkpoint"

ALLOWED: dict[str, tuple[tuple[Any, ...], str]] = {
    "activation_checkpointing.contiguous_memory_optimization": ((False,), _RECOMPUTE),
    "activation_checkpointing.cpu_checkpointing": ((False,), _RECOMPUTE),
    "activation_checkpointing.partition_activations": ((False,), _RECOMPUTE),
    "activation_checkpointing.profile": ((False,), _RECOMPUTE),
    "activation_checkpointing.synchronize_checkpoint_boundary": ((False,), _RECOMPUTE),
    "aio.use_gds": ((False,), "GPUDirect storage has not been tried here"),
    "bf16.bf16_master_weights_and_grads": ((False,), _FP32_STATE),
    "bf16.bf16_optimizer_states": ((False,), _FP32_STATE),
    "bf16.check_grad_overflow": ((True,), _NAN_GUARD),
    "checkpoint.checkpoint_serialization": ((True,), _OWN_CHECKPOINTS),
    "checkpoint.load_universal": ((False,), "pretrain.py --resume does this where it is needed"),
    "checkpoint.parallel_write.pipeline_stage": ((False,), _OWN_CHECKPOINTS),
    "checkpoint.use_node_local_storage": ((False,), _OWN_CHECKPOINTS),
    "comet.mode": ((None, "get", "create", "get_or_create"), "Comet has no other"),
    "data_parallel_size": ((), "the launcher decides it"),
    "data_types.buffer_dtype": ((None,), "the model has no buffers"),
    "data_types.keep_in_fp32_modules": (([], "auto"), "the model has no buffers"),
    "dataloader_drop_last": ((False,), _OWN_LOADER),
    "disable_allgather": ((False,), _UNUSED),
    "fp16.auto_cast": ((False,), "the inputs are integers"),
    "fp16.fp16_master_weights_and_grads": ((False,), _FP32_STATE),
    "gradient_allreduce_op": (("mean",), "the loss is scaled for the mean over ranks"),
    "managed_gradient_accumulation": ((True,), "the loop relies on DeepSpeed's counting of micro-steps"),
    "optimizer.legacy_fusion": ((False,), "the optimizer is built by this project"),
    "sequence_parallel_size": ((1,), "sequence parallelism is not supported here"),
    "seq_parallel_communication_data_type": (("fp32",), "sequence parallelism is not supported here"),
    "use_data_before_expert_parallelism": ((False,), "there are no experts"),
    "zero_allow_untested_optimizer": ((True, "auto"), "this project sets it for the optimizers it has tested"),
    "zero_force_ds_cpu_optimizer": ((False, "auto"), "the optimizer is the recipe's, offloaded or not"),
    "zero_optimization.compute_grad_norm": ((True,), _NAN_GUARD),
    "zero_optimization.elastic_checkpoint": ((False,), _OWN_CHECKPOINTS),
    "zero_optimization.legacy_stage1": ((False,), "DeepSpeed has removed it"),
    "zero_optimization.offload_optimizer.ratio": (
        (1, 1.0),
        "all of the state is offloaded or none",
    ),
    "zero_optimization.offload_optimizer.super_offload": ((False,), "it steps DeepSpeed's own Adam, not the recipe's"),
    "zero_optimization.save_muon_momentum_buffer_in_memory": ((False,), "Muon is not supported here"),
    "zero_optimization.zero_quantized_gradients": ((False,), _QUANTIZED),
    "zero_optimization.zero_quantized_nontrainable_weights": ((False,), _QUANTIZED),
    "zero_optimization.zero_quantized_weights": ((False,), _QUANTIZED),
}
"""Setting -> the values it may have here, and why no other."""

WRITTEN_PATHS = ("tensorboard.output_path", "csv_monitor.output_path", "flops_profiler.output_file")
"""Where DeepSpeed writes; taken from the run folder."""

MAX_NAME_BYTES = 200
"""A file system takes 255 bytes, and names get a suffix."""

SWITCHED_OFF = {
    "autotuning": "pretrain.py --find_micro_batch finds the micro-batch",
    "compile": _ELSEWHERE,
    "data_efficiency": _OWN_LOADER,
    "datastates_ckpt": _OWN_CHECKPOINTS,
    "expert_parallel": "there are no experts",
    "hybrid_engine": "it is for reinforcement learning",
    "pipeline": "pipeline parallelism is not supported here",
    "tensor_parallel": "tensor parallelism is not supported here",
    "torch_autocast": "training.precision of the recipe sets the dtypes",
    "weight_quantization": "it is for inference",
    "checkpoint.writer": _OWN_CHECKPOINTS,
    "zero_optimization.zenflow": "it steps selected weights past the recipe's optimizer",
}
"""Blocks that may only be present switched off, and why; they do not reach DeepSpeed."""


_MONITOR_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""What DeepSpeed imports for a monitor that is enabled."""


def unsupported_settings(settings: dict[str, Any], *, stage_is_known: bool = True) -> list[Problem]:
    """Return one problem per setting that this project cannot honour.

    Args:
        settings: checked names and types.
        stage_is_known: False where the ZeRO stage itself was wrong, so that nothing is said about what depends on it.
    """
    given = dict(leaves(settings))
    problems = []
    for path, (allowed, reason) in ALLOWED.items():
        if path in given and given[path] not in allowed:
            wanted = one_of(allowed) if allowed and allowed[0] != [] else "nothing"
            problems.append(Problem(path, f"{found_wanted(given[path], wanted)}: {reason}"))
    for path, reason in SWITCHED_OFF.items():
        problems += _switched_on(path, settings, reason)
    problems += _monitors(given)
    return problems + _paths(given) + (_combinations(settings, given) if stage_is_known else [])


def _switched_on(path: str, settings: dict[str, Any], reason: str) -> list[Problem]:
    block: Any = settings
    for part in path.split("."):
        block = block.get(part) if isinstance(block, dict) else None
    if block is None or (isinstance(block, dict) and block.get("enabled") is False):
        return []
    changed = [name for name, value in leaves(block, path + ".") if value != default_of(name)]
    if path == "weight_quantization" or (path.endswith(("zenflow", "writer")) and not changed):
        changed = [path]
    return [Problem(name, f"is not supported: {reason}; leave it out") for name in changed]


def _combinations(settings: dict[str, Any], given: dict[str, Any]) -> list[Problem]:
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    problems = []
    for name, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        path, block = f"zero_optimization.{name}", zero.get(name) or {}
        device = block.get("device", "none")
        if device != "none" and stage < lowest:
            problems.append(Problem(path, f"needs zero_optimization.stage >= {lowest}, which is {stage}"))
        if device == "nvme" and stage < 3:
            problems.append(Problem(f"{path}.device", f'"nvme" needs zero_optimization.stage 3, which is {stage}'))
        if device == "nvme" and not block.get("nvme_path"):
            problems.append(Problem(f"{path}.nvme_path", 'is missing, wanted a folder: device is "nvme"'))
    problems += _scaled_reduction(settings, stage=stage)
    if given.get("bf16.enabled") is True and given.get("fp16.enabled") is True:
        problems.append(Problem("fp16.enabled", "found true, but bf16.enabled is true too: wanted one of them"))
    if given.get("bf16.immediate_grad_update") and stage != 1:
        problems.append(Problem("bf16.immediate_grad_update", f"is for stage 1, the stage is {stage}: {_UNUSED}"))
    bucket = zero.get("allgather_bucket_size", "auto")
    if bucket != "auto" and (bucket % 2 or bucket == 0):
        text = f"found {bucket}, wanted an even number of at least 2"
        problems.append(Problem("zero_optimization.allgather_bucket_size", text))
    return problems


def _scaled_reduction(settings: dict[str, Any], *, stage: int) -> list[Problem]:
    """Return scaled gradients where DeepSpeed asserts that there are none, or scales them wrongly.

    Stages 2 and 3 reduce and scatter in one; stage 3 does not multiply by a factor that equals the number of ranks.
    """
    scatters = settings.get("zero_optimization", {}).get("reduce_scatter", True)
    factor, is_prescaled = settings.get("gradient_predivide_factor", 1.0), settings.get("prescale_gradients", False)
    problems = []
    if factor != 1.0 and ((stage == 2 and scatters) or stage == 3):
        text = f"{found_wanted(factor, '1.0')}: DeepSpeed refuses it at zero_optimization.stage {stage}"
        problems.append(Problem("gradient_predivide_factor", text))
    if is_prescaled and stage >= 2 and scatters:
        text = f"{found_wanted(True, 'false')}: DeepSpeed refuses it at zero_optimization.stage {stage}"
        problems.append(Problem("prescale_gradients", text))
    return problems


def _monitors(given: dict[str, Any]) -> list[Problem]:
    return [
        Problem(f"{name}.enabled", f"found true, but {package} is not installed here: pip install {package}")
        for name, package in _MONITOR_PACKAGES.items()
        if given.get(f"{name}.enabled") is True and find_spec(package) is None
    ]


def _paths(given: dict[str, Any]) -> list[Problem]:
    """Refuse names by which DeepSpeed would write outside the run folder; it joins and opens whatever it is given."""
    problems = []
    for monitor in ("tensorboard", "csv_monitor"):
        name = given.get(f"{monitor}.job_name") or ""
        if "/" in name or name.startswith(".") or len(name.encode()) > MAX_NAME_BYTES:
            problems.append(Problem(f"{monitor}.job_name", f"found {describe(name)}, wanted a plain folder name"))
    for path in WRITTEN_PATHS:
        name = given.get(path) or ""
        parts = PurePosixPath(name).parts
        if name.startswith(("/", "~")) or ".." in parts or any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
            text = "found {}, wanted a relative path without ..: it is written inside the run folder"
            problems.append(Problem(path, text.format(describe(name))))
    return problems
