"""From the rows of a file to the examples of a task: which column means what, and what must not be empty."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.reading.config_problems import describe, did_you_mean
from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.downstream.rows.records import Record, pick

_WHOLE_NUMBER = re.compile("-?[0-9]{1,18}")
"""Not what `str.isdigit` takes: that has superscripts, and no limit."""
Labels = dict[str, tuple[str, ...]]
"""Name of a prediction -> its labels in the order of their ids; {} where numbers are predicted."""

Say = Callable[[str], None]
"""Takes one line that is worth telling: how much was cut, split, dropped or mended."""


class Example(NamedTuple):
    """One row of a task."""

    where: str
    """File and line, for messages."""
    id: str
    """The row's own id, or its number among the rows of its side."""
    texts: tuple[str, ...]
    """What is read: a text, a text and its pair, words, a question and its context, a text and its choices."""
    target: Any
    """What is to be predicted, in the form that the kind gives it; None where the row has no label."""


def text_of(record: Record, role: str, task: TaskConfig, *, may_be_empty: bool = False) -> str:
    """Return a text without space around it; DataError where it is missing, or empty and may not be."""
    value = _value(record, role, task)
    if not isinstance(value, str):
        raise DataError(f"{record.where}: {role} is {describe(value)}, wanted text")
    if not value.strip() and not may_be_empty:
        raise DataError(f"{record.where}: {role} is empty, wanted text")
    return value.strip()


def texts_of(record: Record, task: TaskConfig, *, is_optional: bool = False) -> tuple[str, ...]:
    """Return the text, and its pair where the task has one.

    Args:
        record: of a file.
        task: names the columns.
        is_optional: the row may be without a label. Such rows are predicted, one and all: an empty text too, or the
            predictions would not be as many as the rows.
    """
    roles = ("text", "text_pair") if "text_pair" in task.data.fields else ("text",)
    return tuple(text_of(record, role, task, may_be_empty=is_optional) for role in roles)


def label_of(record: Record, role: str, task: TaskConfig, *, is_optional: bool = False) -> str | None:
    """Return a label under the name that the task gives it; None where it is optional and the row has none."""
    if is_optional and not _has(record, role, task):
        return None
    value = _value(record, role, task)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{record.where}: {role} is {describe(value)}, wanted a label")
    label = str(value).strip()
    if not label:
        raise DataError(f"{record.where}: {role} is empty, wanted a label")
    return task.data.rename_labels.get(label, label)


def score_of(record: Record, role: str, task: TaskConfig, *, is_optional: bool = False) -> float | None:
    """Return a finite number; None where it is optional and the row has none."""
    if is_optional and not _has(record, role, task):
        return None
    value = _value(record, role, task)
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise DataError(f"{record.where}: {role} is {describe(value)}, wanted a finite number")
    return score


def list_of(record: Record, role: str, task: TaskConfig) -> tuple[str, ...]:
    """Return a list of texts, at least one and none of them empty."""
    value = _value(record, role, task)
    if not isinstance(value, list) or not value:
        raise DataError(f"{record.where}: {role} is {describe(value)}, wanted a list with at least one item")
    for index, item in enumerate(value):
        if not isinstance(item, str) or not item.strip():
            raise DataError(f"{record.where}: item {index} of {role} is {describe(item)}, wanted text")
    return tuple(item.strip() for item in value)


def id_of(record: Record, index: int, task: TaskConfig) -> str:
    """Return the row's own id where the task names its column, else its number."""
    column = task.data.fields.get("id")
    return str(index) if column is None else str(pick(record, column)).strip()


def sorted_labels(found: Iterable[str], declared: Sequence[str]) -> tuple[str, ...]:
    """Return the declared labels, or those found: as numbers where all are numbers, else by spelling."""
    if declared:
        return tuple(declared)
    names = set(found)
    if all(map(_WHOLE_NUMBER.fullmatch, names)):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def several_labels(found: Iterable[str], declared: Sequence[str], *, role: str, task: TaskConfig) -> tuple[str, ...]:
    """Return the labels of `sorted_labels`; DataError where there is one alone, of which nothing can be learned."""
    labels = sorted_labels(found, declared)
    if len(labels) == 1:
        raise DataError(
            f"task {task.name}: the {role} of every training row is {describe(labels[0])}, wanted at least two labels "
            f"(data.fields.{role} names the column)"
        )
    return labels


def label_id(label: str, labels: Sequence[str], *, where: str) -> int:
    """Return the id of a label; DataError where training has never seen it."""
    if label not in labels:
        known = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")
        raise DataError(
            f"{where}: the label {describe(label)} is none of the {len(labels)} of the task: {known}"
            f"{did_you_mean(label, labels)}"
        )
    return labels.index(label)


def _value(record: Record, role: str, task: TaskConfig) -> Any:
    return pick(record, task.data.fields.get(role, role))


def _has(record: Record, role: str, task: TaskConfig) -> bool:
    try:
        return _value(record, role, task) not in (None, "")
    except DataError:
        return False
