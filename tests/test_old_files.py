"""What version 0.1.0 has written is opened, exported, continued and reported as it was: `old_files.py` made it."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_verbs import run_verb
from old_files import ARCHIVE, MIDDLE, RECIPE, RUNS, STEPS, overrides
from safetensors.torch import load_file

from bert_ds.configuration.task.task_config import load_task
from bert_ds.corpus.shards.shard_folder import open_shards
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.tuning.task_folder import read_task_folder
from bert_ds.reporting.run_log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ("lr", "grad_norm", "num_tokens")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files, unpacked, with a recipe and DeepSpeed files beside them."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    for _, stage, _ in RUNS.values():
        content = json.loads((ROOT / f"ds_configs/zero{stage}.json").read_text())
        (folder / f"zero{stage}.json").write_text(json.dumps({**content, "train_micro_batch_size_per_gpu": 2}))
    return folder


def rows(run_dir: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The newest row of each step, figures alone."""
    found = {}
    for row in read_metrics(run_dir / "metrics.jsonl"):
        if row["kind"] in ("train", "evaluation"):
            kept = {name: value for name, value in row.items() if name in FIGURES or name.startswith(("loss", "mlm"))}
            found[row["kind"], row["step"]] = {name: value for name, value in kept.items() if value is not None}
    return found


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_of_every_stage_is_exported_to_the_bit_and_continued(name: str, old: Path) -> None:
    ranks, stage, settings = RUNS[name]
    run_dir = old / "runs" / name
    wanted, weights = rows(run_dir), load_file(run_dir / "hf/model.safetensors")
    exported = run_verb(ROOT / "bert_ds/export_hf.py", "--run_dir", run_dir, "--output", old / f"{name}-hf")
    assert exported.returncode == 0, exported.stderr
    again = load_file(old / f"{name}-hf/model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in weights.items())
    files = ("--run", old / "recipe.json", "--deepspeed_config", old / f"zero{stage}.json", "--run_dir", run_dir)
    script = ROOT / "bert_ds/pretrain.py"
    done = run_verb(script, *files, "--resume", "must", *overrides(settings), world_size=ranks)
    assert done.returncode == 0, done.stderr
    attempts = {
        (row["step"], row["attempt"]) for row in read_metrics(run_dir / "metrics.jsonl") if row["kind"] == "train"
    }
    assert {(MIDDLE, 1), (MIDDLE + 1, 2), (STEPS, 2)} <= attempts
    found = rows(run_dir)
    assert found.keys() == wanted.keys()
    for place, row in wanted.items():  # another processor may round otherwise
        assert found[place] == pytest.approx(row, rel=1e-4 if ranks == 1 and stage == 0 else 2e-2), place


def test_shards_are_opened_and_verified(old: Path) -> None:
    manifest = json.loads((old / "shards/manifest.json").read_text())
    split = open_shards(old / "shards", "train")
    assert split.num_tokens == manifest["splits"]["train"]["num_tokens"] > 1000


def test_a_fine_tuned_folder_predicts_what_it_predicted(old: Path, tmp_path: Path) -> None:
    task = load_task(old / "task/task_config.json")
    model, labels = read_task_folder(old / "task/hf", KINDS[task.kind], kernels="torch")
    assert labels == {"label": ("0", "1")}
    assert model.config.hidden_size == RECIPE["model"]["hidden_size"]
    words = ("--model", old / "task/hf", "--task", old / "task/task_config.json", "--output", tmp_path / "scored")
    scored = run_verb(ROOT / "bert_ds/score.py", *words)
    assert scored.returncode == 0, scored.stderr
    before = (old / "task/predictions/validation/predictions.tsv").read_text()
    assert (tmp_path / "scored/predictions/validation/predictions.tsv").read_text() == before


def test_a_run_is_reported_and_listed(old: Path, tmp_path: Path) -> None:
    shutil.copytree(old / "runs/stage0", tmp_path / "runs/stage0")
    report = run_verb(ROOT / "bert_ds/report.py", "--run_dir", tmp_path / "runs/stage0")
    assert report.returncode == 0 and "[MASK]" in report.stdout, report.stderr
    listed = run_verb(ROOT / "bert_ds/runs.py", tmp_path / "runs")
    assert listed.returncode == 0 and "stage0" in listed.stdout, listed.stderr
