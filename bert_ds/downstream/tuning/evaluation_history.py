"""Which step of a run is the best so far, and whether it is worth going on; it lives in a file, so a resume knows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bert_ds.basics.input_gate import read_json
from bert_ds.basics.ranks import DataError
from bert_ds.basics.whole_files import write_json


class Measured(NamedTuple):
    """One evaluation."""

    step: int
    value: float
    """Of the metric by which the best step is chosen; more is better."""


def read_history(path: Path, *, until_step: int) -> list[Measured]:
    """Return the evaluations of a run up to a step, oldest first; none where the file does not exist."""
    if not path.is_file():
        return []
    try:
        rows = [Measured(int(row["step"]), float(row["value"])) for row in read_json(path)]
    except (ValueError, KeyError, TypeError, OverflowError):
        raise DataError(f"{path} is no list of evaluations: delete it, or the run folder") from None
    return [row for row in rows if row.step <= until_step]


def write_history(path: Path, history: Sequence[Measured]) -> None:
    """Write the evaluations of a run."""
    write_json(path, [row._asdict() for row in history])


def extended(history: Sequence[Measured], measured: Measured) -> list[Measured]:
    """Return the history with one more evaluation; one of the same step is replaced."""
    return [*(row for row in history if row.step != measured.step), measured]


def best_of(history: Sequence[Measured]) -> Measured | None:
    """Return the best evaluation, the earliest of equals."""
    return max(history, key=lambda row: (row.value, -row.step), default=None)


def is_exhausted(history: Sequence[Measured], patience: int | None) -> bool:
    """Whether the last `patience` evaluations have all been no better than the best before them."""
    best = best_of(history)
    if patience is None or best is None:
        return False
    return sum(row.step > best.step for row in history) >= patience
