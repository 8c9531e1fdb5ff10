"""What of DeepSpeed is refused with a reason, and what reaches it unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_cases import DEEPSPEED, RECIPE, changed, write_json

from bert_ds.configuration.deepspeed_file.ds_config import DsConfig, load_ds_config, load_pair, resolve_ds_config
from bert_ds.configuration.deepspeed_file.ds_keys import leaves
from bert_ds.configuration.recipe.run_config import ConfigError, RunConfig
from bert_ds.configuration.run_plan import make_plan

ROOT = Path(__file__).resolve().parents[1]


def message_of(folder: Path, content: Any) -> str:
    """What a user sees of a DeepSpeed file that cannot be loaded."""
    with pytest.raises(ConfigError) as caught:
        load_ds_config(write_json(folder, "ds.json", content))
    return str(caught.value)


def pair(folder: Path, recipe: Any, deepspeed: Any) -> tuple[RunConfig, DsConfig]:
    return load_pair(write_json(folder, "run.json", recipe), write_json(folder, "ds.json", deepspeed))


def resolved(folder: Path, recipe: Any, deepspeed: Any, *, world_size: int = 1) -> dict[str, Any]:
    run, ds = pair(folder, recipe, deepspeed)
    return resolve_ds_config(run, ds, world_size)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("zero_optimization.zenflow", {"topk_ratio": 0.2}, "past the recipe's optimizer"),
        ("zero_optimization.zenflow", {}, "past the recipe's optimizer"),
        ("zero_optimization.offload_optimizer.super_offload", True, "not the recipe's"),
        ("zero_optimization.offload_optimizer.ratio", 0.5, "all of the state"),
        ("zero_optimization.compute_grad_norm", False, "a NaN would reach the weights"),
        ("zero_optimization.zero_quantized_gradients", True, "not supported here"),
        ("zero_optimization.offload_param", {"device": "cpu"}, "needs zero_optimization.stage >= 3, which is 2"),
        ("zero_optimization.allgather_bucket_size", 501, "wanted an even number"),
        ("zero_optimization.stage", 0, "offload_optimizer: needs zero_optimization.stage >= 1"),
        ("bf16.check_grad_overflow", False, "a NaN would reach the weights"),
        ("bf16.bf16_master_weights_and_grads", True, "fp32 here"),
        ("bf16.immediate_grad_update", True, "is for stage 1"),
        ("fp16", {"enabled": False, "auto_cast": True}, "integers"),
        ("torch_autocast", {"enabled": True, "dtype": "bf16"}, "training.precision"),
        ("sequence_parallel_size", 2, "not supported here"),
        ("tensor_parallel", {"autotp_size": 2}, "not supported here"),
        ("pipeline", {"stages": 2}, "not supported here"),
        ("data_efficiency", {"enabled": True}, "own loader"),
        ("autotuning", {"enabled": True}, "find_micro_batch"),
        ("compile", {"deepcompile": True}, "not supported"),
        ("hybrid_engine", {"enabled": True}, "not supported"),
        ("checkpoint", {"load_universal": True}, "--resume"),
        ("checkpoint", {"writer": {"type": "FAST"}}, "own engine"),
        ("gradient_allreduce_op", "sum", "mean over ranks"),
        ("managed_gradient_accumulation", False, "micro-steps"),
        ("zero_allow_untested_optimizer", False, "this project sets it"),
        ("activation_checkpointing", {"cpu_checkpointing": True}, "number_checkpoints alone"),
        ("dataloader_drop_last", True, "own loader"),
        ("zero_optimization.allgather_bucket_size", 0, "wanted an even number of at least 2"),
        ("csv_monitor.output_path", "../../etc", "inside the run folder"),
        ("tensorboard", {"enabled": True, "output_path": "/etc"}, "inside the run folder"),
        ("flops_profiler.output_file", "logs/../../flops", "inside the run folder"),
        ("csv_monitor.job_name", "x" * 300, "wanted a plain folder name"),
        ("csv_monitor.job_name", "auto", 'found "auto", wanted another word: DeepSpeed drops it'),
        ("wandb", {"project": "auto"}, "DeepSpeed drops it"),
        ("comet.mode", "always", "Comet has no other"),
        ("comet.api_key", "hunter2", "never from files: set COMET_API_KEY"),
        ("gradient_predivide_factor", 1e300, "wanted at most 1e+12"),
    ],
)
def test_what_this_project_does_not_do_is_refused_with_a_reason(
    tmp_path: Path, path: str, value: object, reason: str
) -> None:
    assert reason in message_of(tmp_path, changed(DEEPSPEED, path, value))


def test_nvme_needs_stage_3_and_a_folder(tmp_path: Path) -> None:
    text = message_of(tmp_path, changed(DEEPSPEED, "zero_optimization.offload_optimizer.device", "nvme"))
    assert [line.split(": ")[1] for line in text.splitlines()] == [
        "zero_optimization.offload_optimizer.device",
        "zero_optimization.offload_optimizer.nvme_path",
    ]


@pytest.mark.parametrize("kind", ["adamw", "lamb", "muon"])
def test_an_optimizer_of_ours_finds_nothing_on_nvme(kind: str, tmp_path: Path) -> None:
    offload = {"device": "nvme", "nvme_path": str(tmp_path)}
    settings = {"zero_optimization": {"stage": 3, "offload_optimizer": offload}}
    files = pair(tmp_path, changed(RECIPE, "optimizer", {"type": kind, "lr": 1e-3}), settings)
    wanted = f'ds.json: zero_optimization.offload_optimizer.device: found "nvme", wanted "cpu": "{kind}" steps on what '
    with pytest.raises(ConfigError, match=wanted):
        make_plan(*files, 1)
    foreign = pair(tmp_path, changed(RECIPE, "optimizer", {"type": "deepspeed_cpu_adam", "lr": 1e-3}), settings)
    assert "offload to NVMe has not been tried with deepspeed_cpu_adam" in make_plan(*foreign, 1).warnings


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("zero_optimization.reduce_bucket_size", 5e8),
        ("zero_optimization.reduce_bucket_size", "auto"),
        ("zero_optimization.prefetch_bucket_size", 1000),
        ("zero_optimization.zenflow", None),
        ("wandb", {"enabled": True, "project": "bert"}),
        ("comms_logger", {"enabled": True, "prof_ops": ["all_reduce"]}),
        ("flops_profiler", {"enabled": True, "profile_step": 5}),
        ("activation_checkpointing", {"number_checkpoints": 2}),
        ("aio", {"block_size": 1048576}),
        ("checkpoint", {"tag_validation": "FAIL"}),
        ("wall_clock_breakdown", True),
        ("prescale_gradients", False),
        ("steps_per_print", 10),
        ("log_level", "warning"),
        ("communication_data_type", "fp32"),
    ],
)
def test_what_deepspeed_knows_and_this_project_honours_reaches_deepspeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, value: object
) -> None:
    monkeypatch.setattr("bert_ds.configuration.deepspeed_file.ds_support.find_spec", lambda name: object())
    settings = changed(DEEPSPEED, path, value)
    found = dict(leaves(resolved(tmp_path, RECIPE, settings)))
    for name, given in leaves(settings):
        name = name.replace(".prefetch_", ".stage3_prefetch_")
        if given not in ("auto", None, "FAIL"):
            assert found[name] == given


@pytest.mark.parametrize(
    ("name", "block"),
    [("autotuning", {"enabled": False, "fast": False}), ("compile", {"deepcompile": False}), ("pipeline", {})],
)
def test_a_block_that_is_switched_off_is_accepted_and_left_out(tmp_path: Path, name: str, block: Any) -> None:
    assert name not in resolved(tmp_path, RECIPE, changed(DEEPSPEED, name, block))
