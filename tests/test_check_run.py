"""The command that checks a run before anything is taken, as a user starts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from config_cases import DEEPSPEED, RECIPE, changed, write_json

ROOT = Path(__file__).resolve().parents[1]


def check_run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bert_ds/check_run.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def test_the_default_run_is_valid_and_its_numbers_are_printed(tmp_path: Path) -> None:
    found = check_run("--deepspeed_config", str(ROOT / "ds_configs/zero2.json"), "--world_size", "2", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    names = [line.split("  ")[0] for line in found.stdout.splitlines()]
    assert names[:7] == ["run", "global batch", "tokens per step", "steps", "examples", "parameters", "FLOPs per token"]
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
    ],
)
def test_a_wrong_argument_is_one_line_with_exit_code_2(arguments: list[str], wanted: str) -> None:
    found = check_run("--deepspeed_config", "ds_configs/zero2.json", *arguments)
    assert found.returncode == 2 and wanted in found.stderr and len(found.stderr.splitlines()) == 1


def test_warnings_do_not_change_the_exit_code() -> None:
    recipe = "ds_configs/recipes/bert_base_zh.json"
    found = check_run("--run", recipe, "--deepspeed_config", "ds_configs/zero3.json", "--gpu_memory_gb", "1")
    assert found.returncode == 0
    assert "warning: corpus.tokenizer:" in found.stderr and "warning: a rank needs about" in found.stderr


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
