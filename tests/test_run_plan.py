"""Derived numbers against published ones, and the checks that need more than one section or file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from config_cases import RECIPE, changed, write_json

from bert_ds.configuration.deepspeed_file.ds_config import load_pair
from bert_ds.configuration.families.bert import BertConfig
from bert_ds.configuration.plan_table import plan_table
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.configuration.run_plan import RunPlan, make_plan, size_text
from bert_ds.configuration.run_size import flops_per_token, teacher_flops_per_token

ROOT = Path(__file__).resolve().parents[1]
BASE = BertConfig(pad_vocab_size_to_multiple_of=1)
LARGE = BertConfig(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    pad_vocab_size_to_multiple_of=1,
)


def plan_of(folder: Path, recipe: Any = RECIPE, deepspeed: Any = None, *, world_size: int = 1) -> RunPlan:
    run, ds = load_pair(write_json(folder, "run.json", recipe), write_json(folder, "ds.json", deepspeed or {}))
    return make_plan(run, ds, world_size)


def problems_of(folder: Path, recipe: Any = RECIPE, deepspeed: Any = None, *, world_size: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        plan_of(folder, recipe, deepspeed, world_size=world_size)
    return str(caught.value)


def shipped(recipe: str, deepspeed: str, *, world_size: int) -> RunPlan:
    run, ds = load_pair(ROOT / f"ds_configs/recipes/{recipe}.json", ROOT / f"ds_configs/{deepspeed}.json")
    return make_plan(run, ds, world_size)


@pytest.mark.parametrize(
    ("model", "has_pair_head", "number"),
    [(BASE, False, 109_514_298), (BASE, True, 110_106_428), (LARGE, False, 335_174_458), (LARGE, True, 336_226_108)],
)
def test_parameters_are_those_of_hugging_face(model: BertConfig, has_pair_head: bool, number: int) -> None:
    assert model.count_parameters(has_pair_head=has_pair_head) == number


@pytest.mark.parametrize("has_pair_head", [True, False])
def test_parameters_are_those_of_the_model_that_is_built(has_pair_head: bool) -> None:
    from bert_ds.encoder.pretraining_model import PretrainingModel

    config = BertConfig(
        vocab_size=61,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=40,
        type_vocab_size=3,
    )
    model = PretrainingModel(config, kernels="torch", has_pair_head=has_pair_head)
    built = sum(parameter.numel() for parameter in model.parameters())
    assert config.count_parameters(has_pair_head=has_pair_head) == built


@pytest.mark.parametrize(
    ("recipe", "length", "gflop"),
    [
        ("bert_base_phase1", 128, 69.9),
        ("bert_base_phase2", 512, 301.4),
        ("bert_large_phase1", 128, 240.6),
        ("bert_large_phase2", 512, 1020.5),
    ],
)
def test_flops_of_a_sequence_are_the_published_ones(recipe: str, length: int, gflop: float) -> None:
    # Published for 20 and 80 predictions; 15 % of the tokens are 19.2 and 76.8.
    plan = shipped(recipe, "zero2", world_size=8)
    assert plan.flops_per_token(length) * length / 1e9 == pytest.approx(gflop, rel=3e-3)


def test_a_bound_on_the_predictions_bounds_the_flops_of_their_head(tmp_path: Path) -> None:
    found = [
        plan_of(tmp_path, changed(RECIPE, "masking", masking)).flops_per_token(128)
        for masking in ({"mlm_probability": 0.5, "max_predictions_per_seq": 32}, {"mlm_probability": 0.25})
    ]
    assert found[0] == found[1]


def test_the_global_batch_is_micro_batch_times_accumulation_times_ranks() -> None:
    plan = shipped("bert_large_phase1", "zero2", world_size=8)
    assert plan.split == (128, 64, 8)
    assert plan.split.train_batch_size == plan.train_batch_size == 65_536
    assert (plan.split.num_parts, plan.split.parts_of(1)) == (512, range(64, 128))


def test_steps_tokens_and_examples_follow_from_the_recipe() -> None:
    plan = shipped("bert_large_phase1", "zero2", world_size=8)
    assert (plan.total_steps, plan.warmup_steps) == (7_038, 2_000)
    assert (plan.examples_seen, plan.max_tokens_per_step) == (461_242_368, 8_388_608)


@pytest.mark.parametrize(
    ("precision", "deepspeed", "per_parameter"),
    [
        ("fp32", {}, (4, 4, 8)),
        ("bf16", {}, (2, 6, 12)),
        ("bf16", {"zero_optimization": {"stage": 1}}, (2, 10, 3)),
        ("bf16", {"zero_optimization": {"stage": 2}}, (2, 5, 3)),
    ],
)
def test_memory_divides_by_the_ranks_what_the_stage_divides(
    tmp_path: Path, precision: str, deepspeed: Any, per_parameter: tuple[int, int, int]
) -> None:
    plan = plan_of(tmp_path, changed(RECIPE, "training.precision", precision), deepspeed, world_size=4)
    found = plan.memory()
    exact = [number / plan.num_parameters for number in (found.weights, found.gradients, found.optimizer)]
    assert exact == pytest.approx(list(per_parameter), rel=1e-3)


def test_offloaded_state_is_counted_on_the_host(tmp_path: Path) -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    found = plan_of(tmp_path, deepspeed={"zero_optimization": zero}, world_size=4).memory()
    assert found.optimizer == 0 and found.host > 0


def test_recomputing_activations_takes_less_memory(tmp_path: Path) -> None:
    recompute = {"activation_checkpointing": {"number_checkpoints": 2}}
    kept = plan_of(tmp_path).memory().activations
    assert plan_of(tmp_path, deepspeed=recompute).memory().activations < kept


def test_disk_holds_the_kept_checkpoints_and_the_one_being_written(tmp_path: Path) -> None:
    recipe = changed(RECIPE, "checkpoints", {"every_steps": 10, "keep_last": 3, "keep_every_steps": 50})
    plan = plan_of(tmp_path, recipe)
    assert plan.checkpoint_bytes == plan.num_parameters * 14
    assert plan.disk_bytes == plan.checkpoint_bytes * (3 + 1 + 2)


def test_the_disk_speed_is_told_at_which_deepspeeds_launcher_lets_a_save_end(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, RECIPE)
    told = dict(plan_table(plan))["stop on request"]
    assert f"kills after 30 s, enough for a save above {size_text(plan.checkpoint_bytes / 30)}/s" in told


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ("sequences", {"max_seq_length": 256}, "256 is more than model.max_position_embeddings 128"),
        ("corpus.vocab_size", 4097, "4097 differs from model.vocab_size 4096"),
        ("model.type_vocab_size", 1, 'too few for sentence_pair "nsp"'),
        ("masking", {"max_predictions_per_seq": 129}, "129 is more than sequences.max_seq_length 128"),
        ("schedule.warmup_steps", 101, "101 is more than training.total_steps 100"),
        ("schedule", {"type": "wsd", "warmup_steps": 91}, "are more than training.total_steps 100"),
        ("checkpoints", {"every_steps": 10, "keep_every_steps": 15}, "15 is not a multiple"),
        ("checkpoints", {"keep_every_steps": 15}, "needs checkpoints.every_steps"),
    ],
)
def test_a_contradiction_inside_the_recipe_is_refused(tmp_path: Path, path: str, value: object, wanted: str) -> None:
    text = problems_of(tmp_path, changed(RECIPE, path, value))
    assert wanted in text and text.startswith(f"{tmp_path}/run.json: {path}")


def test_problems_of_the_recipe_and_of_the_pair_come_together(tmp_path: Path) -> None:
    recipe = changed(RECIPE, "model.type_vocab_size", 1)
    text = problems_of(tmp_path, recipe, {"gradient_clipping": 3.0, "train_micro_batch_size_per_gpu": 5})
    assert [line.split(": ")[1] for line in text.splitlines()] == [
        "model.type_vocab_size",
        "gradient_clipping",
        "train_micro_batch_size_per_gpu",
    ]


OFFLOADED = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("kind", "zero", "wanted"),
    [
        ("deepspeed_fused_lamb", {"stage": 1}, "one trust ratio per shard at stage 1"),
        ("apex_fused_lamb", {"stage": 3}, "one trust ratio per shard at stage 3"),
        ("deepspeed_cpu_adam", {"stage": 2}, "works on the host"),
        ("deepspeed_fused_adam", OFFLOADED, "works on the GPU"),
    ],
)
def test_a_foreign_optimizer_is_refused_where_it_is_wrong(
    tmp_path: Path, kind: str, zero: dict[str, Any], wanted: str
) -> None:
    recipe = changed(RECIPE, "optimizer", {"type": kind, "lr": 1e-3})
    assert wanted in problems_of(tmp_path, recipe, {"zero_optimization": zero})


@pytest.mark.parametrize(
    ("kind", "zero"),
    [
        *[("lamb", {"stage": stage}) for stage in range(4)],
        *[(kind, {"stage": 3}) for kind in ("adamw", "lans", "stableadamw", "lion")],
        ("deepspeed_fused_lamb", {"stage": 0}),
        ("deepspeed_cpu_adam", OFFLOADED),
        ("lamb", OFFLOADED),
    ],
)
def test_an_optimizer_is_accepted_where_it_is_right(tmp_path: Path, kind: str, zero: dict[str, Any]) -> None:
    recipe = changed(RECIPE, "optimizer", {"type": kind, "lr": 1e-3})
    assert plan_of(tmp_path, recipe, {"zero_optimization": zero}).zero_stage == zero["stage"]


def shards(folder: Path, **manifest: Any) -> dict[str, Any]:
    """A recipe whose tokenizer and two shard folders exist; the manifest of the second can be changed."""
    content = {"vocab_size": 4096, "tokenizer_fingerprint": "a", "splits": {"train": {"num_tokens": 6400}}}
    for name, extra in (("one", {}), ("two", manifest)):
        (folder / name).mkdir()
        write_json(folder / name, "manifest.json", content | extra)
    (folder / "tok").mkdir()
    (folder / "tok/vocab.txt").write_text("".join(f"{index}\n" for index in range(4096)), encoding="utf-8")
    sources = [{"path": "one"}, {"path": "two", "weight": 2.0}]
    return changed(RECIPE, "corpus", {"type": "shards", "sources": sources, "tokenizer": "tok"})


def test_a_run_by_the_clock_is_planned_without_its_steps(tmp_path: Path) -> None:
    recipe = shards(tmp_path)
    training = {key: value for key, value in recipe["training"].items() if key != "total_steps"}
    plan = plan_of(tmp_path, recipe | {"training": training | {"max_minutes": 90}})
    rows = dict(plan_table(plan))
    assert rows["steps"] == "as many as fit into 90 minutes, decided at the launch"
    assert not {"examples", "FLOPs of the run"} & set(rows)
    assert {"memory at stage 3", "checkpoints"} <= set(rows)


def test_epochs_follow_from_the_manifests(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, shards(tmp_path))
    assert plan.corpus_tokens == 19_200 and plan.warnings == ()
    assert "32.0 epochs of 19,200" in dict(plan_table(plan))["examples"]


@pytest.mark.parametrize(
    ("manifest", "wanted"),
    [
        ({"vocab_size": 8192}, "corpus.sources.1.path: was built with 8192 pieces, model.vocab_size is 4096"),
        ({"tokenizer_fingerprint": "b"}, "corpus.sources.1.path: was built with another tokenizer"),
    ],
)
def test_shards_of_another_tokenizer_are_refused(tmp_path: Path, manifest: dict[str, Any], wanted: str) -> None:
    assert wanted in problems_of(tmp_path, shards(tmp_path, **manifest))


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path) -> None:
    recipe = shards(tmp_path)
    (tmp_path / "tok/vocab.txt").write_text("[PAD]\n[UNK]\n", encoding="utf-8")
    assert "corpus.tokenizer: holds 2 pieces, model.vocab_size is 4096" in problems_of(tmp_path, recipe)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    recipe = shards(tmp_path)
    (tmp_path / "one/manifest.json").write_text("{", encoding="utf-8")
    assert "corpus.sources.0.path" in problems_of(tmp_path, recipe)


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    write_json(tmp_path / "weights", "config.json", {"hidden_size": 768, "num_hidden_layers": 2})
    text = problems_of(tmp_path, changed(RECIPE, "init_from", "weights"))
    assert "init_from: the weights have hidden_size 768 (here 128)" in text


def test_files_that_are_not_there_are_warnings(tmp_path: Path) -> None:
    corpus = {"type": "shards", "sources": [{"path": "none"}], "tokenizer": "tok"}
    warnings = plan_of(tmp_path, changed(RECIPE, "corpus", corpus)).warnings
    assert [warning.split(": ")[0] for warning in warnings] == ["corpus.tokenizer", "corpus.sources.0.path"]


def test_bf16_accumulation_at_stage_0_is_warned_about(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, deepspeed={"train_micro_batch_size_per_gpu": 4})
    assert plan.warnings == (
        "stage 0 accumulates 12 micro-steps in bf16, which costs precision; stages 1 to 3 accumulate in fp32",
    )


def test_an_estimate_beyond_the_gpu_is_warned_about(tmp_path: Path) -> None:
    run, ds = load_pair(write_json(tmp_path, "run.json", RECIPE), write_json(tmp_path, "ds.json", {}))
    assert make_plan(run, ds, 1, gpu_memory_bytes=10**12).warnings == ()
    assert "a rank needs about" in make_plan(run, ds, 1, gpu_memory_bytes=10**6).warnings[0]


def test_the_plan_of_a_login_node_needs_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, bert_ds.configuration.run_plan; print(sorted({'torch', 'deepspeed', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout.replace("'", '"')) == []


def test_bytes_are_shown_in_thousands() -> None:
    texts = [size_text(number) for number in (0, 999, 1000, 99_900, 1_500_000, 2 * 10**9, 3.2e12)]
    assert texts == ["0 B", "999 B", "1.0 kB", "99.9 kB", "1.5 MB", "2.0 GB", "3.2 TB"]


def test_the_table_of_a_run_worked_out_by_hand(tmp_path: Path) -> None:
    recipe = changed(changed(RECIPE, "training.precision", "fp32"), "training.kernels", "triton")
    plan = plan_of(tmp_path, recipe, {"train_micro_batch_size_per_gpu": 4}, world_size=2)
    rows, number = dict(plan_table(plan)), plan.num_parameters
    assert rows["global batch"] == "48 = 4 micro-batch x 6 accumulation x 2 ranks"
    assert rows["examples"] == "4,800, at most 614,400 tokens"
    assert rows["FLOPs of the run"] == f"at most {plan.flops_per_token(128) * 614_400:.3e}"
    # 512 tokens; per layer 8 x 128 + 2 x 512 values of 4 bytes; logits of 15 % of the tokens.
    layers, logits = 2 * 512 * (8 * 128 + 2 * 512) * 4, plan.memory().activations
    assert 0 <= logits - layers <= 512 * 4096 * 4
    assert plan.checkpoint_bytes == number * (4 + 8)
    shown = rows["memory at stage 0"]
    assert f"weights {size_text(4 * number)}, gradients {size_text(4 * number)}" in shown
    assert f"optimizer {size_text(8 * number)}" in shown and shown.endswith("<- this run")


def test_a_teacher_computes_forward_alone_and_takes_its_place_in_the_memory(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert teacher_flops_per_token(plan.run.model, plan.run, 100.0) * 3 == pytest.approx(
        flops_per_token(plan.run, 100.0)
    )
    taught = replace(plan, teacher=plan.run.model)
    assert taught.memory().weights > plan.memory().weights
    assert taught.flops_per_token(100.0) == pytest.approx(plan.flops_per_token(100.0) * 4 / 3)


def test_a_secondary_partition_that_does_not_divide_the_ranks_is_refused(tmp_path: Path) -> None:
    deepspeed = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    found = problems_of(tmp_path, deepspeed=deepspeed, world_size=3)
    assert "zero_optimization.zero_hpz_partition_size: 2 does not divide 3 ranks" in found


@pytest.mark.parametrize(
    ("masking", "wanted"),
    [
        ({}, "15% of the pieces: 80% [MASK], 10% a random piece, 10% kept"),
        (
            {"mlm_probability": 0.3, "mask_token_fraction": 1.0, "random_token_fraction": 0.0, "whole_word_mask": True},
            "30% of the pieces in whole words: 100% [MASK]",
        ),
        (
            {"whole_word_mask": True, "span_mask": True, "max_predictions_per_seq": 20},
            "15% of the pieces in runs of whole words: 80% [MASK], 10% a random piece, 10% kept, at most 20 in an "
            "example",
        ),
    ],
)
def test_a_plan_says_what_is_masked(tmp_path: Path, masking: dict[str, Any], wanted: str) -> None:
    assert dict(plan_table(plan_of(tmp_path, {**RECIPE, "masking": masking})))["masks"] == wanted


@pytest.mark.parametrize(
    ("stage", "accumulation", "world_size", "reason"),
    [(2, 1, 1, "nobody to share with"), (3, 2, 2, "every micro-step"), (2, 1, 2, ""), (1, 4, 1, "")],
)
def test_stage_1_is_recommended_on_one_gpu_and_for_accumulation(
    tmp_path: Path, stage: int, accumulation: int, world_size: int, reason: str
) -> None:
    spread = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": accumulation}
    warnings = [text for text in plan_of(tmp_path, RECIPE, spread, world_size=world_size).warnings if "zero1" in text]
    assert len(warnings) == bool(reason) and all(reason in text for text in warnings)
