"""What remains of a fine-tuning, where the disk or a person is in its way."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from downstream_cases import CONFIG, PIECES, review_task

from bert_ds.basics.ranks import DataError, Ranks
from bert_ds.configuration.task.task_config import load_task
from bert_ds.corpus.tokenizer.wordpiece import TextRules, WordPieceTokenizer
from bert_ds.downstream.kinds.kind import Prediction
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.tuning.outcome import Measurement, Outcome, _export, write_side, write_summary
from bert_ds.downstream.tuning.task_folder import make_task_model
from bert_ds.downstream.tuning.task_rows import read_task
from bert_ds.folders.output_folders import open_run_folder
from bert_ds.reporting.run_log import RunLog

TOKENIZER = WordPieceTokenizer(PIECES, TextRules())


@contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    """A disk that is full after so many bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("outcome")
    task = load_task(review_task(folder, rows=24))
    open_run_folder(folder / "run")
    TOKENIZER.save(folder / "run/tokenizer")
    rows = read_task(task, TOKENIZER, say=lambda text: None)
    return Outcome(task, rows, TOKENIZER, folder / "run", CONFIG)


def test_a_disk_that_is_full_during_the_export_is_a_sentence_and_keeps_the_older_export(outcome: Outcome) -> None:
    log: Any = RunLog(outcome.run_dir, Ranks(0, 0, 1), total_steps=1)
    model = make_task_model(KINDS["classification"], CONFIG, outcome.rows.labels, kernels="torch")
    hf = outcome.run_dir / "hf"
    text = f"{hf} could not be made: model.safetensors: .*File too large.*; {{}}. The checkpoint of step 4 is kept: "
    text += "--resume auto exports it"
    with no_file_above(20_000), pytest.raises(DataError, match=text.format("nothing of it was left")):
        _export(outcome, model, 4, {"accuracy": 0.5}, log=log)
    assert not hf.exists()
    _export(outcome, model, 4, {"accuracy": 0.5}, log=log)
    before = {path.name: path.read_bytes() for path in hf.iterdir()}
    with no_file_above(20_000), pytest.raises(DataError, match=text.format("what was there is as it was")):
        _export(outcome, model, 4, {"accuracy": 0.75}, log=log)
    log.close()
    assert {path.name: path.read_bytes() for path in hf.iterdir()} == before
    assert not list(outcome.run_dir.glob(".hf*"))


def test_predictions_and_figures_keep_what_a_person_put_in_their_place(outcome: Outcome) -> None:
    run_dir, side = outcome.run_dir, outcome.rows.validation
    figures = ("classes.txt", "confusion.tsv", "confusion.png")
    mine = ("predictions/validation/predictions.tsv", *(f"figures/validation_{name}" for name in figures))
    for name in mine:
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text("mine")
    found = Measurement({}, [Prediction("good", {}) for _ in side.examples])
    for _ in range(2):
        write_side(run_dir, "validation", outcome.task, side, found)
    kept = {str(path.relative_to(run_dir)): path.read_text() for path in run_dir.rglob("*.kept-*")}
    assert kept == {f"{name}.kept-1": "mine" for name in mine}


def test_a_summary_is_over_all_seeds_and_both_sides(tmp_path: Path) -> None:
    for seed, score in ((3, 0.5), (1, 1.0), (2, 0.75)):
        (tmp_path / str(seed)).mkdir()
        sides = {"validation": {"f1": score}, "test": {"f1": score / 2}, "test_others": {"f1": score / 4}}
        results = {"task": "t", "metric": "f1", "seed": seed, **sides, "trivial": {"f1": 0.1}}
        if seed != 2:  # of an earlier version, or without rows
            results |= {"test_overlapping": {"f1": 1.0}}
            sides["test"]["loss"] = 2.0
        (tmp_path / f"{seed}/results.json").write_text(json.dumps(results))
    write_summary(tmp_path, [tmp_path / str(seed) for seed in (3, 1, 2)])
    summary = json.loads((tmp_path / "results.json").read_text())
    assert summary["seeds"] == [3, 1, 2]
    assert summary["validation"]["f1"] == {"mean": 0.75, "deviation": 0.25, "values": [0.5, 1.0, 0.75]}
    assert (summary["test"]["f1"]["mean"], summary["test_others"]["f1"]["mean"]) == (0.375, 0.1875)
    assert "test_overlapping" not in summary and set(summary["test"]) == {"f1"} and summary["trivial"] == {"f1": 0.1}
