"""The rows of a run of any length: read in one pass, the numbers kept as columns, so that a million rows fit.

A later attempt continues from the step of its `start` row: what earlier attempts wrote beyond that step is superseded,
even where the later attempt has not come as far yet. Of the rows of a step the newest counts.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from bert_ds.basics.ranks import DataError
from bert_ds.reporting.metrics_file import numbered_rows

Row = Mapping[str, Any]

MAX_COLUMNS = 64
"""Numbers of a training row; a run writes some twenty."""
MAX_EVENTS = 10_000
"""Rows kept of each other kind, the newest."""
MAX_WHOLE_ROWS = 2_048
"""Training rows kept with all they hold: twice as many at most, evenly spread."""


@dataclass(frozen=True)
class RunRows:
    """What counts of the rows of a run."""

    numbers: Sequence[int]
    """Numbers of the logged steps, ascending."""
    columns: Mapping[str, Sequence[float]]
    """Name -> value at each of these steps; NaN where it is missing or was not finite."""
    whole: Sequence[Row]
    """Training rows in full, evenly spread where there are many; the last one is always there."""
    evaluations: Sequence[Row]
    skipped: Sequence[Row]
    checkpoints: Sequence[Row]
    attempts: Sequence[Row]
    """The start row of every attempt, in the order of time."""


def read_run_rows(path: Path) -> RunRows:
    """Return the rows of a metrics file; a line torn by a kill or a full disk is ignored.

    Raises:
        DataError: the file cannot be read, a line is longer than any row, or a row has no step or time.
    """
    starts = _Starts()
    train, whole = _Columns(), _Spread()
    events = {kind: _Newest() for kind in ("evaluation", "skipped", "checkpoint")}
    attempts = _Newest()
    for place, (line, row) in enumerate(numbered_rows(path)):
        kind, step = row.get("kind"), row.get("step")
        if kind not in ("start", "train", *events):
            continue
        if type(step) is not int or not 0 <= step < 1 << 53 or not math.isfinite(number(row.get("time"))):
            raise DataError(f"{path}:{line}: wanted a row with a whole step and a time")
        if kind == "start":
            starts.add(place, step)
            attempts.add(place, row)
        elif kind == "train":
            train.add(place, step, row)
            whole.add(place, row)
        else:
            events[kind].add(place, row)
    return RunRows(
        *train.finished(starts),
        whole=starts.counting(whole.finished()),
        attempts=[row for _, row in attempts.kept],
        evaluations=starts.counting(events["evaluation"].kept),
        skipped=starts.counting(events["skipped"].kept),
        checkpoints=starts.counting(events["checkpoint"].kept),
    )


def number(value: Any) -> float:
    """Return a logged value as a float: null, which stands for what was not finite, and what is none are NaN."""
    if not isinstance(value, int | float):
        return math.nan
    return float(value) if abs(value) < 1e300 else math.nan


class _Starts:
    """Where attempts begin in the file and at which step."""

    def __init__(self) -> None:
        self._places, self._steps = array("q"), array("q")
        self._lowest: array[int] = array("q")

    def add(self, place: int, step: int) -> None:
        self._places.append(place)
        self._steps.append(step)

    def last_step_at(self, place: int) -> int:
        """Return the step beyond which rows at a place of the file are superseded."""
        if len(self._lowest) != len(self._steps) + 1:
            lowest = array("q", [1 << 62])
            for step in reversed(self._steps):
                lowest.append(min(step, lowest[-1]))
            self._lowest = lowest[::-1]
        return self._lowest[bisect_right(self._places, place)]

    def counting(self, rows: Sequence[tuple[int, Row]]) -> list[Row]:
        """Return the rows that no attempt has superseded, the newest of each step, by step."""
        newest = {row["step"]: row for place, row in rows if row["step"] <= self.last_step_at(place)}
        return [newest[step] for step in sorted(newest)]


@dataclass
class _Newest:
    """The newest rows of a kind, with their places."""

    kept: list[tuple[int, Row]] = field(default_factory=list)

    def add(self, place: int, row: Row) -> None:
        self.kept.append((place, row))
        if len(self.kept) >= 2 * MAX_EVENTS:
            del self.kept[:MAX_EVENTS]


class _Spread:
    """Every so-manieth row, of a number of rows that is not known before, and the last."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, Row]] = []
        self._every = 1
        self._count = 0
        self._last: tuple[int, Row] | None = None

    def add(self, place: int, row: Row) -> None:
        if self._count % self._every == 0:
            self._kept.append((place, row))
        self._count += 1
        self._last = (place, row)
        if len(self._kept) >= 2 * MAX_WHOLE_ROWS:
            self._kept = self._kept[::2]
            self._every *= 2

    def finished(self) -> list[tuple[int, Row]]:
        return self._kept if self._last is None else [*self._kept, self._last]


class _Columns:
    """Numbers of the training rows, eight bytes each."""

    def __init__(self) -> None:
        self._places, self._steps = array("q"), array("q")
        self._values: dict[str, array[float]] = {}

    def add(self, place: int, step: int, row: Row) -> None:
        num_rows = len(self._steps)
        self._places.append(place)
        self._steps.append(step)
        for name, value in row.items():
            if isinstance(value, str | bool | dict | list) or name == "step":
                continue
            column = self._values.get(name)
            if column is None:
                if len(self._values) == MAX_COLUMNS:
                    continue
                column = self._values[name] = array("d")
            column.extend([math.nan] * (num_rows - len(column)))
            column.append(number(value))

    def finished(self, starts: _Starts) -> tuple[array[int], dict[str, array[float]]]:
        """Return steps and columns of the rows that count, by step."""
        steps = self._steps
        counting = [i for i, place in enumerate(self._places) if steps[i] <= starts.last_step_at(place)]
        counting.sort(key=steps.__getitem__)
        order = [i for i, after in pairwise(counting) if steps[after] != steps[i]] + counting[-1:]
        for column in self._values.values():
            column.extend([math.nan] * (len(steps) - len(column)))
        picked = {name: array("d", map(column.__getitem__, order)) for name, column in self._values.items()}
        return array("q", map(steps.__getitem__, order)), picked
