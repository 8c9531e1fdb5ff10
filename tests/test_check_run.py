"""The command that checks a run before anything is taken, as a user starts it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path

import pytest
from config_cases import DEEPSPEED, RECIPE, changed, write_json
from downstream_cases import review_task
from forked_verbs import run_verb

import bert_ds.check_run
from bert_ds.configuration.deepspeed_file.ds_config import load_pair
from bert_ds.configuration.run_plan import make_plan

ROOT = Path(__file__).resolve().parents[1]


def check_run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    with chdir(cwd):
        return run_verb(ROOT / "bert_ds/check_run.py", *arguments, timeout_s=60)


def test_the_default_run_is_valid_and_its_numbers_are_printed(tmp_path: Path) -> None:
    found = check_run("--deepspeed_config", str(ROOT / "ds_configs/zero2.json"), "--world_size", "2", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    names = [line.split("  ")[0] for line in found.stdout.splitlines()]
    wanted = ["run", "global batch", "tokens per step", "masks", "steps", "examples", "parameters", "FLOPs per token"]
    assert names[:8] == wanted
    assert "<- this run" in next(line for line in found.stdout.splitlines() if line.startswith("memory at stage 2"))


def test_every_error_of_both_files_is_printed_with_exit_code_2(tmp_path: Path) -> None:
    run = write_json(tmp_path, "run.json", changed(RECIPE, "training.total_step", 3))
    ds = write_json(tmp_path, "ds.json", changed(DEEPSPEED, "bf16.enable", True))
    found = check_run("--run", str(run), "--deepspeed-config", str(ds), "--set", "optimizer.lr=fast")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.splitlines() == [
        f"check_run.py: error: {ds}: bf16.enable: unknown to DeepSpeed 0.19.8, which would ignore it; did you mean "
        '"enabled"?',
        '--set: optimizer.lr: found "fast", wanted a number',
        f'{run}: training.total_step: unknown setting; did you mean "total_steps"?',
    ]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--world_size", "0"], "--world_size: found 0, wanted a positive number"),
        (["--world_size", "1.5"], "--world_size: found 1.5, wanted a positive number"),
        (["--world_size", "nan"], "--world_size: found nan, wanted a positive number"),
        (["--run", "missing.json"], "missing.json: No such file or directory"),
        (["--rum", "missing.json"], "did you mean --run?"),
        (["--task", "sst2", "--run", "missing.json"], "--run and --task exclude each other"),
        (["--task", "sst2"], "--task wants --model, the folder that is fine-tuned"),
        (["--model", "."], "--model and --data belong to a --task"),
    ],
)
def test_a_wrong_argument_is_one_line_with_exit_code_2(arguments: list[str], wanted: str) -> None:
    found = check_run("--deepspeed_config", "ds_configs/zero2.json", *arguments)
    assert found.returncode == 2 and wanted in found.stderr and len(found.stderr.splitlines()) == 1


def test_the_memory_of_a_gpu_is_in_units_of_a_billion_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, ds = write_json(tmp_path, "run.json", RECIPE), write_json(tmp_path, "ds.json", DEEPSPEED)
    needed = make_plan(*load_pair(run, ds), 1).memory().device / 1e9
    for gigabytes, warns in ((0.97 * needed, True), (1.03 * needed, False)):
        words = ("--run", run, "--deepspeed_config", ds, "--gpu_memory_gb", gigabytes)
        monkeypatch.setattr(sys, "argv", list(map(str, ("check_run.py", *words))))
        assert bert_ds.check_run.main() == 0
        assert ("a rank needs about" in capsys.readouterr().err) == warns


def test_warnings_do_not_change_the_exit_code() -> None:
    recipe = "ds_configs/recipes/bert_base_zh.json"
    found = check_run("--run", recipe, "--deepspeed_config", "ds_configs/zero3.json", "--gpu_memory_gb", "1")
    assert found.returncode == 0
    assert "warning: corpus.tokenizer:" in found.stderr and "warning: a rank needs about" in found.stderr


def test_the_memory_of_a_gpu_settles_an_open_micro_batch() -> None:
    words = ("--run", "ds_configs/recipes/bert_base_phase1.json", "--deepspeed_config", "ds_configs/zero1.json")
    sizes = [
        next(line for line in check_run(*words, *memory).stdout.splitlines() if line.startswith("global batch"))
        for memory in ((), ("--gpu_memory_gb", "80"), ("--gpu_memory_gb", "16"))
    ]
    found = [int(line.split(" = ")[1].split()[0]) for line in sizes]
    assert found[0] == 128 and found[2] < found[1] == 512


@pytest.mark.parametrize(("memory", "precision"), [((), "planned for fp32"), (("--gpu_memory_gb", "80"), "bf16")])
def test_with_the_memory_of_a_gpu_the_run_is_planned_as_a_gpu_trains_it(memory: Sequence[str], precision: str) -> None:
    found = check_run("--deepspeed_config", "ds_configs/zero2.json", *memory)
    assert precision in found.stdout


def test_files_given_as_each_other_are_one_sentence() -> None:
    recipe, spread = "ds_configs/recipes/bert_base_phase1.json", "ds_configs/zero2.json"
    found = check_run("--run", spread, "--deepspeed_config", recipe)
    wanted = f"--run {spread} is a DeepSpeed file and --deepspeed_config {recipe} is a recipe: swap them"
    assert (found.returncode, found.stderr) == (2, f"check_run.py: error: {wanted}\n")


def test_a_file_from_an_old_tutorial_is_told_everything_at_once(tmp_path: Path) -> None:
    tutorial = {
        "optimizer": {"type": "OneBitLamb", "params": {"lr": 0.011, "freeze_step": 23000}},
        "fp16": {"enabled": True},
        "sparse_attention": {"mode": "fixed"},
        "elasticity": {"enabled": True},
        "gradient_acumulation_steps": 4,
    }
    ds = write_json(tmp_path, "ds.json", tutorial)
    found = check_run("--run", str(write_json(tmp_path, "run.json", RECIPE)), "--deepspeed_config", str(ds))
    named = [line.removeprefix("check_run.py: error: ").split(": ")[1] for line in found.stderr.splitlines()]
    assert (found.returncode, named) == (
        2,
        [
            *("sparse_attention", "elasticity", "gradient_acumulation_steps", "fp16.enabled", "optimizer.type"),
        ],
    )


SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
"""Of the tiny models below; the weights themselves are not looked at."""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with the config.json of a model, and a task of 64 rows beside its data."""
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "model", "config.json", {**SHAPE, "vocab_size": 100, "max_position_embeddings": 48})
    review_task(tmp_path)
    return tmp_path


def check_task(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = ("--task", "task.json", "--model", "model", "--deepspeed_config", str(ROOT / "ds_configs/zero1.json"))
    return check_run(*words, *arguments, cwd=folder)


def test_a_task_is_checked_as_a_recipe_is_and_its_numbers_are_printed(tiny: Path) -> None:
    settings = ("training.train_batch_size=8", "training.epochs=2", "max_seq_length=24", "training.precision=fp32")
    overrides = [word for setting in settings for word in ("--set", setting)]
    found = check_task(tiny, "--world_size", "2", "--gpu_memory_gb", "0.0001", *overrides)
    assert found.returncode == 0, found.stderr
    rows = dict(line.split("  ", 1) for line in found.stdout.splitlines())
    rows = {name: text.strip() for name, text in rows.items()}
    assert rows["run"] == "tiny: classification, adamw, fp32, ZeRO stage 1"
    assert rows["global batch"] == "8 = 4 micro-batch x 1 accumulation x 2 ranks"
    assert rows["tokens per step"] == "at most 192 (8 x 24)"
    assert (rows["training rows"], rows["steps"]) == (
        "about 48",  # a quarter of the 64 is held out
        "about 12 (2 epochs), the first 1 of them warm-up",
    )
    assert "<- this run" in rows["memory at stage 1"]
    # Twice 12 h^2 and what belongs to them, embeddings of 128 padded rows and 48 places, and a head.
    weights = int(rows["parameters"].split()[1].replace(",", ""))
    assert 2 * (4 * 32**2 + 2 * 32 * 64) + (128 + 48) * 32 < weights < 30_000
    assert "warning: a rank needs about" in found.stderr


def test_the_estimate_of_a_task_counts_no_scores_over_the_vocabulary(tiny: Path) -> None:
    large = {**SHAPE, "vocab_size": 1_000_000, "max_position_embeddings": 48}
    small = check_task(tiny).stdout.splitlines()
    write_json(tiny / "model", "config.json", large)
    activations = [
        next(line for line in lines if line.startswith("memory at stage 1")).split("activations")[1]
        for lines in (small, check_task(tiny).stdout.splitlines())
    ]
    assert activations[0].split("<-")[0] == activations[1].split("<-")[0]


def test_every_problem_of_a_task_with_its_model_is_one_line(tiny: Path) -> None:
    settings = ("max_seq_length=64", "freeze.layers=3", "training.train_batch_size=7", "training.total_steps=3")
    overrides = [
        word
        for setting in (*settings, "schedule.warmup_fraction=null", "schedule.warmup_steps=4")
        for word in ("--set", setting)
    ]
    found = check_task(tiny, "--world_size", "2", *overrides)
    assert (found.returncode, found.stdout) == (2, "")
    assert [line.removeprefix("check_run.py: error: ").split(": ")[1] for line in found.stderr.splitlines()] == [
        *("schedule.warmup_steps", "max_seq_length", "freeze.layers", "train_batch_size")
    ]


def test_a_number_of_steps_that_is_given_needs_no_rows_and_one_that_is_not_known_refuses_nothing(tiny: Path) -> None:
    given = check_task(tiny, "--set", "training.total_steps=40")
    assert "steps              40, the first 4 of them warm-up" in given.stdout, given.stderr
    few = check_task(tiny, "--set", "schedule.warmup_fraction=null", "--set", "schedule.warmup_steps=400")
    assert few.returncode == 0, "how many steps there are is decided at the launch"


def test_a_model_that_is_no_bert_and_data_that_cannot_be_read_are_named(tiny: Path) -> None:
    (tiny / "train.tsv").write_text("text\tlabel\nno label\n")
    found = check_task(tiny)
    assert (found.returncode, "train.tsv:2" in found.stderr) == (3, True)
    review_task(tiny)
    write_json(tiny / "model", "config.json", {"hidden_size": "large"})
    found = check_task(tiny)
    assert found.returncode == 2
    assert found.stderr == "check_run.py: error: --model model: config.json does not hold the sizes of an encoder\n"


def test_the_speed_on_a_card_is_predicted_and_follows_the_bandwidths_that_are_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = str(ROOT / "ds_configs/recipes/bert_base_phase1.json")
    command = ["check_run", "--run", recipe, "--deepspeed_config", str(ROOT / "ds_configs/zero1.json"), "--gpu", "H100"]
    found = []
    for words in ([], ["--network_gb_s", "0.5"], ["--node_gb_s", "0.5"]):
        monkeypatch.setattr(sys, "argv", [*command, *words])
        assert bert_ds.check_run.main() == 0
        lines = capsys.readouterr().out.splitlines()
        found.append({line.split("  ")[0]: line for line in lines if line.startswith("predicted, ")})
    usual, network, node = found
    assert list(usual) == [f"predicted, {number} H100" for number in (1, 8, 64, 512)]
    assert "bound by matrix products" in usual["predicted, 64 H100"] and "days in all" in usual["predicted, 1 H100"]
    assert "bound by messages between ranks" in network["predicted, 64 H100"]
    assert network["predicted, 8 H100"] == usual["predicted, 8 H100"] != node["predicted, 8 H100"]
    assert node["predicted, 64 H100"] == usual["predicted, 64 H100"]
