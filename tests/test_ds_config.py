"""The two files of a run together: agreement, the default recipe, and the dictionary that DeepSpeed gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_cases import DEEPSPEED, RECIPE, changed, launched, write_json

from bert_ds.configuration.deepspeed_file.ds_config import DsConfig, load_ds_config, load_pair, resolve_ds_config
from bert_ds.configuration.deepspeed_file.ds_keys import leaves
from bert_ds.configuration.recipe.run_config import ConfigError, RunConfig

ROOT = Path(__file__).resolve().parents[1]


ALONE = ('did you mean "lamb"?', 'unknown to lamb; did you mean "lr"?', "clipping is gradient_clipping", "wanted 2")
"""Endings of problems that a DeepSpeed file has whatever the recipe says."""


def pair(folder: Path, recipe: Any, deepspeed: Any) -> tuple[RunConfig, DsConfig]:
    return load_pair(write_json(folder, "run.json", recipe), write_json(folder, "ds.json", deepspeed))


def resolved(folder: Path, recipe: Any, deepspeed: Any, *, world_size: int = 1) -> dict[str, Any]:
    run, ds = pair(folder, recipe, deepspeed)
    return resolve_ds_config(run, ds, world_size)


def contradiction_of(folder: Path, recipe: Any, deepspeed: Any, *, world_size: int = 1) -> str:
    run, ds = pair(folder, recipe, deepspeed)
    with pytest.raises(ConfigError) as caught:
        resolve_ds_config(run, ds, world_size)
    return str(caught.value)


def test_a_valid_file_loads(tmp_path: Path) -> None:
    ds = load_ds_config(write_json(tmp_path, "ds.json", DEEPSPEED))
    assert (ds.zero_stage, ds.micro_batch_size, ds.offload_optimizer, ds.offload_param) == (2, 4, "cpu", "none")


def test_every_problem_of_both_files_is_reported_at_once(tmp_path: Path) -> None:
    recipe = changed(RECIPE, "seed", -1)
    settings = changed(changed(DEEPSPEED, "bf17", {}), "zero_optimization.stage", 7)
    with pytest.raises(ConfigError) as caught:
        pair(tmp_path, recipe, settings)
    names = [line.split(": ")[0].rsplit("/", 1)[-1] for line in str(caught.value).splitlines()]
    assert names == ["ds.json", "ds.json", "run.json"]


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ("gradient_clipping", 0.5, "found 0.5, but training.gradient_clipping is 1.0"),
        ("train_batch_size", 64, "found 64, but training.train_batch_size is 48"),
        ("bf16.enabled", False, 'found false, but training.precision is "bf16"'),
        ("data_types.param_dtype", "half", 'found "fp16", but training.precision is "bf16"'),
        ("vocabulary_size", 30522, "found 30522, but model.vocab_size is 4096"),
        ("optimizer.type", "AdamW", 'found "AdamW", but optimizer.type is "lamb"'),
        ("optimizer.type", "Lmab", 'did you mean "lamb"?'),
        ("optimizer", {"type": "Lamb", "params": {"lr": 0.1}}, "found 0.1, but optimizer.lr is 0.002"),
        ("optimizer", {"type": "Lamb", "params": {"lrr": 0.1}}, 'unknown to lamb; did you mean "lr"?'),
        ("optimizer", {"type": "Lamb", "params": {"max_coeff": 0.3}}, "found 0.3, but optimizer.max_trust is null"),
        ("optimizer", {"type": "Lamb", "params": {"max_grad_norm": 1.0}}, "clipping is gradient_clipping"),
        ("optimizer", {"params": {"lr": 0.1}}, "found 0.1, but optimizer.lr is 0.002"),
        ("optimizer", {"params": {"betas": [0.8, 0.999]}}, "found [0.8, 0.999], but optimizer.betas is [0.9, 0.999]"),
        ("optimizer", {"params": {"betas": [0.9, 0.99]}}, "found [0.9, 0.99], but optimizer.betas is [0.9, 0.999]"),
        ("optimizer", {"params": {"eps": 1e-8}}, "found 1e-08, but optimizer.eps is 1e-06"),
        ("optimizer", {"params": {"weight_decay": 0.1}}, "found 0.1, but optimizer.weight_decay is 0.01"),
        ("scheduler", {"type": "OneCycle"}, 'found "OneCycle", but schedule.type is "linear"'),
        ("scheduler", {"type": "WarmupDecayLR", "params": {"total_num_steps": 99}}, "found 99"),
        ("scheduler", {"type": "WarmupDecayLR", "params": {"warmup_type": "log"}}, 'found "log"'),
        ("activation_checkpointing", {"number_checkpoints": 3}, "found 3, wanted 2"),
    ],
)
def test_a_contradiction_names_both_files_and_both_values(
    tmp_path: Path, path: str, value: object, wanted: str
) -> None:
    text = contradiction_of(tmp_path, RECIPE, changed(DEEPSPEED, path, value))
    assert wanted in text and f"{tmp_path}/ds.json: " in text
    assert (", but " in text and f"{tmp_path}/run.json" in text) == (not wanted.endswith(ALONE))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("gradient_clipping", 1.0),
        ("gradient_clipping", "auto"),
        ("train_batch_size", 48),
        ("fp16", {"enabled": False}),
        ("data_types.param_dtype", "bfloat16"),
        ("vocabulary_size", 4096),
        ("optimizer", {"type": "Lamb"}),
        ("optimizer", {"type": "LAMB", "params": {"lr": 0.002, "betas": [0.9, 0.999], "weight_decay": "auto"}}),
        ("scheduler", {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": "auto"}}),
    ],
)
def test_a_file_may_say_what_the_recipe_says(tmp_path: Path, path: str, value: object) -> None:
    assert resolved(tmp_path, RECIPE, changed(DEEPSPEED, path, value))["gradient_clipping"] == 1.0


def test_a_cosine_down_to_a_share_of_the_peak_is_said_with_that_share(tmp_path: Path) -> None:
    cosine = {"type": "cosine", "warmup_steps": 10, "min_lr_fraction": 0.25}
    recipe = changed(RECIPE, "schedule", cosine)
    block = {"type": "WarmupCosineLR", "params": {"cos_min_ratio": 0.25, "total_num_steps": 100}}
    resolved(tmp_path, recipe, changed(DEEPSPEED, "scheduler", block))
    block["params"] = {"cos_min_ratio": 0.0}
    assert "found 0.0, but the schedule's value is 0.25" in contradiction_of(
        tmp_path, recipe, changed(DEEPSPEED, "scheduler", block)
    )


def test_the_effective_configuration_leaves_nothing_open(tmp_path: Path) -> None:
    found = resolved(tmp_path, RECIPE, {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, world_size=2)
    assert "auto" not in dict(leaves(found)).values()
    assert "optimizer" not in found and "scheduler" not in found
    assert found["zero_optimization"]["overlap_comm"] is True
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert [found[name] for name in names] == [48, 24, 1, 1.0]
    assert found["zero_allow_untested_optimizer"] is True
    assert found["zero_force_ds_cpu_optimizer"] is False
    assert found["bf16"]["check_grad_overflow"] is True


def test_a_bucket_that_is_auto_holds_the_model_and_at_most_fifty_million_numbers(tmp_path: Path) -> None:
    names = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
    zero = {"stage": 3, **dict.fromkeys(names, "auto")}
    odd = {"hidden_size": 3, "num_attention_heads": 1, "intermediate_size": 1, "num_hidden_layers": 1}
    small = {**odd, "vocab_size": 8, "pad_vocab_size_to_multiple_of": 1, "max_position_embeddings": 65}
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    for sizes, wanted in ((small, 328), (large, 50_000_000)):
        recipe = changed(RECIPE, "model", {**RECIPE["model"], **sizes})
        found = resolved(tmp_path, recipe, {"zero_optimization": zero})["zero_optimization"]
        assert [found[name] for name in names] == [wanted] * 3
    assert load_pair(tmp_path / "run.json", tmp_path / "ds.json")[0].model.count_parameters(has_pair_head=False) > 3e8


def test_deepspeed_reads_the_effective_configuration_as_it_was_meant(tmp_path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = DeepSpeedConfig(resolved(tmp_path, RECIPE, DEEPSPEED))
    assert (config.zero_config.stage, config.bfloat16_config.enabled, config.grad_accum_dtype) == (2, True, "fp32")
    assert (config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (4, 12)


@pytest.mark.parametrize(
    ("stage", "precision", "accumulates_in"),
    [(0, "bf16", "bf16"), (0, "fp32", "fp32"), (1, "bf16", "fp32"), (2, "fp16", "fp32"), (3, "bf16", "fp32")],
)
def test_gradients_accumulate_and_are_reduced_in_fp32_where_the_engine_allows_it(
    tmp_path: Path, stage: int, precision: str, accumulates_in: str
) -> None:
    recipe = changed(RECIPE, "training.precision", precision)
    found = resolved(tmp_path, recipe, {"zero_optimization": {"stage": stage}})
    assert found["data_types"]["grad_accum_dtype"] == found["communication_data_type"] == accumulates_in


def test_a_file_may_ask_for_gradients_that_are_reduced_in_half_the_bytes(tmp_path: Path) -> None:
    assert (
        resolved(tmp_path, RECIPE, {**DEEPSPEED, "communication_data_type": "bf16"})["communication_data_type"]
        == "bf16"
    )


def test_fp16_at_stage_0_is_refused_with_the_reason(tmp_path: Path) -> None:
    recipe = changed(RECIPE, "training.precision", "fp16")
    text = contradiction_of(tmp_path, recipe, {"zero_optimization": {"stage": 0}})
    assert "zero_optimization.stage: needs stage 1, 2 or 3" in text and "never scales the loss" in text


def test_stage_0_cannot_accumulate_in_another_dtype(tmp_path: Path) -> None:
    text = contradiction_of(tmp_path, RECIPE, {"data_types": {"grad_accum_dtype": "fp32"}})
    assert 'found "fp32", wanted "bf16"' in text


@pytest.mark.parametrize(
    ("settings", "world_size", "wanted"),
    [
        ({"train_micro_batch_size_per_gpu": 5}, 1, "with 1 ranks 4 or 6 does"),
        (
            {"train_micro_batch_size_per_gpu": 16},
            2,
            "with a micro-batch of 16 1 or 3 ranks do",
        ),
        ({}, 5, "with 4 or 6 ranks it is"),
        ({"gradient_accumulation_steps": 7}, 1, "the nearest that does is 6 or 8"),
        ({"gradient_accumulation_steps": 3, "train_micro_batch_size_per_gpu": 4}, 1, "take 12; leave it out"),
    ],
)
def test_a_batch_that_cannot_be_split_names_the_nearest_that_can(
    tmp_path: Path, settings: dict[str, int], world_size: int, wanted: str
) -> None:
    assert wanted in contradiction_of(tmp_path, RECIPE, settings, world_size=world_size)


@pytest.mark.parametrize(("length", "micro"), [(8, 2048), (128, 128), (512, 32)])
def test_an_automatic_micro_batch_is_the_largest_divisor_within_16384_tokens(
    tmp_path: Path, length: int, micro: int
) -> None:
    recipe = changed(RECIPE, "training.train_batch_size", 4096)
    recipe = changed(changed(recipe, "sequences", {"max_seq_length": length}), "model.max_position_embeddings", 512)
    assert resolved(tmp_path, recipe, {})["train_micro_batch_size_per_gpu"] == micro


def test_monitors_without_a_folder_write_into_the_run_folder(tmp_path: Path) -> None:
    run, ds = pair(tmp_path, RECIPE, {"csv_monitor": {"enabled": True}})
    assert resolve_ds_config(run, ds, 1, run_dir="/runs/a")["csv_monitor"]["output_path"] == "/runs/a/monitor"


def bare(folder: Path, settings: Any, *overrides: str) -> RunConfig:
    run, ds = load_pair(None, write_json(folder, "ds.json", settings), overrides=overrides)
    resolve_ds_config(launched(run), ds, 1)
    return run


def test_without_a_recipe_an_optimizer_block_is_the_recipes_optimizer(tmp_path: Path) -> None:
    block = {"type": "Lamb", "params": {"lr": 0.01, "weight_decay": 0.1, "max_coeff": 10.0}}
    found = bare(tmp_path, {"optimizer": block}).optimizer
    assert found.model_dump(include={"type", "lr", "weight_decay", "max_trust"}) == {
        "type": "lamb",
        "lr": 0.01,
        "weight_decay": 0.1,
        "max_trust": 10.0,
    }


def test_a_block_of_the_default_recipes_kind_keeps_what_it_does_not_say(tmp_path: Path) -> None:
    default = bare(tmp_path, {}).optimizer
    found = bare(tmp_path, {"optimizer": {"type": default.type, "params": {"lr": 0.125}}}).optimizer
    assert found == default.model_copy(update={"lr": 0.125}) != default


def test_without_a_recipe_batch_clipping_and_precision_are_taken_too(tmp_path: Path) -> None:
    settings = {"train_batch_size": 128, "gradient_clipping": 0.5, "bf16": {"enabled": True}}
    training = bare(tmp_path, settings).training
    assert (training.train_batch_size, training.gradient_clipping, training.precision) == (128, 0.5, "bf16")


@pytest.mark.parametrize(
    ("block", "wanted"),
    [
        ({"type": "Lamb"}, "optimizer.params.lr: is missing"),
        ({"type": "Lamb", "params": {"lr": "1e-4"}}, 'ds.json: optimizer.lr: found "1e-4", wanted a number'),
        ({"type": "Lamb", "params": {"lr": 1e-4, "max_grad_norm": 1.0}}, "clipping is gradient_clipping"),
        ({"type": "AdamW", "params": {"torch_adam": False}}, "found false, wanted true"),
        ({"type": "OneBitAdam", "params": {"lr": 1e-4}}, 'found "OneBitAdam", wanted one of'),
        ({"type": "AdamW", "params": {"lr": 1e-4, "wieght_decay": 0.1}}, "optimizer.wieght_decay: unknown setting"),
        ({"type": "Muon", "params": {"momentun": 0.9}}, "optimizer.momentun: unknown setting"),
    ],
)
def test_a_wrong_optimizer_block_without_a_recipe_is_named(tmp_path: Path, block: Any, wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        bare(tmp_path, {"optimizer": block})
    assert wanted in str(caught.value)


def test_an_override_stands_above_the_deepspeed_file_and_must_agree_with_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found 0.5, but training\.gradient_clipping is 2.0"):
        bare(tmp_path, {"gradient_clipping": 0.5}, "training.gradient_clipping=2.0")
