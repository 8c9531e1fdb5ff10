"""Fine-tuning as a user starts it: train, kill, resume, several seeds, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from downstream_cases import review_rows, review_task, write_lines
from forked_verbs import run_verb
from safetensors.torch import load_file

from bert_ds.folders.output_folders import MARKER, open_run_folder
from bert_ds.reporting.run_log import read_metrics
from bert_ds.training.checkpoints.fp32_weights import load_fp32_state_dict

ROOT = Path(__file__).resolve().parents[1]


def finetune(
    task: Path, model: Path, run_dir: Path, *extra: object, stage: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run finetune.py."""
    files = ["--task", task, "--model", model, "--run_dir", run_dir]
    deepspeed_config = ROOT / f"ds_configs/zero{stage}.json"
    return run_verb(ROOT / "bert_ds/finetune.py", *files, "--deepspeed_config", deepspeed_config, *extra)


@pytest.fixture(scope="module")
def finished(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The task and the run folder of a finished run of two seeds."""
    folder = tmp_path_factory.mktemp("finetune")
    rows = review_rows(62)
    sides = {"train": rows[:48], "validation": [*rows[48:], *rows[:2]]}
    for name, lines in sides.items():
        write_lines(folder / name, ["text\tlabel", *lines])
    data = {name: [{"path": name, "format": "tsv"}] for name in sides}
    data |= {"official": ["validation"], "fields": {"text": "text", "label": "label"}}
    training = {"epochs": 12, "train_batch_size": 8, "log_every_steps": 1}
    task = review_task(folder, data=data, training=training, checkpoints={"every_steps": 10})
    done = finetune(task, tiny_export, folder / "run", "--seeds", 1, 2, "--trivial")
    assert done.returncode == 0, done.stderr
    return task, folder / "run"


def test_a_small_task_is_learned_and_everything_about_it_is_written(finished: tuple[Path, Path]) -> None:
    run_dir = finished[1]
    results = json.loads((run_dir / "results.json").read_text())
    assert results["seeds"] == [1, 2]
    assert results["validation"]["accuracy"]["mean"] > 0.9
    assert len(results["validation"]["accuracy"]["values"]) == 2
    assert results["trivial"]["accuracy"] == 1.0
    assert results["rows_removed"] == {"train": 0, "validation": 0}
    counts = {"train": 48, "validation": 16, "validation_overlapping": 2, "validation_others": 14}
    assert results["rows"] == counts
    parts = [results[name]["accuracy"]["values"] for name in counts if name != "train"]
    assert [whole * 16 for whole in parts[0]] == [seen * 2 + new * 14 for seen, new in zip(*parts[1:], strict=True)]
    written = {str(path.relative_to(run_dir / "seed_1")) for path in (run_dir / "seed_1").rglob("*") if path.is_file()}
    assert written >= {
        *("DONE", "task_config.json", "ds_config.json", "environment.json", "metrics.jsonl", "results.json"),
        *("evaluations.json", "predictions/validation/predictions.tsv", "hf/model.safetensors", "hf/tokenizer.json"),
        *("figures/validation_classes.txt", "figures/validation_confusion.tsv", "figures/validation_confusion.png"),
    }


def test_seeds_share_a_precision_that_is_decided_once(finished: tuple[Path, Path]) -> None:
    logs = [(finished[1] / f"seed_{seed}/logs/rank_0.log").read_text() for seed in (1, 2)]
    lines = [re.search(r"training.precision auto: (\w+); .*", log) for log in logs]
    assert lines[0] is not None and lines[1] is not None and lines[0][0] == lines[1][0]
    for seed in (1, 2):
        written = json.loads((finished[1] / f"seed_{seed}/task_config.json").read_text())
        assert written["training"]["precision"] == lines[0][1]


def test_what_is_measured_and_exported_is_the_best_step_on_the_validation_rows_and_not_the_last(
    finished: tuple[Path, Path],
) -> None:
    for folder in (finished[1] / "seed_1", finished[1] / "seed_2"):
        measured = {row["step"]: row["value"] for row in json.loads((folder / "evaluations.json").read_text())}
        best = min(step for step, value in measured.items() if value == max(measured.values()))
        results = json.loads((folder / "results.json").read_text())
        assert results["step"] == best < max(measured) == 72
        assert results["validation"]["accuracy"] == measured[best]
        saved = load_fp32_state_dict(folder / f"checkpoints/global_step{best}")["bert.embeddings.word_weight"]
        exported = load_file(folder / "hf/model.safetensors")["bert.embeddings.word_embeddings.weight"]
        assert torch.equal(exported, saved[: len(exported)])


def test_predictions_are_in_glues_format_and_give_the_accuracy(finished: tuple[Path, Path]) -> None:
    run_dir = finished[1] / "seed_1"
    header, *rows = (run_dir / "predictions/validation/predictions.tsv").read_text().splitlines()
    assert header == "index\tprediction"
    truth = ["good" if int(row.split("\t")[0]) % 2 else "bad" for row in rows]
    accuracy = sum(row.split("\t")[1] == label for row, label in zip(rows, truth, strict=True)) / len(rows)
    assert accuracy == json.loads((run_dir / "results.json").read_text())["validation"]["accuracy"]


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run_dir / "metrics.jsonl")]


def test_a_run_killed_before_its_last_checkpoint_repeats_its_losses_and_its_result(
    finished: tuple[Path, Path], tiny_export: Path, tmp_path: Path
) -> None:
    task, whole = finished[0], finished[1] / "seed_1"
    killed = tmp_path / "run"
    shutil.copytree(whole, killed)
    for name in ("DONE", "results.json"):
        (killed / name).unlink()
    shutil.rmtree(killed / "hf")
    shutil.rmtree(killed / "checkpoints/global_step72")
    again = finetune(task, tiny_export, killed, "--seed", 1, "--resume", "must", "--trivial")
    assert again.returncode == 0, again.stderr
    kept = json.loads((whole / "task_config.json").read_text())["training"]["precision"]
    assert f"training.precision auto: {kept}, as in {killed}" in again.stdout
    assert "resumed from" in again.stdout and "global_step70" in again.stdout
    assert losses(killed) == losses(whole)
    assert json.loads((killed / "results.json").read_text()) == json.loads((whole / "results.json").read_text())


def test_a_run_folder_that_is_in_use_is_refused(finished: tuple[Path, Path], tiny_export: Path) -> None:
    task, run_dir = finished
    refused = finetune(task, tiny_export, run_dir, "--seeds", 1)
    assert refused.returncode == 2
    assert "holds" in refused.stderr and "--resume auto continues it" in refused.stderr


def test_an_export_of_somebody_else_is_refused_before_the_training(tiny_export: Path, tmp_path: Path) -> None:
    open_run_folder(tmp_path / "run/seed_2")
    (tmp_path / "run/seed_2/hf").mkdir()
    (tmp_path / "run/seed_2/hf/mine").touch()
    refused = finetune(review_task(tmp_path), tiny_export, tmp_path / "run", "--seeds", 1, 2)
    assert refused.returncode == 2
    assert "seed_2/hf holds 'mine', which is not ours" in refused.stderr
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == [MARKER, "hf", "mine", "seed_2"]


def test_a_run_that_no_longer_improves_ends_early_with_its_best_step(tiny_export: Path, tmp_path: Path) -> None:
    training = {"epochs": 20, "train_batch_size": 8}
    task = review_task(
        tmp_path,
        rows=24,
        training=training,
        evaluation={"patience": 2},
        freeze={"encoder": True},
        layerwise_lr_decay=0.9,
    )
    done = finetune(task, tiny_export, tmp_path / "run", "--set", "optimizer.lr=1e-9", stage=3)
    assert done.returncode == 0, done.stderr
    assert "nothing more to gain: the run ends at step 9 of 45" in done.stdout
    assert json.loads((tmp_path / "run/DONE").read_text()) == {"step": 9, "best_step": 3}


def test_score_gives_the_figures_of_the_run_that_made_the_folder(finished: tuple[Path, Path], tmp_path: Path) -> None:
    task, run_dir = finished[0], finished[1] / "seed_1"
    places = ("--model", run_dir / "hf", "--output", tmp_path / "scores")
    done = run_verb(ROOT / "bert_ds/score.py", "--task", task, *places)
    assert done.returncode == 0, done.stderr
    found, wanted = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "scores", run_dir))
    assert found == {name: value for name, value in wanted.items() if name not in ("seed", "step", "trivial")}
    assert set(found) > {"rows", "rows_removed", "validation", "validation_overlapping", "validation_others"}
    name = "predictions/validation/predictions.tsv"
    assert (tmp_path / "scores" / name).read_text() == (run_dir / name).read_text()


def test_seeds_that_are_done_are_not_run_again(finished: tuple[Path, Path], tiny_export: Path) -> None:
    task, run_dir = finished
    before = (run_dir / "seed_1/metrics.jsonl").read_bytes(), (run_dir / "results.json").read_bytes()
    again = finetune(task, tiny_export, run_dir, "--seeds", 1, 2, "--resume", "auto", "--trivial")
    assert again.returncode == 0, again.stderr
    assert ((run_dir / "seed_1/metrics.jsonl").read_bytes(), (run_dir / "results.json").read_bytes()) == before
