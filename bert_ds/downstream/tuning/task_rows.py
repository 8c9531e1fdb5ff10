"""The rows of a task: read, split, made into sequences; the same on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.reading.config_problems import printable
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.configuration.task.task_data_config import DataFile
from bert_ds.corpus.tokenizer.wordpiece import WordPieceTokenizer
from bert_ds.downstream.kinds.kind import Kind, Say
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.rows.examples import Example, Labels
from bert_ds.downstream.rows.features import Feature, FeatureContext
from bert_ds.downstream.rows.records import read_records
from bert_ds.downstream.rows.splits import drop_overlap, first_by_hash, hold_out

_SHOWN_LABELS = 60


class Side(NamedTuple):
    """Rows that are trained on, chosen by, or predicted."""

    examples: list[Example]
    features: list[Feature]
    overlapping: list[int] | None = None
    """Which rows of an official side are part of a training row; None where the side is not official."""


class TaskRows(NamedTuple):
    """All rows of a task and the labels that occur in training."""

    labels: Labels
    train: Side
    validation: Side
    test: Side | None
    num_removed: dict[str, int]
    """Rows of "train" and "validation" that were left out as part of a row of the other side."""


class SplitRows(NamedTuple):
    """The rows that are trained on and chosen by, before they become sequences."""

    train: list[Example]
    validation: list[Example]
    num_removed: dict[str, int]
    """See `TaskRows`."""
    overlapping: dict[str, list[int]]
    """Of every official side, which of its rows are part of a training row."""


def read_task(task: TaskConfig, tokenizer: WordPieceTokenizer, *, labels: Labels | None = None, say: Say) -> TaskRows:
    """Read the files of a task.

    Args:
        task: names files, columns and split.
        tokenizer: of the model.
        labels: of a model that is fine-tuned already; None takes those of the training rows.
        say: takes counts of rows, classes, and of all that was dropped, cut or repaired.

    Raises:
        DataError: a file or a row is not as the task says; the message names it.
    """
    kind = KINDS[task.kind]
    test = _read(task.data.test, task, kind, is_optional=True, say=say)
    split = split_rows(task, kind, test=test, say=say)
    labels = kind.make_labels(split.train, task) if labels is None else labels
    context = FeatureContext(tokenizer, task, labels, say)
    sides = {"training": split.train, "validation": split.validation, "test": test}
    features = {name: kind.make_features(rows, context) for name, rows in sides.items()}
    for name, rows in sides.items():
        if rows:
            sequences = "" if len(features[name]) == len(rows) else f" in {len(features[name]):,} sequences"
            say(f"{name} rows: {len(rows):,}{sequences}")
    for name, text in _balance(labels, features["training"]).items():
        say(f"{name}s of the training rows: {text}")
    made = {name: Side(rows, features[name], split.overlapping.get(name)) for name, rows in sides.items()}
    return TaskRows(labels, made["training"], made["validation"], made["test"] if test else None, split.num_removed)


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
    train = _read(data.train, task, kind, is_optional=False, say=say)
    if data.validation_fraction is None:
        validation = _read(data.validation, task, kind, is_optional=False, say=say)
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


def balanced_weights(labels: Sequence[str], features: Sequence[Feature], *, target: str) -> tuple[float, ...]:
    """Return a weight per label in inverse proportion to its frequency, with a mean of 1 over all targets.

    Raises:
        DataError: a label never occurs in training, so that it would have an infinite weight.
    """
    counts = _counts(features, target)
    missing = [label for index, label in enumerate(labels) if not counts[index]]
    if missing:
        raise DataError(f'class_weights "balanced": no training row has the label {", ".join(missing)}')
    total = sum(counts.values())
    return tuple(total / (len(labels) * counts[index]) for index in range(len(labels)))


def _read(files: Sequence[DataFile], task: TaskConfig, kind: Kind, *, is_optional: bool, say: Say) -> list[Example]:
    records = [record for file in files for record in read_records(file)]
    examples = [kind.make_example(record, index, task, is_optional) for index, record in enumerate(records)]
    empty = [example.where for example in examples if not example.texts[0]]
    if empty and is_optional:
        say(f"{len(empty)} rows to predict have an empty text, the first at {empty[0]}")
    return examples if kind.mend is None else kind.mend(examples, task, say)


def _balance(labels: Labels, features: Sequence[Feature]) -> dict[str, str]:
    """Return how often each label occurs in training, the most frequent first."""
    texts = {}
    for name, names in labels.items():
        counts = _counts(features, name)
        total = sum(counts.values()) or 1
        shown = [
            f"{printable(names[index])} {count:,} ({count / total:.1%})"
            for index, count in counts.most_common(_SHOWN_LABELS)
        ]
        texts[name] = ", ".join(shown) + (", ..." if len(counts) > _SHOWN_LABELS else "")
    return texts


def _counts(features: Sequence[Feature], target: str) -> Counter[int]:
    counts: Counter[int] = Counter()
    for feature in features:
        values = feature.targets.get(target)
        if values is None:
            continue
        if values.dtype.kind == "f":
            counts.update(values.nonzero()[1].tolist())
        else:
            counts.update(values[values != IGNORE_INDEX].tolist())
    return counts
