"""Names and types of a DeepSpeed file: what DeepSpeed would swallow or choke on is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from config_cases import DEEPSPEED, changed, launched, write_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bert_ds.configuration.deepspeed_file.ds_config import load_ds_config, load_pair, resolve_ds_config
from bert_ds.configuration.deepspeed_file.ds_keys import setting_names
from bert_ds.configuration.recipe.run_config import ConfigError, RunConfig
from bert_ds.configuration.task.task_config import TaskConfig

ROOT = Path(__file__).resolve().parents[1]


def message_of(folder: Path, content: Any) -> str:
    """What a user sees of a DeepSpeed file that cannot be loaded."""
    with pytest.raises(ConfigError) as caught:
        load_ds_config(write_json(folder, "ds.json", content))
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ("zero_optimisation", {"stage": 2}, 'did you mean "zero_optimization"?'),
        ("gradient_acumulation_steps", 4, 'did you mean "gradient_accumulation_steps"?'),
        ("fp_16", {"enabled": True}, 'did you mean "fp16"?'),
        ("stage", 3, 'did you mean "zero_optimization.stage"?'),
        ("zero_optimization", True, "found true, wanted an object"),
        ("zero_optimization", None, "found null, wanted an object"),
        ("zero_optimization", [], "wanted an object"),
        ("zero_optimization.stage", True, "found true, wanted a whole number"),
        ("zero_optimization.stage", 4, "wanted one of 0, 1, 2, 3"),
        ("zero_optimization.stage", "2", 'found "2", wanted a whole number'),
        ("zero_optimization.stage", "auto", '"auto" is for what the recipe decides'),
        ("zero_optimization.satge", 2, 'did you mean "stage"?'),
        ("zero_optimization.overlap_comm", "yes", "wanted true or false"),
        ("zero_optimization.overlap_comm", 1, "wanted true or false"),
        ("zero_optimization.reduce_bucket_size", 0, "wanted > 0"),
        ("zero_optimization.reduce_bucket_size", 0.5, "wanted a whole number"),
        ("zero_optimization.offload_optimizer", True, "wanted an object"),
        ("zero_optimization.offload_optimizer.device", "gpu", 'wanted one of "none", "cpu", "nvme"'),
        ("zero_optimization.offload_optimizer.divice", "cpu", 'did you mean "device"?'),
        ("zero_optimization.cpu_offload", True, "use offload_optimizer"),
        ("train_micro_batch_size_per_gpu", 3.7, "wanted a whole number"),
        ("train_micro_batch_size_per_gpu", 4.0, "wanted a whole number"),
        ("train_micro_batch_size_per_gpu", True, "found true"),
        ("train_micro_batch_size_per_gpu", 0, "wanted > 0"),
        ("train_micro_batch_size_per_gpu", -1, "wanted > 0"),
        ("train_micro_batch_size_per_gpu", None, "found null"),
        ("gradient_accumulation_steps", 1.5, "wanted a whole number"),
        ("train_batch_size", "48", "wanted a whole number"),
        ("gradient_clipping", "one", "wanted a number"),
        ("gradient_clipping", True, "wanted a number"),
        ("gradient_clipping", -1.0, "wanted >= 0"),
        ("bf16", True, "wanted an object"),
        ("bf16.enabled", "true", "wanted true or false"),
        ("bf16.enabled", 1, "wanted true or false"),
        ("bf16.enable", True, 'did you mean "enabled"?'),
        ("fp16", {"enabled": False, "loss_scale": -1}, "wanted >= 0"),
        ("fp16", {"enabled": False, "loss_scale_window": 0}, "wanted > 0"),
        ("optimizer", "Adam", "wanted an object"),
        ("optimizer.type", 3, "wanted a string"),
        ("optimizer.parms", {}, 'did you mean "params"?'),
        ("scheduler", [], "wanted an object"),
        ("scheduler.prams", {}, 'did you mean "params"?'),
        ("activation_checkpointing.partitioned_activations", True, 'did you mean "partition_activations"?'),
        ("flops_profiler.enable", True, 'did you mean "enabled"?'),
        ("flops_profiler.enabled", "yes", "wanted true or false"),
        ("data_types.grad_acum_dtype", "fp32", 'did you mean "grad_accum_dtype"?'),
        ("data_types.grad_accum_dtype", "fp33", "wanted one of"),
        ("communication_data_type", "fp8", "wanted one of"),
        ("tensorboard.outputpath", "x", 'did you mean "output_path"?'),
        ("csv_monitor.job_name", "../../etc", "wanted a plain folder name"),
        ("timers.throughputs", {}, 'did you mean "throughput"?'),
        ("steps_per_print", 0, "wanted > 0"),
        ("wall_clock_breakdown", "no", "wanted true or false"),
        ("aio.block_size", -1, "wanted > 0"),
        ("comet", {"enabled": True, "api_key": "hunter2"}, "secrets are read from the environment"),
        ("log_level", "loud", "wanted one of"),
    ],
)
def test_what_deepspeed_would_swallow_or_choke_on_is_refused(
    tmp_path: Path, path: str, value: object, wanted: str
) -> None:
    text = message_of(tmp_path, changed(DEEPSPEED, path, value))
    assert wanted in text and path.split(".")[-1] in text and "hunter2" not in text


@pytest.mark.parametrize(
    "path",
    [
        *("nebula", "compression_training", "amp", "quantize_training", "sparse_gradients", "eigenvalue"),
        *("sparse_attention", "elasticity", "graph_harvesting", "curriculum_learning", "progressive_layer_drop"),
        *("zero_optimization.mics_shard_size", "zero_optimization.zeropp_loco_param"),
    ],
)
def test_a_removed_feature_is_refused_with_the_reason_of_deepspeed(tmp_path: Path, path: str) -> None:
    text = message_of(tmp_path, changed(DEEPSPEED, path, {"enabled": True}))
    assert "has been removed" in text or "have been removed" in text


def test_both_names_of_a_setting_are_refused(tmp_path: Path) -> None:
    zero = {"stage": 3, "stage3_prefetch_bucket_size": 1000, "prefetch_bucket_size": 2000}
    text = message_of(tmp_path, {"zero_optimization": zero})
    assert "says the same as zero_optimization.stage3_prefetch_bucket_size" in text


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "ds_configs/generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_table_of_settings_is_that_of_the_installed_deepspeed() -> None:
    assert (ROOT / "bert_ds/configuration/deepspeed_file/ds_keys.json").read_text(
        encoding="utf-8"
    ) == generator().ds_keys_text(), "run: python ds_configs/generate.py"


@pytest.mark.parametrize(("name", "model"), [("schema", RunConfig), ("task_schema", TaskConfig)])
def test_the_committed_schema_is_that_of_the_models(name: str, model: type[Any]) -> None:
    assert (ROOT / f"ds_configs/{name}.json").read_text(encoding="utf-8") == generator().schema_text(model), (
        "run: python ds_configs/generate.py"
    )


@pytest.mark.parametrize("name", ["schema", "task_schema"])
def test_the_schema_describes_every_setting(name: str) -> None:
    schema = json.loads((ROOT / f"ds_configs/{name}.json").read_text(encoding="utf-8"))
    undescribed = [
        f"{name}.{key}"
        for name, section in schema["$defs"].items()
        for key, node in section.get("properties", {}).items()
        if "description" not in node and key != "type"
    ]
    assert undescribed == []


VALUES = [True, False, None, -1, 0, 1, 3, 0.5, 1e300, 5e8, "", "x", "auto", "cpu", "fp32", [], ["a"], {}, {"x": 1}]


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=st.sampled_from(setting_names()), value=st.sampled_from(VALUES), stage=st.sampled_from([0, 1, 3]))
def test_whatever_is_accepted_is_understood_by_deepspeed(tmp_path: Path, name: str, value: Any, stage: int) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    path = write_json(tmp_path, "ds.json", changed({"zero_optimization": {"stage": stage}}, name, value))
    try:
        run, ds = load_pair(None, path)
        effective = resolve_ds_config(launched(run), ds, 1)
    except ConfigError:
        return
    DeepSpeedConfig(effective)
