"""Published sides are never changed, what overlaps is scored apart, and what is left out elsewhere is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from downstream_cases import PIECES, task_of, write_lines
from test_task_config import problems

from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.corpus.tokenizer.wordpiece import TextRules, WordPieceTokenizer
from bert_ds.downstream.kinds.kind import Prediction
from bert_ds.downstream.tuning.outcome import Measurement, part_figures, row_counts, write_summary
from bert_ds.downstream.tuning.task_rows import TaskRows, read_task

TRAIN = ["the film is great\tgood", "we saw paris\tgood", "saw it\tbad", "a dull book\tbad", "london\tbad"]
VALIDATION = ["The film is great\tgood", "paris\tbad", "we saw it in london\tgood", "a moving play\tgood"]
TEST = ["we saw paris and it\tgood", "a dull book\tgood"]


def rows_of(folder: Path, **data: Any) -> tuple[TaskConfig, TaskRows, list[str]]:
    """The task, its rows and what is said of them."""
    for name, lines in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        write_lines(folder / name, ["text\tlabel", *lines])
    files = {name: [{"path": name, "format": "tsv"}] for name in ("train", "validation", "test")}
    fields = {"text": "text", "label": "label"}
    task = task_of(folder, {"kind": "classification", "data": {**files, "fields": fields, **data}})
    said: list[str] = []
    return task, read_task(task, WordPieceTokenizer(PIECES, TextRules()), say=said.append), said


def texts(side: Any) -> list[str]:
    return [example.texts[0] for example in side.examples]


def test_without_an_official_side_both_are_thinned_out_and_counted(tmp_path: Path) -> None:
    _, rows, _ = rows_of(tmp_path)
    assert texts(rows.validation) == ["we saw it in london", "a moving play"]
    assert texts(rows.train) == ["the film is great", "we saw paris", "a dull book"]
    wanted = {"rows": {"train": 3, "validation": 2, "test": 2}, "rows_removed": {"train": 2, "validation": 2}}
    assert row_counts(rows) == wanted


def test_an_official_side_stays_whole_and_what_training_has_seen_is_known(tmp_path: Path) -> None:
    _, rows, said = rows_of(tmp_path, official=["validation"])
    assert len(rows.validation.examples) == len(VALIDATION)
    assert rows.validation.overlapping == [0, 1]
    assert texts(rows.train) == ["the film is great", "we saw paris", "a dull book"]
    counts = {"train": 3, "validation": 4, "validation_overlapping": 2, "validation_others": 2, "test": 2}
    assert row_counts(rows) == {"rows": counts, "rows_removed": {"train": 2, "validation": 0}}
    assert "2 validation rows are part of a training row: they stay and are also scored apart" in said


def test_an_official_test_side_counts_too(tmp_path: Path) -> None:
    _, rows, _ = rows_of(tmp_path, official=["test"])
    assert rows.test is not None and rows.test.overlapping == [1]
    assert rows.validation.overlapping is None and len(rows.validation.examples) == 2
    assert texts(rows.train) == ["the film is great", "a dull book"]


def test_training_rows_stay_where_nothing_is_to_be_dropped(tmp_path: Path) -> None:
    _, rows, _ = rows_of(tmp_path, official=["validation"], drop_overlap=False)
    assert (len(rows.train.examples), rows.validation.overlapping) == (5, [0, 1])
    assert row_counts(rows)["rows_removed"] == {"train": 0, "validation": 0}


def test_the_parts_of_an_official_side_have_figures_of_their_own(tmp_path: Path) -> None:
    task, rows, _ = rows_of(tmp_path, official=["validation"])
    found = Measurement(
        {"accuracy": 0.75, "loss": 1.0}, [Prediction(label) for label in ("good", "good", "good", "good")]
    )
    figures = part_figures("validation", task, rows.validation, found, rows.labels)
    assert list(figures) == ["validation", "validation_overlapping", "validation_others"]
    assert figures["validation"] == {"accuracy": 0.75, "loss": 1.0}
    assert (figures["validation_overlapping"]["accuracy"], figures["validation_others"]["accuracy"]) == (0.5, 1.0)


def test_a_summary_over_seeds_has_what_all_of_them_measured(tmp_path: Path) -> None:
    common = {"task": "t", "metric": "f1", "validation_others": {"f1": 0.25}, "rows": {"validation": 9}}
    older = {"task": "t", "metric": "f1", "seed": 2, "validation": {"f1": 0.5}}
    for seed, results in ((1, {**common, "seed": 1, "validation": {"f1": 1.0, "micro_f1": 1.0}}), (2, older)):
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "results.json").write_text(json.dumps(results))
    write_summary(tmp_path, [tmp_path / "1", tmp_path / "2"])
    summary = json.loads((tmp_path / "results.json").read_text())
    assert summary["rows"] == {"validation": 9} and "validation_others" not in summary
    assert set(summary["validation"]) == {"f1"} and summary["validation"]["f1"]["mean"] == 0.75


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"official": ["test"]}, "data.official: the test side has no files, wanted data.test"),
        (
            {"official": ["validation"], "max_validation_rows": 5},
            "data.max_validation_rows: is 5, and the validation side is official: a part of it is not it; wanted null, "
            "or data.official without it",
        ),
        ({"official": ["train"]}, 'data.official.0: found "train", wanted one of "validation", "test"'),
    ],
)
def test_what_cannot_be_official_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = {"format": "tsv", "path": "a"}
    data = {"train": [file], "validation": [file], "fields": {"text": "t", "label": "l"}, **changes}
    assert problems(tmp_path, data=data) == [message]
