"""The rows of a task on their sides, of which none has a part of a row of the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.configuration.task.task_data_config import DataFile
from bert_ds.downstream.kinds.kind import Kind
from bert_ds.downstream.rows.examples import Example, Say
from bert_ds.downstream.rows.records import read_records
from bert_ds.downstream.rows.splits import drop_overlap, first_by_hash, hold_out


class SplitRows(NamedTuple):
    """The rows that are trained on and chosen by, before they become sequences."""

    train: list[Example]
    validation: list[Example]
    num_removed: dict[str, int]
    """Rows of "train" and "validation" that were left out as part of a row of the other side."""
    overlapping: dict[str, list[int]]
    """Of every official side, which of its rows are part of a training row."""


def split_rows(task: TaskConfig, kind: Kind, *, test: Sequence[Example] = (), say: Say) -> SplitRows:
    """Return the training and the validation rows of a task, of which none is part of one of the other side.

    An official side keeps such rows, and they are named.

    Args:
        task: names files and split.
        kind: of the task.
        test: the test rows, which matter where they are official.
        say: takes how many rows were left out.
    """
    data = task.data
    train = read_examples(data.train, task, kind, is_optional=False, say=say)
    if data.validation_fraction is None:
        validation = read_examples(data.validation, task, kind, is_optional=False, say=say)
    else:
        split = hold_out([kind.row_text(example) for example in train], data.validation_fraction)
        train, validation = [train[i] for i in split.train], [train[i] for i in split.validation]
    sides = SplitRows(train, validation, {"train": 0, "validation": 0}, {})
    if data.drop_overlap or data.official:
        sides = _without_overlap(sides, task, kind, test=test, say=say)
    train = [sides.train[i] for i in first_by_hash(list(map(kind.row_text, sides.train)), data.max_train_rows)]
    chosen = first_by_hash(list(map(kind.row_text, sides.validation)), data.max_validation_rows)
    validation = [sides.validation[i] for i in chosen]
    for name, side in (("training", train), ("validation", validation)):
        if not side:
            raise DataError(f"task {task.name}: no {name} row is left, wanted at least one")
    return sides._replace(train=train, validation=validation)


def _without_overlap(sides: SplitRows, task: TaskConfig, kind: Kind, *, test: Sequence[Example], say: Say) -> SplitRows:
    """Leave out what is part of a row of the other side; of an official side, say what it is instead."""
    official, num_validation = task.data.official, len(sides.validation)
    held = [*sides.validation, *(test if "test" in official else ())]
    kept = drop_overlap(*([kind.row_text(example) for example in rows] for rows in (sides.train, held)))
    seen = sorted(set(range(len(held))) - set(kept.validation))
    found = {
        "validation": [i for i in seen if i < num_validation],
        "test": [i - num_validation for i in seen if i >= num_validation],
    }
    overlapping: dict[str, list[int]] = {name: found[name] for name in official}
    train, validation = sides.train, sides.validation
    if task.data.drop_overlap:
        train = [train[i] for i in kept.train]
        if "validation" not in official:
            validation = [validation[i] for i in kept.validation if i < num_validation]
        say(
            f"dropped as part of a row of the other side: {len(sides.train) - len(train):,} training rows and "
            f"{num_validation - len(validation):,} validation rows"
        )
    for name, rows in overlapping.items():
        say(f"{len(rows):,} {name} rows are part of a training row: they stay and are also scored apart")
    num_removed = {"train": len(sides.train) - len(train), "validation": num_validation - len(validation)}
    return SplitRows(train, validation, num_removed, overlapping)


def read_examples(
    files: Sequence[DataFile], task: TaskConfig, kind: Kind, *, is_optional: bool, say: Say
) -> list[Example]:
    """Return the rows of some files as a kind's examples.

    Args:
        files: of one side.
        task: says which columns mean what.
        kind: of the task.
        is_optional: whether a row may be without a label or a text.
        say: takes how many are.

    Raises:
        DataError: a file or a row is not as the task says; the message names it.
    """
    records = [record for file in files for record in read_records(file)]
    examples = [kind.make_example(record, index, task, is_optional) for index, record in enumerate(records)]
    empty = [example.where for example in examples if not example.texts[0]]
    if empty and is_optional:
        say(f"{len(empty)} rows to predict have an empty text, the first at {empty[0]}")
    return examples if kind.mend is None else kind.mend(examples, task, say)
