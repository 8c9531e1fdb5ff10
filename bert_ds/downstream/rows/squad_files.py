"""Question answering files in SQuAD's form: SQuAD 1.1 and 2.0, CMRC 2018, and whatever else is written so.

    {"data": [{"paragraphs": [{"context": TEXT, "qas": [{"id", "question", "answers": [{"text", "answer_start"}],
    "is_impossible"}]}]}]}

`answer_start` is wrong in many files: see `align_answers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bert_ds.basics.input_gate import parse_json
from bert_ds.basics.ranks import DataError


class Answer(NamedTuple):
    """A text that counts as right, and the character of the context where it begins; -1: it is no part of it."""

    text: str
    start: int


class Alignment(NamedTuple):
    """Answers whose text stands where they say, and how many had to be moved or stand nowhere."""

    answers: tuple[Answer, ...]
    num_moved: int
    num_absent: int


def read_squad(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each question stands in the file, and its fields.

    The fields are id, question, context (str), answers (a list of {"text", "answer_start"}, empty for an impossible
    question) and is_impossible (bool; false where the file does not say). A question may be empty: CMRC's trial set has
    two, and the official scores count them.

    Raises:
        DataError: the text is not JSON or not of this form, an id comes twice, a text is empty, or a question is
            impossible and has answers all the same.
    """
    content = parse_json(text, where=path, error=DataError)
    places: dict[str, str] = {}
    for place, fields in _questions(path, content):
        key = fields["id"]
        if key in places:
            raise DataError(f"{path}:{place}: id {key!r} is also at {places[key]}")
        places[key] = place
        yield place, fields


def align_answers(context: str, answers: Sequence[Answer]) -> Alignment:
    """Move every answer to where its text stands in the context.

    CMRC has answers with start -1, which are no part of the context, and shifted ones. A shifted answer moves to the
    nearest place where its text occurs; one that occurs nowhere gets start -1: it still counts as right, but cannot be
    trained on.
    """
    aligned = []
    num_moved = num_absent = 0
    for text, start in answers:
        if start >= 0 and context.startswith(text, start):
            aligned.append(Answer(text, start))
            continue
        places = _occurrences(context, text)
        num_moved += bool(places)
        num_absent += not places
        aligned.append(Answer(text, min(places, key=lambda place: abs(place - start)) if places else -1))
    return Alignment(tuple(aligned), num_moved, num_absent)


def _questions(path: Path, content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, article in enumerate(_member(content, "data", list, str(path))):
        in_article = f"data[{number}]"
        for index, paragraph in enumerate(_member(article, "paragraphs", list, f"{path}:{in_article}")):
            in_paragraph = f"{in_article}.paragraphs[{index}]"
            context = _text(paragraph, "context", f"{path}:{in_paragraph}")
            for place, question in enumerate(_member(paragraph, "qas", list, f"{path}:{in_paragraph}")):
                in_question = f"{in_paragraph}.qas[{place}]"
                yield in_question, _fields(question, context, f"{path}:{in_question}")


def _fields(question: Any, context: str, where: str) -> dict[str, Any]:
    answers = [
        {
            "text": _text(answer, "text", f"{where}.answers[{index}]"),
            "answer_start": _member(answer, "answer_start", int, f"{where}.answers[{index}]"),
        }
        for index, answer in enumerate(_member(question, "answers", list, where))
    ]
    is_impossible = _member(question, "is_impossible", bool, where) if "is_impossible" in question else False
    if is_impossible and answers:
        raise DataError(f"{where}: is_impossible is true, but there are {len(answers)} answers")
    return {
        "id": _text(question, "id", where),
        "question": _member(question, "question", str, where).strip(),
        "context": context,
        "answers": answers,
        "is_impossible": is_impossible,
    }


def _text(value: Any, name: str, where: str) -> str:
    found = _member(value, name, str, where)
    if not found.strip():
        raise DataError(f"{where}: {name} is empty")
    return found


def _member(value: Any, name: str, kind: type, where: str) -> Any:
    """Return value[name]; DataError unless value is an object that has it in the wanted type."""
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}, wanted an object with {name}")
    if name not in value:
        raise DataError(f"{where} has no {name}; it has {', '.join(map(repr, value))[:300] or 'nothing'}")
    if type(value[name]) is not kind:
        raise DataError(f"{where}: {name} is {str(value[name])[:40]!r}, wanted {kind.__name__}")
    return value[name]


def _occurrences(context: str, text: str) -> list[int]:
    places = []
    start = context.find(text)
    while start >= 0:
        places.append(start)
        start = context.find(text, start + 1)
    return places
