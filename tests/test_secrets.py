"""Secrets planted in the environment, on the command line and in both files: no output of a run holds one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from corpus_fixtures import random_documents, write_shards
from forked_verbs import run_verb

ROOT = Path(__file__).resolve().parents[1]
CANARIES = {
    "HF_TOKEN": "hf_canaryAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
    "WANDB_API_KEY": "canaryBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB",
    "COMET_API_KEY": "canaryCCCCCCCCCCCCCCCCCCC",
    "AWS_SECRET_ACCESS_KEY": "canaryDDDDDDDDDDDDDDDDDDDDDDDDDD",
    "SLURM_JOB_COMMENT": "https://me:canaryEEEEEEEE@git.example/repository",
    "MY_DATABASE_PASSWORD": "canaryFFFFFFFFFFFF",
}
RECIPE = {
    "name": "secret",
    "model": {
        "vocab_size": 1000,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    },
    "corpus": {"type": "shards", "sources": [{"path": "shards"}], "tokenizer": "shards/tokenizer"},
    "sequences": {"max_seq_length": 32},
    "optimizer": {"type": "adamw", "lr": 1e-3},
    "schedule": {"type": "linear", "warmup_steps": 1},
    "training": {"total_steps": 2, "train_batch_size": 8, "log_every_steps": 1, "num_workers": 0},
    "evaluation": {"num_examples": 8, "batch_size": 8},
}
SPREAD = {"zero_optimization": {"stage": 1}, "csv_monitor": {"enabled": True}, "dump_state": True, "steps_per_print": 1}


def start(*command: object) -> subprocess.CompletedProcess[str]:
    if command[0] != "-m":
        return run_verb(ROOT / str(command[0]), *command[1:], env=CANARIES)
    environment = {**os.environ, **CANARIES, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def leaks(folder: Path, *texts: str) -> list[str]:
    """Where a canary is to be found: in a text, or in a file below a folder."""
    found = [f"text {number}" for number, text in enumerate(texts) if "canary" in text]
    found += [str(path) for path in folder.rglob("*") if "canary" in path.name]
    return found + [str(path) for path in folder.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]


def test_a_whole_run_through_the_launcher_and_its_export_hold_no_secret(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", random_documents(60), random_documents(20, seed=1))
    (tmp_path / "run.json").write_text(json.dumps(RECIPE))
    (tmp_path / "ds.json").write_text(json.dumps(SPREAD))
    run_dir = tmp_path / "runs/a"
    options = ["--run", tmp_path / "run.json", "--deepspeed_config", tmp_path / "ds.json", "--run_dir", run_dir]
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", 1, "--master_port", 29871]
    trained = start(*launcher, "bert_ds/pretrain.py", *options)
    assert trained.returncode == 0, trained.stderr
    exported = start("bert_ds/export_hf.py", "--run_dir", run_dir)
    assert exported.returncode == 0, exported.stderr
    reported = start("bert_ds/report.py", "--run_dir", run_dir)
    refused = start("bert_ds/pretrain.py", *options)
    assert refused.returncode != 0 and "holds 1 checkpoints" in refused.stderr
    said = [text for done in (trained, exported, reported, refused) for text in (done.stdout, done.stderr)]
    assert leaks(tmp_path, *said) == []


@pytest.mark.parametrize(
    ("recipe", "deepspeed", "arguments"),
    [
        ({"api_key": "canary"}, {}, []),
        ({"model": {**RECIPE["model"], "hf_token": "canary"}}, {}, []),
        ({"init_from": "https://me:canary@example.org/bert"}, {}, []),
        ({}, {"comet": {"enabled": True, "api_key": "canary"}}, []),
        ({}, {"wandb": {"enabled": True, "api_key": "canary"}}, []),
        ({}, {"wandb": {"enabled": True, "team": "https://me:canary@wandb.example"}}, []),
        ({}, {}, ["--set", "training.password=canary"]),
        ({}, {}, ["--set", "init_from=https://me:canary@example.org/bert"]),
        ({}, {}, ["--api_key=canary"]),
    ],
    ids=range(9),
)
def test_a_secret_in_a_file_or_on_the_command_line_is_refused_unseen(
    tmp_path: Path, recipe: dict, deepspeed: dict, arguments: list[str]
) -> None:
    (tmp_path / "run.json").write_text(json.dumps(RECIPE | recipe))
    (tmp_path / "ds.json").write_text(json.dumps(deepspeed))
    files = ["--run", tmp_path / "run.json", "--deepspeed_config", tmp_path / "ds.json"]
    refused = start("bert_ds/check_run.py", *files, *arguments)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "canary" not in refused.stdout + refused.stderr
