"""What finetune.py and score.py hand to their parts, in a task whose rows are cut into several sequences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from downstream_cases import write_lines, write_task
from forked_verbs import run_verb

from bert_ds.configuration.task.task_config import load_task
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.downstream.rows.task_batches import features_fingerprint
from bert_ds.downstream.tuning.task_rows import read_task
from bert_ds.training.checkpoints.checkpoint_folder import read_manifest

ROOT = Path(__file__).resolve().parents[1]
NOUNS, ADJECTIVES = ("film", "book", "story", "play"), ("great", "dull", "lovely", "boring")
LENGTH = 8


def rows(number: int, *, wrong: int = 0) -> list[str]:
    """Rows of ten words, twice as many as a sequence holds; of the last `wrong` every tag is the other one."""
    made = []
    for row in range(number):
        words = [(NOUNS if (row + place) % 3 else ADJECTIVES)[(row * place) % 4] for place in range(10)]
        tags = ["N" if (word in NOUNS) == (row < number - wrong) else "A" for word in words]
        made.append(json.dumps({"words": words, "tags": tags, "id": row}))
    return made


@pytest.fixture(scope="module")
def finished(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The task file and the folder of its run."""
    folder = tmp_path_factory.mktemp("wired")
    sides = {"train": rows(8), "validation": rows(4), "test": rows(4, wrong=3)}
    for name, lines in sides.items():
        write_lines(folder / f"{name}.jsonl", lines)
    data: dict[str, Any] = {name: [{"path": f"{name}.jsonl", "format": "jsonl"}] for name in sides}
    data |= {"fields": {"words": "words", "tags": "tags", "id": "id"}, "labels": ["N", "A"], "drop_overlap": False}
    content: dict[str, Any] = {"kind": "token_classification", "data": data, "max_seq_length": LENGTH, "seed": 3}
    content |= {"optimizer": {"type": "adamw", "lr": 5e-3}, "evaluation": {"every_epochs": 0.5}}
    content |= {"training": {"epochs": 2, "train_batch_size": 4, "precision": "fp32"}}
    task = write_task(folder, content)
    files = ("--task", task, "--model", tiny_export, "--deepspeed_config", ROOT / "ds_configs/zero0.json")
    done = run_verb(ROOT / "bert_ds/finetune.py", *files, "--run_dir", folder / "run")
    assert done.returncode == 0, done.stderr
    return task, folder / "run"


def test_epochs_are_counted_in_sequences_and_not_in_rows(finished: tuple[Path, Path]) -> None:
    measured = json.loads((finished[1] / "evaluations.json").read_text())
    assert [row["step"] for row in measured] == [2, 4, 6, 8]


def test_a_checkpoint_knows_the_sequences_the_seed_the_batch_and_the_tokenizer(
    finished: tuple[Path, Path], tiny_export: Path
) -> None:
    task, tokenizer = load_task(finished[0]), load_tokenizer(tiny_export)
    features = read_task(task, tokenizer, say=lambda text: None).train.features
    wanted = features_fingerprint(features, settings=f"3 4 {tokenizer.fingerprint}")
    (newest, *_) = sorted((finished[1] / "checkpoints").glob("global_step*"))
    facts = read_manifest(newest)["facts"]
    assert (facts["data"], facts["family"], facts["model.norm_position"]) == (wanted, "bert", "post")


def test_the_folder_says_its_length_and_the_figures_of_the_validation_rows(finished: tuple[Path, Path]) -> None:
    results = json.loads((finished[1] / "results.json").read_text())
    assert results["validation"]["accuracy"] > results["test"]["accuracy"]
    assert json.loads((finished[1] / "hf/tokenizer_config.json").read_text())["model_max_length"] == LENGTH
    card = (finished[1] / "hf/README.md").read_text(encoding="utf-8")
    assert f"{results['validation']['accuracy']:.4f}" in card
    assert f"validation accuracy | {results['test']['accuracy']:.4f}" not in card


def test_a_side_is_scored_by_its_name_with_the_labels_of_the_folder(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    content = json.loads(finished[0].read_text())
    del content["data"]["labels"]  # they would stand in the other order
    task = finished[0].with_name("without_labels.json")
    task.write_text(json.dumps(content), encoding="utf-8")
    places = ("--model", finished[1] / "hf", "--output", tmp_path / "scores")
    done = run_verb(ROOT / "bert_ds/score.py", "--task", task, "--side", "test", *places)
    assert done.returncode == 0, done.stderr
    results = json.loads((finished[1] / "results.json").read_text())
    scores = json.loads((tmp_path / "scores/results.json").read_text())
    assert scores["test"] == pytest.approx(results["test"]) and scores["rows"] == results["rows"]
    assert [path.name for path in (tmp_path / "scores/predictions").iterdir()] == ["test"]
