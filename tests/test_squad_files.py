from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bert_ds.basics.ranks import DataError
from bert_ds.downstream.rows.squad_files import Answer, align_answers, read_squad

CONTEXT = "Ann met Bob. Bob met Ann."


def question(key: str = "q1", **changes: Any) -> dict[str, Any]:
    return {"id": key, "question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}], **changes}


def write(path: Path, *questions: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": CONTEXT, "qas": list(questions)}]}]}))
    return path


def test_questions_are_read_in_order_and_know_their_place(tmp_path: Path) -> None:
    path = write(tmp_path / "q.json", question(), question("q2", answers=[], is_impossible=True))
    first, second = read_squad(path, path.read_text())
    assert first[0] == "data[0].paragraphs[0].qas[0]"
    assert first[1] == {**question(), "context": CONTEXT, "is_impossible": False}
    assert (second[1]["id"], second[1]["answers"], second[1]["is_impossible"]) == ("q2", [], True)


BROKEN: dict[str, tuple[Callable[[str], str], str]] = {
    "cut in the middle": (lambda text: text[:60], "not JSON: "),
    "a list": (lambda text: f"[{text}]", "is a list, wanted an object with data"),
    "no question text": (lambda text: text.replace('"question"', '"query"'), r"qas\[0\] has no question; it has 'id',"),
    "empty context": (lambda text: text.replace(CONTEXT, " "), r"paragraphs\[0\]: context is empty"),
    "start in words": (lambda text: text.replace(": 0", ': "0"'), r"answers\[0\]: answer_start is '0', wanted int"),
    "start not a number": (lambda text: text.replace(": 0", ": NaN"), "answer_start is 'nan', wanted int"),
    "id twice": (lambda text: text.replace('"q2"', '"q1"'), r"qas\[1\]: id 'q1' is also at .*qas\[0\]"),
    "impossible with an answer": (lambda text: text.replace("false", "true"), "is_impossible is true, but there are 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_the_place(tmp_path: Path, name: str) -> None:
    change, message = BROKEN[name]
    path = write(tmp_path / "q.json", question(is_impossible=False), question("q2"))
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        list(read_squad(path, path.read_text()))


@pytest.mark.parametrize(
    ("answer", "wanted", "moved", "absent"),
    [
        (Answer("Bob", 8), Answer("Bob", 8), 0, 0),
        (Answer("Bob", 12), Answer("Bob", 13), 1, 0),
        (Answer("Bob", 9), Answer("Bob", 8), 1, 0),
        (Answer("Ann", -1), Answer("Ann", 0), 1, 0),
        (Answer("Eve", -1), Answer("Eve", -1), 0, 1),
        (Answer("Eve", 8), Answer("Eve", -1), 0, 1),
    ],
)
def test_an_answer_moves_to_the_nearest_place_of_its_text(
    answer: Answer, wanted: Answer, moved: int, absent: int
) -> None:
    assert align_answers(CONTEXT, [answer]) == ((wanted,), moved, absent)


def test_the_131_wrong_answers_of_cmrc_are_found(tmp_path: Path) -> None:
    archive = Path(__file__).parents[2] / "shared/data/cmrc2018.tar.xz"
    if not archive.is_file():
        pytest.skip(f"{archive} is missing: the answers of CMRC are not counted")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    rows = [
        row for path in sorted(tmp_path.rglob("*.json")) for row in read_squad(path, path.read_text(encoding="utf-8"))
    ]
    found = [
        align_answers(row["context"], [Answer(answer["text"], answer["answer_start"]) for answer in row["answers"]])
        for _, row in rows
    ]
    assert (len(rows), sum(one.num_moved for one in found), sum(one.num_absent for one in found)) == (3146, 9, 122)
