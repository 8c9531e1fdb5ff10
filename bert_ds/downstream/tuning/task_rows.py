"""The rows of a task: read, split, made into sequences; the same on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.reading.config_problems import printable
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer
from bert_ds.downstream.kinds.split_rows import read_examples, split_rows
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.rows.examples import Example, Labels, Say
from bert_ds.downstream.rows.features import Feature, FeatureContext

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


def read_task(task: TaskConfig, tokenizer: TextTokenizer, *, labels: Labels | None = None, say: Say) -> TaskRows:
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
    test = read_examples(task.data.test, task, kind, is_optional=True, say=say)
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
