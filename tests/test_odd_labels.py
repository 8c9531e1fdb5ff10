"""Labels and texts as people have them: dollar signs, tabs, formulas, superscripts, one class, nothing at all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from downstream_cases import task_of, write_lines

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.downstream.kinds.kind import Prediction
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.rows.examples import Example, score_of, sorted_labels
from bert_ds.downstream.rows.records import Record
from bert_ds.downstream.scores.figures import draw_probes, write_class_figures
from bert_ds.downstream.tuning.task_rows import TaskRows, read_task

ODD = (
    "$a_{$",
    "a\tb",
    "a\nb",
    "c\\td",
    "²",
    "--1",
    "=1+1",
    "+x",
    "-y",
    "@z",
    "'q",
    "-5",
    "1e3",
    "a\u2028b\rc",
    "a\x0bb",
)


def cells(text: str) -> list[list[str]]:
    """Read a table back, by the rule that its writer states: escapes are those of JSON."""
    plain = {"t": "\t", "n": "\n", "r": "\r", "\\": "\\"}

    def unescaped(cell: str) -> str:
        escape = r"\\(?:u([0-9a-f]{4})|(.))"
        return re.sub(escape, lambda found: chr(int(found[1], 16)) if found[1] else plain[found[2]], cell)

    return [[unescaped(cell) for cell in line.split("\t")] for line in text.splitlines()]


def test_odd_labels_are_drawn_and_their_confusion_reads_back_equal(tmp_path: Path) -> None:
    write_class_figures(tmp_path, "test", [(label, label) for label in ODD])
    assert (tmp_path / "test_confusion.png").stat().st_size > 1000
    header, *rows = cells((tmp_path / "test_confusion.tsv").read_text(encoding="utf-8"))
    assert header[0] == "true \\ predicted"
    assert [cell.removeprefix("'") for cell in header[1:]] == sorted(ODD) == [row[0].removeprefix("'") for row in rows]
    quoted = {cell for cell in header[1:] if cell.startswith("'")}
    assert quoted == {"'--1", "'=1+1", "'+x", "'-y", "'@z", "''q"}
    assert all(number.isdecimal() for row in rows for number in row[1:])
    report = (tmp_path / "test_classes.txt").read_text(encoding="utf-8").splitlines()
    assert len(report) == len(ODD) + 6
    draw_probes(tmp_path / "probes.png", {"$model_{$": [0.5, 0.6]})
    assert (tmp_path / "probes.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("kind", "name", "place"),
    [("classification", "predictions.tsv", 1), ("intent_slot", "intents.tsv", 1), ("token_classification", "", 0)],
)
def test_odd_predictions_read_back_equal(kind: str, name: str, place: int) -> None:
    value: dict[str, Any] = {
        "classification": lambda label: (label, None),
        "intent_slot": lambda label: ((label, ("O",)), None),
        "token_classification": lambda label: ((label,), None),
    }
    rows = [Example("f:1", label, ("word",), None) for label in ODD]
    found = [Prediction(*value[kind](label)) for label in ODD]
    files = KINDS[kind].prediction_files(rows, found)
    if kind == "token_classification":
        read = cells(files["predictions.conll"])
        assert [row[1] for row in read if row != [""]] == list(ODD)
        return
    assert cells(files[name])[1:] == [[label, label] for label in ODD]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (("10", "9", "-1"), ("-1", "9", "10")),
        (("²", "1"), ("1", "²")),
        (("--1", "2"), ("--1", "2")),
        (("1" * 5000, "2"), ("1" * 5000, "2")),
        (("01", "1", "001"), ("001", "01", "1")),
        (("٣", "1"), ("1", "٣")),
    ],
)
def test_labels_are_numbers_only_where_all_are_whole_and_of_a_size(names: tuple[str, ...], wanted: Any) -> None:
    assert sorted_labels(names, ()) == wanted


TEXTS = {"text": "text", "label": "label"}


def rows_of(folder: Path, train: list[Any], tokenizer: Path, **content: Any) -> tuple[TaskRows, list[str]]:
    write_lines(folder / "train", list(map(json.dumps, train)))
    files = [{"path": "train", "format": "jsonl"}]
    data = {"train": files, "validation": files, "fields": TEXTS, "drop_overlap": False, **content.pop("data", {})}
    said: list[str] = []
    task = task_of(folder, {"kind": "classification", "data": data, **content})
    return read_task(task, load_tokenizer(tokenizer), say=said.append), said


@pytest.mark.parametrize("score", ["²", "--1", 10**400, True, None, "nan", [1]])
def test_a_score_that_is_no_number_is_named(tmp_path: Path, score: Any) -> None:
    write_lines(tmp_path / "train", ["{}"])
    files = [{"path": "train", "format": "jsonl"}]
    data = {"train": files, "validation": files, "fields": {"text": "text", "score": "s"}}
    task = task_of(tmp_path, {"kind": "regression", "data": data})
    with pytest.raises(DataError, match=r"f:7: score is .*, wanted a finite number"):
        score_of(Record("f:7", {"s": score}), "score", task)


@pytest.mark.parametrize("label", ["²", "ß", "1" * 5000, "--1", "ŉ"])
def test_a_choice_that_is_none_is_named(tmp_path: Path, tiny_export: Path, label: str) -> None:
    row = {"text": "we", "choices": ["a", "b"], "label": label}
    fields = {**TEXTS, "choices": "choices"}
    with pytest.raises(DataError, match=r"train:1: label is .*, wanted 0 to 1, a letter or a choice"):
        rows_of(tmp_path, [row], tiny_export, kind="multiple_choice", data={"fields": fields})


def test_one_class_alone_is_refused_before_anything_is_trained(tmp_path: Path, tiny_export: Path) -> None:
    rows = [{"text": f"we saw {index}", "label": "on$ly"} for index in range(4)]
    with pytest.raises(DataError, match=r'label of every training row is "on\$ly", wanted at least two'):
        rows_of(tmp_path, rows, tiny_export)
    slots = [{"words": ["we"], "tags": ["O"], "label": "play"}]
    fields = {"words": "words", "tags": "tags", "intent": "label"}
    with pytest.raises(DataError, match='intent of every training row is "play", wanted at least two'):
        rows_of(tmp_path, slots, tiny_export, kind="intent_slot", data={"fields": fields})


def test_an_empty_text_is_predicted_and_refused_in_training(tmp_path: Path, tiny_export: Path) -> None:
    rows = [{"text": "we saw it", "label": "a"}, {"text": "it saw us", "label": "b"}]
    write_lines(tmp_path / "test", ["we", "", "it", " ", "the"])
    test = {"test": [{"path": "test", "format": "lines"}]}
    found, said = rows_of(tmp_path, rows, tiny_export, data=test)
    assert found.test is not None
    assert [example.id for example in found.test.examples] == ["0", "1", "2", "3", "4"]
    assert [len(feature.input_ids) for feature in found.test.features] == [3, 2, 3, 2, 3]
    assert f"2 rows to predict have an empty text, the first at {tmp_path / 'test'}:2" in said
    with pytest.raises(DataError, match="train:3: text is empty, wanted text"):
        rows_of(tmp_path, [*rows, {"text": " ", "label": "a"}], tiny_export)


def test_an_empty_line_of_a_table_of_one_column_is_a_row(tmp_path: Path, tiny_export: Path) -> None:
    rows = [{"text": "we saw it", "label": "a"}, {"text": "it saw us", "label": "b"}]
    write_lines(tmp_path / "test", ["text", "we", "", "it"])
    found, _ = rows_of(tmp_path, rows, tiny_export, data={"test": [{"path": "test", "format": "tsv"}]})
    assert found.test is not None and [row.texts for row in found.test.examples] == [("we",), ("",), ("it",)]


def test_a_line_of_labels_is_one_line_whatever_they_hold(tmp_path: Path, tiny_export: Path) -> None:
    rows = [{"text": f"we saw {index}", "label": ODD[index]} for index in range(len(ODD))]
    _, said = rows_of(tmp_path, rows, tiny_export)
    assert all(len(line.splitlines()) == 1 for line in said)


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16"])
def test_a_data_file_is_read_in_the_encoding_that_the_task_names(
    tmp_path: Path, tiny_export: Path, encoding: str
) -> None:
    rows = [{"text": "we saw it", "label": "a"}, {"text": "it saw us", "label": "b"}]
    (tmp_path / "test").write_bytes("中文\n文中\n".encode(encoding))
    file = {"path": "test", "format": "lines"}
    found, _ = rows_of(tmp_path, rows, tiny_export, data={"test": [{**file, "encoding": encoding}]})
    assert found.test is not None and [row.texts for row in found.test.examples] == [("中文",), ("文中",)]
    with pytest.raises(DataError, match=rf'test:1: byte \d is no UTF-8 \(encoding "{encoding}"'):
        rows_of(tmp_path, rows, tiny_export, data={"test": [file]})
    with pytest.raises(ConfigError, match=r"data.test.0.encoding: found \"big5\", wanted one of"):
        rows_of(tmp_path, rows, tiny_export, data={"test": [{**file, "encoding": "big5"}]})
