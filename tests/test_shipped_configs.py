"""Every file under ds_configs: valid alone, valid in every legal pairing, and refused after any damage."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from config_cases import launched, write_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bert_ds.configuration.deepspeed_file.ds_config import load_pair, resolve_ds_config
from bert_ds.configuration.deepspeed_file.ds_keys import leaves
from bert_ds.configuration.reading.config_files import shipped_file
from bert_ds.configuration.recipe.run_config import ConfigError, dump_run_config, load_run_config
from bert_ds.configuration.run_plan import make_plan

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "ds_configs/recipes").glob("*.json"))
DEEPSPEED = sorted((ROOT / "ds_configs").glob("zero*.json"))


def test_the_promised_files_are_shipped() -> None:
    assert [path.stem for path in DEEPSPEED] == ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
    assert [path.stem for path in RECIPES] == [
        *("albert_base", "albert_small"),
        *("bert_base_muon", "bert_base_phase1", "bert_base_phase2", "bert_base_zh", "bert_large_phase1"),
        *("bert_large_phase2", "bert_original", "bert_original_phase2", "distilbert_base", "distilbert_small"),
        *("electra_small", "electra_tiny"),
        *("embedded_default", "modernbert_base_phase1", "modernbert_base_phase2"),
        *("modernbert_medium", "modernbert_medium_zh", "modernbert_small", "roberta_base", "roberta_small"),
    ]


@pytest.mark.parametrize("deepspeed", DEEPSPEED, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_pairing_is_legal_on_1_and_8_ranks(recipe: Path, deepspeed: Path) -> None:
    run, ds = load_pair(recipe, deepspeed)
    run = launched(run)
    for world_size in (1, 8):
        effective = resolve_ds_config(run, ds, world_size)
        plan = make_plan(run, ds, world_size)
        assert "auto" not in dict(leaves(effective)).values()
        assert effective["train_micro_batch_size_per_gpu"] == plan.split.micro_batch_size
        assert effective["gradient_accumulation_steps"] == plan.split.accumulation


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_carries_its_own_name_and_a_schema_that_exists(recipe: Path) -> None:
    run = load_run_config(recipe)
    assert run.name == recipe.stem
    assert run.schema_ == str(ROOT / "ds_configs/schema.json")


@pytest.mark.parametrize(
    ("override", "deepspeed", "wanted"),
    [
        ("training.precision=fp16", "zero0", "needs stage 1, 2 or 3"),
        ('optimizer={"type": "deepspeed_fused_lamb", "lr": 1e-3}', "zero1", "one trust ratio per shard"),
        ('optimizer={"type": "apex_fused_lamb", "lr": 1e-3}', "zero3", "one trust ratio per shard"),
        ('optimizer={"type": "deepspeed_cpu_adam", "lr": 1e-3}', "zero2", "works on the host"),
        ('optimizer={"type": "deepspeed_fused_adam", "lr": 1e-3}', "zero2_offload", "works on the GPU"),
    ],
)
def test_an_illegal_pairing_is_refused_with_the_reason(override: str, deepspeed: str, wanted: str) -> None:
    run, ds = load_pair(None, ROOT / f"ds_configs/{deepspeed}.json", overrides=[override])
    with pytest.raises(ConfigError, match=wanted):
        make_plan(run, ds, 1)


def test_a_second_phase_starts_from_the_run_of_the_first() -> None:
    for name in ("bert_base", "bert_large"):
        first = load_run_config(ROOT / f"ds_configs/recipes/{name}_phase1.json")
        second = load_run_config(ROOT / f"ds_configs/recipes/{name}_phase2.json")
        assert second.init_from == str(ROOT / "runs" / first.name)
        assert second.model == first.model


def test_the_published_lamb_recipe_is_followed() -> None:
    run = load_run_config(ROOT / "ds_configs/recipes/bert_large_phase2.json")
    assert (run.training.train_batch_size, run.training.total_steps, run.optimizer.lr) == (32_768, 1_563, 4e-3)
    assert (run.sequences.max_seq_length, run.masking.max_predictions_per_seq, run.schedule.power) == (512, 80, 0.5)


def test_the_published_albert_is_followed() -> None:
    """Sizes of its base model and the defaults of its published script; no correction of the moments, as there."""
    run = load_run_config(ROOT / "ds_configs/recipes/albert_base.json")
    without_pooler, head, padding = 11_683_584 - 768 * 769, 98_688 + 30_000, 16 * 129
    assert run.model.count_parameters(has_pair_head=False) == without_pooler + head + padding
    assert (run.training.train_batch_size, run.training.total_steps, run.optimizer.lr) == (4096, 125_000, 0.00176)
    assert (run.schedule.num_warmup_steps(125_000), run.max_seq_length) == (3125, 512)
    assert run.sequences.sentence_pair == "sop"
    assert not run.optimizer.bias_correction  # type: ignore[union-attr]


def test_the_published_distilbert_is_followed() -> None:
    """Numbers of its paper and of the command that trained it; every other layer of BERT-base, as its script takes."""
    run = load_run_config(ROOT / "ds_configs/recipes/distilbert_base.json")
    assert run.model.count_parameters(has_pair_head=False) == 66_985_530 + 6 * 769  # rows that pad to a multiple of 64
    assert (run.training.train_batch_size, run.optimizer.lr, run.training.gradient_clipping) == (4096, 5e-4, 5.0)
    assert run.distillation is not None and run.distillation.init_layers == (0, 2, 4, 7, 9, 11)
    weights = run.distillation.mlm_weight, run.distillation.soft_weight, run.distillation.hidden_weight
    assert (weights, run.distillation.temperature) == ((2.0, 5.0, 1.0), 2.0)


def test_the_published_roberta_is_followed() -> None:
    """Table 9 of its paper (arXiv 1907.11692), and the size of the published base model with its masked-word head."""
    run = load_run_config(ROOT / "ds_configs/recipes/roberta_base.json")
    assert run.model.count_parameters(has_pair_head=False) == 124_697_433 + 39 * 769  # rows pad to a multiple of 64
    training, optimizer = run.training, run.optimizer
    assert (training.train_batch_size, training.total_steps, training.gradient_clipping) == (8192, 500_000, 0.0)
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("adamw", 6e-4, 0.01)  # type: ignore[union-attr]
    assert (optimizer.betas, optimizer.eps) == ((0.9, 0.98), 1e-6)  # type: ignore[union-attr]
    assert (run.schedule.type, run.schedule.num_warmup_steps(500_000)) == ("linear", 24_000)
    assert (run.max_seq_length, run.sequences.cross_documents, run.masking.mlm_probability) == (512, True, 0.15)


def test_the_published_phases_of_modernbert_are_followed() -> None:
    """Tokens, rates and shapes of its yamls; the decay of the weights is 1e-5 a step there, whatever the rate."""
    first, second = (load_run_config(ROOT / f"ds_configs/recipes/modernbert_base_phase{k}.json") for k in (1, 2))
    changed = {"max_position_embeddings": 8192, "global_rope_theta": 160_000.0}
    assert second.init_from == str(ROOT / "runs" / first.name)
    assert second.model == first.model.model_copy(update=changed)
    assert (first.model.max_position_embeddings, first.model.global_rope_theta) == (1024, 10_000.0)
    assert first.model.count_parameters(has_pair_head=False) == 149_655_232
    for run, tokens, length, batch, rate in (
        (first, 1.719e12, 1024, 4608, 8e-4),
        (second, 300e9, 8192, 576, 3e-4),
    ):
        assert (run.max_seq_length, run.training.train_batch_size, run.optimizer.lr) == (length, batch, rate)
        assert abs(run.training.total_steps * batch * length / tokens - 1) < 1e-5
        assert run.optimizer.weight_decay * rate == pytest.approx(1e-5, rel=2e-3)  # type: ignore[union-attr]
    assert first.schedule.num_warmup_steps(first.training.total_steps) * 4608 * 1024 == pytest.approx(3e9, rel=1e-3)
    assert second.schedule.decay_fraction * 300e9 == pytest.approx(50e9, rel=1e-3)


def test_a_shipped_file_is_found_in_a_checkout() -> None:
    assert shipped_file("recipes/embedded_default.json") == ROOT / "ds_configs/recipes/embedded_default.json"
    with pytest.raises(ConfigError, match="neither in"):
        shipped_file("recipes/none.json")


VALUES = [True, False, None, -1, 0, 3, 0.5, -0.5, 1e300, "", "x", "auto", "none", [], [1], {}, {"x": 1}, 2**62]


def paths_in(value: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every setting and block of a JSON object."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield (*prefix, name)
            yield from paths_in(inner, (*prefix, name))


def block_of(content: Any, path: tuple[str, ...]) -> Any:
    for name in path[:-1]:
        content = content[name]
    return content


TARGETS = [
    (file, path)
    for file in (*RECIPES, *DEEPSPEED)
    for path in paths_in(json.loads(file.read_text(encoding="utf-8")))
    if path[0] != "$schema"
]
FUZZ = settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def load_damaged(folder: Path, original: Path, content: Any) -> tuple[Any, Any]:
    """Load the damaged file with an undamaged partner; return both as they were understood."""
    damaged = write_json(folder, original.name, content)
    is_recipe = original in RECIPES
    run, ds = load_pair(damaged if is_recipe else None, DEEPSPEED[2] if is_recipe else damaged)
    make_plan(run, ds, 2)
    return json.loads(dump_run_config(run)), resolve_ds_config(launched(run), ds, 2)


@FUZZ
@given(target=st.sampled_from(TARGETS), suffix=st.sampled_from(["s", "_", "X", " ", ".", "ü"]))
def test_a_misspelt_name_is_never_accepted(tmp_path: Path, target: tuple[Path, tuple[str, ...]], suffix: str) -> None:
    file, path = target
    content = json.loads(file.read_text(encoding="utf-8"))
    block = block_of(content, path)
    block[path[-1] + suffix] = block.pop(path[-1])
    with pytest.raises(ConfigError) as caught:
        load_damaged(tmp_path, file, content)
    assert path[-1] in str(caught.value)


@FUZZ
@given(target=st.sampled_from(TARGETS), value=st.sampled_from(VALUES))
def test_another_value_is_refused_or_takes_effect(
    tmp_path: Path, target: tuple[Path, tuple[str, ...]], value: Any
) -> None:
    file, path = target
    content = json.loads(file.read_text(encoding="utf-8"))
    block_of(content, path)[path[-1]] = copy.deepcopy(value)
    try:
        recipe, effective = load_damaged(tmp_path, file, content)
    except ConfigError as error:
        assert str(error)
        return
    understood = block_of(recipe if file in RECIPES else effective, path)[path[-1]]
    if isinstance(value, str) and file in RECIPES and path[-1] in ("path", "tokenizer", "init_from", "teacher"):
        assert understood.endswith(value)
    elif file in DEEPSPEED and value in ("auto", None):
        assert understood != "auto"
    elif value == {}:
        assert isinstance(understood, dict)
    else:
        assert understood == value and isinstance(understood, bool) == isinstance(value, bool)


@FUZZ
@given(target=st.sampled_from(TARGETS))
def test_a_missing_setting_is_an_error_or_its_documented_default(
    tmp_path: Path, target: tuple[Path, tuple[str, ...]]
) -> None:
    file, path = target
    content = json.loads(file.read_text(encoding="utf-8"))
    del block_of(content, path)[path[-1]]
    try:
        load_damaged(tmp_path, file, content)
    except ConfigError as error:
        assert str(error)


@FUZZ
@given(data=st.binary(max_size=200), cut=st.integers(0, 600), file=st.sampled_from([*RECIPES, *DEEPSPEED]))
def test_damaged_bytes_are_a_config_error(tmp_path: Path, data: bytes, cut: int, file: Path) -> None:
    original = file.read_bytes()
    damaged = tmp_path / file.name
    damaged.write_bytes(original[:cut] + data + original[cut + 1 :])
    try:
        load_pair(damaged if file in RECIPES else None, DEEPSPEED[2] if file in RECIPES else damaged)
    except ConfigError as error:
        assert str(error) and all(line.isprintable() for line in str(error).split("\n"))
