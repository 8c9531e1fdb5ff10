"""The shipped recipes for a CPU train: some steps of each, on less text, the student's behind its teacher's."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Mapping
from pathlib import Path

import pytest
from forked_verbs import run_verb

from bert_ds.encoder.pretrained import load_masked_lm, load_pretrained
from bert_ds.reporting.run_log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
LESS = {
    "corpus.max_bytes": 1_000_000,
    "training.total_steps": 12,
    "training.train_batch_size": 8,
    "training.log_every_steps": 1,
    "schedule.warmup_steps": 1,
    "evaluation.num_examples": 16,
}


def trained(folder: Path, name: str, others: Mapping[str, object] = {}) -> Path:
    """Train a shipped recipe, export it, and return its run folder."""
    words = [f"--set={path}={value}" for path, value in {**LESS, **others}.items()]
    files = ("--run", ROOT / f"ds_configs/recipes/{name}.json", "--deepspeed_config", ROOT / "ds_configs/zero2.json")
    for command in (
        ("pretrain.py", *files, "--run_dir", folder / name, *words),
        ("export_hf.py", "--run_dir", folder / name),
    ):
        done = run_verb(ROOT / "bert_ds" / command[0], *command[1:])
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / name


def losses(run_dir: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in read_metrics(run_dir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the default recipe is trained, as `make pretrain` does; recipes of its text share it."""
    folder = tmp_path_factory.mktemp("small")
    trained(folder, "embedded_default", {"schedule.warmup_fraction": "null"})
    return folder


def test_the_small_distilbert_learns_from_the_default_run(folder: Path) -> None:
    teacher = folder / "embedded_default/hf"
    others = {"schedule.warmup_fraction": "null", "optimizer.lr": 5e-4, "distillation.teacher": teacher}
    run_dir = trained(folder, "distilbert_small", others)
    model = load_masked_lm(run_dir / "hf")
    assert (model.config.family, model.config.num_hidden_layers) == ("distilbert", 1)
    soft = losses(run_dir, "loss_soft")
    assert soft[-1] < 0.7 * soft[0] < 0.7


def test_the_small_albert_learns_words_and_the_order_of_sentences(folder: Path) -> None:
    run_dir = trained(folder, "albert_small")
    model = load_masked_lm(run_dir / "hf")
    assert model.config.family == "albert" and model.has_pair_head
    assert losses(run_dir)[-1] < losses(run_dir)[0]
    assert max(losses(run_dir, "loss_pair")) > 0.1


def test_the_small_electra_learns_in_both_halves(folder: Path) -> None:
    run_dir = trained(folder, "electra_tiny")
    assert load_masked_lm(run_dir / "hf/generator").config.hidden_size == 64
    assert load_pretrained(run_dir / "hf").config.hidden_size == 128
    for name in ("loss_mlm", "loss_replaced"):
        found = losses(run_dir, name)
        assert found[-1] < found[0]


@pytest.mark.parametrize("family", ["modernbert", "roberta"])
def test_a_small_model_of_a_family_learns(family: str, folder: Path) -> None:
    run_dir = trained(folder, f"{family}_small")
    assert load_masked_lm(run_dir / "hf").config.family == family
    assert losses(run_dir)[-1] < losses(run_dir)[0]
