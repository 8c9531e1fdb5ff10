"""Recipes: strict loading, overrides, paths, and messages that say everything at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from config_cases import DELETED, RECIPE, changed, write_json

from bert_ds.configuration.reading.config_files import MAX_BYTES
from bert_ds.configuration.reading.config_secrets import is_secret_name
from bert_ds.configuration.recipe.run_config import ConfigError, RunConfig, dump_run_config, load_run_config

SHARDS = {"type": "shards", "sources": [{"path": "../data/a"}, {"path": "/data/b"}], "tokenizer": "tok"}


def message(path: Path, *overrides: str) -> str:
    """What a user sees of a recipe that cannot be loaded."""
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, overrides)
    return str(caught.value)


def message_of(folder: Path, content: Any) -> str:
    return message(write_json(folder, "run.json", content))


def test_a_valid_recipe_loads_with_defaults_filled_in(tmp_path: Path) -> None:
    run = load_run_config(write_json(tmp_path, "run.json", RECIPE))
    assert (run.optimizer.type, run.masking.mlm_probability, run.schedule.num_warmup_steps(100)) == ("lamb", 0.15, 10)


def test_a_saved_recipe_loads_as_the_same_recipe(tmp_path: Path) -> None:
    run = load_run_config(write_json(tmp_path, "run.json", changed(RECIPE, "corpus", SHARDS)))
    assert load_run_config(write_json(tmp_path, "saved.json", dump_run_config(run))) == run


def test_every_problem_of_a_file_is_reported_at_once(tmp_path: Path) -> None:
    recipe = changed(RECIPE, "model.hiden_size", 3)
    recipe = changed(recipe, "training.total_steps", 1.5)
    recipe = changed(recipe, "optimizer.type", "lmb")
    recipe = changed(recipe, "schedule", {"type": "linear"})
    path = write_json(tmp_path, "run.json", recipe)
    assert message(path).splitlines() == [
        f'{path}: model.hiden_size: unknown setting; did you mean "hidden_size"?',
        f'{path}: optimizer.type: found "lmb", wanted one of "adamw", "lamb", "lans", "stableadamw", "lion", '
        '"muon", "deepspeed_fused_adam", "deepspeed_cpu_adam", "deepspeed_fused_lamb", "apex_fused_lamb"; did you mean '
        '"lamb"?',
        f"{path}: schedule: give exactly one of warmup_steps and warmup_fraction",
        f"{path}: training.total_steps: found 1.5, wanted a whole number",
    ]


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ("training.train_batch_size", True, "found true, wanted a whole number"),
        ("training.train_batch_size", 48.0, "found 48.0, wanted a whole number"),
        ("training.train_batch_size", "48", 'found "48", wanted a whole number'),
        ("training.train_batch_size", 0, "found 0, wanted >= 1"),
        ("training.precision", "bf-16", 'did you mean "bf16"?'),
        ("training.gradient_clipping", -1, "found -1, wanted >= 0.0"),
        ("format", True, "found true, wanted a whole number"),
        ("format", 1.0, "found 1.0, wanted a whole number"),
        ("format", 2, "found 2, wanted <= 1"),
        ("seed", None, "found null, wanted a whole number"),
        ("optimizer.lr", "1e-4", 'found "1e-4", wanted a number'),
        ("optimizer.lr", DELETED, "is missing"),
        ("optimizer.betas", [0.9], "optimizer.betas.1: is missing"),
        ("optimizer.betas", [0.9, 1.0], "found 1.0, wanted < 1.0"),
        ("optimizer.min_trust", 20.0, ""),
        ("optimizer.weight_norm_clamp", [10.0, 0.001], "the lower bound is larger than the upper"),
        ("model", [], "found an empty list, wanted an object"),
        ("model.num_attention_heads", 3, "hidden_size 128 is not a multiple of num_attention_heads 3"),
        ("name", "a\nb", "wanted printable text"),
        ("name", "../up", "wanted a match of"),
        ("init_from", "", "wanted a string that is not empty"),
        ("schedule.power", 0.5, 'power 0.5 is for type polynomial, the type is "linear"'),
        (
            "optimizer",
            {"typ": "lamb", "lr": 0.1},
            'optimizer.type: is missing, wanted the kind of this section, which is misspelt "typ" here',
        ),
        ("optimizer.lr", 1e300, "found 1e+300, wanted <= 1000000000.0"),
        ("corpus", SHARDS | {"sources": [{"path": "a"}, {"path": "./a"}]}, "name it once and give it a weight"),
        ("corpus", SHARDS | {"sources": [{"path": "a", "weight": 1e-300}]}, "wanted >= 1e-06"),
        ("masking", {"whole_word_mask": False, "word_segmenter": "jieba"}, "needs whole_word_mask: true"),
        ("total_steps", 3, 'did you mean "training.total_steps"?'),
        ("model.seed", 3, 'did you mean "seed" at the top of the file?'),
        ("training.train_micro_batch_size_per_gpu", 8, "it belongs to the DeepSpeed file"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_wanted(tmp_path: Path, path: str, value: object, wanted: str) -> None:
    recipe = changed(RECIPE, path, value)
    if path == "optimizer.min_trust":
        recipe = changed(recipe, "optimizer.max_trust", 10.0)
        wanted = "min_trust 20.0 is larger than max_trust 10.0"
    assert wanted in message_of(tmp_path, recipe)


@pytest.mark.parametrize("section", ["optimizer", "training", "schedule"])
def test_clipping_by_the_optimizer_is_refused_with_a_pointer(tmp_path: Path, section: str) -> None:
    assert "clipping is training.gradient_clipping" in message_of(
        tmp_path, changed(RECIPE, f"{section}.max_grad_norm", 1)
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"seed": 1, "seed": 2}', "seed: is given twice"),
        ('{"training": {"total_steps": 1, "total_steps": 2}}', "training.total_steps: is given twice"),
        ('{"seed": NaN}', "seed: found NaN, wanted a finite number"),
        ('{"seed": -Infinity}', "seed: found -Infinity, wanted a finite number"),
        ('{"seed": 1e999}', "seed: found 1e999, wanted a finite number"),
        ('{"seed": ' + "9" * 4000 + "}", "wanted a finite number below 2^63"),
        ('{"seed": ' + "9" * 5000 + "}", "wanted a finite number below 2^63"),
        ('{"seed": 1', "not JSON"),
        ("", "not JSON"),
        ("[1]", "found a list, wanted one JSON object"),
        ("NaN", "wanted one JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 30_000 + "1" + "}" * 30_000, "nested too deeply"),
        ('{"a":' * 40 + "1" + "}" * 40, "nested too deeply"),
        ('{"name": "\\ud800"}', "wanted printable text"),
        ('{"na\\nme": 1}', "wanted printable text"),
        ("// comment\n{}", "not JSON"),
        ('{"seed": 1,}', "not JSON"),
        ("\ufeff{}", "byte order mark"),
        ("{}\0", "NUL"),
    ],
    ids=range(20),
)
def test_text_that_is_no_plain_json_object_is_refused(tmp_path: Path, text: str, wanted: str) -> None:
    assert wanted in message_of(tmp_path, text)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b'{"name": "\xff"}')
    assert message(path) == f'{path}:1: byte 10 is no UTF-8 (encoding "latin-1"?)'


def test_a_file_larger_than_any_configuration_is_refused(tmp_path: Path) -> None:
    assert "has 200001 bytes, wanted at most 200000" in message_of(tmp_path, " " * (MAX_BYTES + 1))


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.json")
    assert "not a regular file" in message(tmp_path / "run.json")


def test_a_link_to_an_endless_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").symlink_to("/dev/zero")
    assert "not a regular file" in message(tmp_path / "run.json")


@pytest.mark.parametrize("name", ["missing.json", "", "a\0b"])
def test_a_file_that_is_not_there_is_one_line(name: str) -> None:
    assert len(message(Path(name) if "\0" not in name else name).splitlines()) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "key", ["api_key", "hf_token", "password", "aws-secret", "token", "authToken", "WANDB_KEY", "privateKey", "bearer"]
)
def test_a_secret_is_refused_and_never_printed(tmp_path: Path, key: str) -> None:
    text = message_of(tmp_path, changed(RECIPE, f"training.{key}", "hunter2"))
    assert "secrets are read from the environment" in text and "hunter2" not in text


@pytest.mark.parametrize(
    "value",
    ["https://me:hunter2@host/corpus", "s3://a:hunter2@b", "hf_" + "hunter2" * 5, "ghp_" + "hunter2" * 6],
    ids=range(4),
)
def test_a_value_that_can_only_be_a_secret_is_refused_and_never_printed(tmp_path: Path, value: str) -> None:
    text = message_of(tmp_path, changed(RECIPE, "init_from", value))
    assert "init_from: looks like a secret" in text and "hunter2" not in text


@pytest.mark.parametrize(
    ("path", "variable"),
    [("wandb.api_key", "WANDB_API_KEY"), ("training.hf_token", "HF_TOKEN"), ("key.token", "HF_TOKEN")],
)
def test_the_message_about_a_secret_names_the_variable_to_set(tmp_path: Path, path: str, variable: str) -> None:
    assert f"set {variable}" in message_of(tmp_path, changed(RECIPE, path, "hunter2")).replace(
        "WANDB_API_KEY, COMET_API_KEY or ", ""
    )


@pytest.mark.parametrize(
    "name", ["mask_token_fraction", "random_token_fraction", "tokenizer", "keep_last", "experiment_key"]
)
def test_a_name_that_only_resembles_a_secret_is_none(name: str) -> None:
    assert not is_secret_name(name)


def test_an_object_of_thousands_of_names_is_refused_as_a_whole(tmp_path: Path) -> None:
    text = message_of(tmp_path, RECIPE | {"model": {f"unknown_{index}": 1 for index in range(2000)}})
    assert "model: found 2000 names in one object, wanted at most 1000" in text and len(text.splitlines()) == 1


def test_a_long_value_is_shortened(tmp_path: Path) -> None:
    assert len(message_of(tmp_path, changed(RECIPE, "training.precision", "x" * 100_000))) < 500


def test_the_number_of_lines_is_bounded(tmp_path: Path) -> None:
    recipe = RECIPE | {f"unknown_{index}": 1 for index in range(500)}
    assert len(message_of(tmp_path, recipe).splitlines()) == 51


def test_an_override_is_json_or_else_a_string(tmp_path: Path) -> None:
    path = write_json(tmp_path, "run.json", RECIPE)
    run = load_run_config(path, ["optimizer.lr=1e-3", "training.precision=fp32", "evaluation.every_steps=5"])
    assert (run.optimizer.lr, run.training.precision, run.evaluation.every_steps) == (1e-3, "fp32", 5)


def test_an_override_replaces_a_whole_section_or_an_item_of_a_list(tmp_path: Path) -> None:
    path = write_json(tmp_path, "run.json", changed(RECIPE, "corpus", SHARDS))
    run = load_run_config(path, ['optimizer={"type": "lion", "lr": 1e-4}', "corpus.sources.1.weight=2.5"])
    assert run.optimizer.type == "lion"
    assert run.corpus.sources[1].weight == 2.5  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("optimizer.lr=fast", '--set: optimizer.lr: found "fast", wanted a number'),
        ("optimizer.lr=NaN", "--set: optimizer.lr: found NaN"),
        ("optimizer.lrr=1", '--set: optimizer.lrr: unknown setting; did you mean "lr"?'),
        ("optimizer.lr", "wanted section.name=value"),
        ("=3", "wanted section.name=value"),
        ("optimizer..lr=3", "wanted section.name=value"),
        ('optimizer={"type"', "not JSON"),
        ("name.first=3", "no such section"),
        ("corpus.sources.7.weight=3", "corpus.sources"),
        ("training.api_key=hunter2", "secrets are read from the environment"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, wanted: str) -> None:
    text = message(write_json(tmp_path, "run.json", RECIPE), override)
    assert wanted in text and "hunter2" not in text


def test_an_override_can_mend_a_wrong_value_of_the_file(tmp_path: Path) -> None:
    path = write_json(tmp_path, "run.json", json.dumps(RECIPE).replace("0.002", "NaN"))
    assert load_run_config(path, ["optimizer.lr=0.1"]).optimizer.lr == 0.1


def test_paths_of_the_file_start_at_its_folder_and_those_of_overrides_at_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = write_json(tmp_path / "recipes", "run.json", changed(RECIPE, "corpus", SHARDS))
    run = load_run_config(path, ["init_from=weights", "corpus.sources.1.path=c"])
    assert [source.path for source in run.corpus.sources] == [  # type: ignore[union-attr]
        str(tmp_path / "data/a"),
        str(tmp_path / "elsewhere/c"),
    ]
    assert run.corpus.tokenizer == str(tmp_path / "recipes/tok")  # type: ignore[union-attr]
    assert run.init_from == str(tmp_path / "elsewhere/weights")


def test_a_recipe_is_frozen() -> None:
    run = RunConfig.model_validate_json(json.dumps(RECIPE))
    with pytest.raises(ValueError, match="frozen"):
        run.seed = 3  # type: ignore[misc]
