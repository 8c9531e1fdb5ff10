"""Figures of tasks: the report of each class, the confusion matrix, the probes of the layers.

Pictures are drawn where matplotlib is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bert_ds.downstream.rows.tables import cell, spreadsheet_cell, table_text
from bert_ds.downstream.scores.metrics import class_report, confusion_counts

_MAX_DRAWN = 60


def class_figures(name: str) -> tuple[str, ...]:
    """Return the names of the files that `write_class_figures` may write."""
    return f"{name}_classes.txt", f"{name}_confusion.tsv", f"{name}_confusion.png"


def write_class_figures(folder: Path, name: str, pairs: Sequence[tuple[str, str]]) -> None:
    """Write NAME_classes.txt, NAME_confusion.tsv and, with matplotlib and not too many labels, NAME_confusion.png.

    Args:
        folder: is made.
        name: of the side.
        pairs: true and predicted label of everything that is labelled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    gold, found = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    labels = sorted({*gold, *found})
    (folder / f"{name}_classes.txt").write_text(class_report(gold, found, labels), encoding="utf-8")
    counts = confusion_counts(gold, found, labels)
    shown = list(map(spreadsheet_cell, labels))
    rows = [[cell(r"true \ predicted"), *shown]]
    rows += [[label, *map(str, row)] for label, row in zip(shown, counts.tolist(), strict=True)]
    (folder / f"{name}_confusion.tsv").write_text(table_text(rows), encoding="utf-8")
    if len(labels) <= _MAX_DRAWN and importlib.util.find_spec("matplotlib") is not None:
        draw_confusion(folder / f"{name}_confusion.png", counts, labels)


def draw_confusion(path: Path, counts: np.ndarray, labels: Sequence[str]) -> None:
    """Draw the share of each true label's rows that was given each label.

    Args:
        path: of the picture.
        counts: int64 [true label, predicted label].
        labels: in the order of both sides.
    """
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # a label may hold a dollar sign
        _draw_confusion(path, counts, list(map(cell, labels)))


def _draw_confusion(path: Path, counts: np.ndarray, labels: Sequence[str]) -> None:
    from matplotlib.figure import Figure

    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = 2.5 + 0.35 * len(labels)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(labels) <= 12:
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color)
    figure.colorbar(image, label="share of the true label")
    figure.savefig(path, dpi=120)


def draw_probes(path: Path, accuracies: Mapping[str, Sequence[float]]) -> None:
    """Draw accuracy over layers, a line per model, layer 0 first; nothing where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        for name, values in accuracies.items():
            axes.plot(range(len(values)), values, marker="o", label=name)
        axes.set_xlabel("layer (0: the embeddings)")
        axes.set_ylabel("accuracy of a linear classifier")
        axes.legend()
        figure.savefig(path, dpi=120)
