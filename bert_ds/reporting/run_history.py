"""What a run folder tells of a run: its rows by kind, its attempts, what it was run with and on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bert_ds.ranks import DataError
from bert_ds.reporting.run_log import AT_MASK, read_metrics, read_rows

Row = Mapping[str, Any]

OVER_ALL = "loss_mlm"
"""The mean over all targets: of the training rows, and of the evaluations of earlier versions."""


class Band(NamedTuple):
    """Smallest, middle and largest value of a kind of layer at each logged step; NaN where a row has none."""

    low: list[float]
    median: list[float]
    high: list[float]


@dataclass(frozen=True)
class RunHistory:
    """The rows of a run as they stand, what later attempts superseded left out."""

    run_dir: Path
    steps: Sequence[Row]
    """Training rows; there is at least one."""
    evaluations: Sequence[Row]
    skipped: Sequence[Row]
    checkpoints: Sequence[Row]
    attempts: Sequence[Row]
    """The start row of every attempt, in the order of time."""
    recipe: Row
    """run_config.json, empty where the folder has none."""
    environment: Row
    """environment.json of the last attempt, empty where the folder has none."""
    is_done: bool

    @property
    def numbers(self) -> list[int]:
        """Numbers of the logged steps."""
        return [row["step"] for row in self.steps]

    @property
    def unigram(self) -> float:
        """Cross-entropy of a model that knows only how frequent each piece is, in nats; NaN where it is not known."""
        return number(self.attempts[-1].get("data", {}).get("unigram_cross_entropy")) if self.attempts else math.nan

    def series(self, name: str) -> list[float]:
        """Return a figure of every logged step, NaN where it is missing or was not finite."""
        return [number(row.get(name)) for row in self.steps]

    def names(self, prefix: str) -> list[str]:
        """Return the fields of the training rows that begin so."""
        return sorted({name for row in self.steps for name in row if name.startswith(prefix)})

    def trust(self, field: str) -> dict[str, Band]:
        """Return `trust_ratio` or `update_norm` by kind of layer; empty without an optimizer that has them."""
        kinds = {kind: None for row in self.steps for kind in row.get("trust") or {}}
        return {kind: _band(row.get("trust", {}).get(kind, {}).get(field, {}) for row in self.steps) for kind in kinds}


def read_history(run_dir: Path) -> RunHistory:
    """Return the history of a run folder, finished or still being written.

    Raises:
        DataError: it is not the folder of a run, or no step has been logged yet.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{path} does not exist: wanted the folder of a run")
    steps = read_metrics(path, "train")
    if not steps:
        raise DataError(f"{path} holds no logged step yet: wanted a run that has come so far")
    return RunHistory(
        run_dir=run_dir,
        steps=steps,
        evaluations=read_metrics(path, "evaluation"),
        skipped=read_metrics(path, "skipped"),
        checkpoints=read_metrics(path, "checkpoint"),
        attempts=[row for row in read_rows(path) if row.get("kind") == "start"],
        recipe=_read_json(run_dir / "run_config.json"),
        environment=_read_json(run_dir / "environment.json"),
        is_done=(run_dir / "DONE").exists(),
    )


def summary_lines(history: RunHistory) -> list[str]:
    """Return how the run went in a line or two."""
    speed = _median(history.series("tokens_per_s"))
    lines = [f"step {history.numbers[-1]}: {speed:,.0f} non-pad tokens/s (median of the logged intervals)"]
    last = history.evaluations[-1] if history.evaluations else {}
    if AT_MASK in last:
        lines += _kind_lines(history, last)
    elif OVER_ALL in last:
        lines.append(
            f"masked words of the validation text: loss {number(last[OVER_ALL]):.3f} nats, the mean over 80/10/10 of "
            "an earlier version, which copying the kept pieces flatters"
        )
    return lines


def _kind_lines(history: RunHistory, last: Row) -> list[str]:
    line = f"validation text at [MASK]: loss {number(last[AT_MASK]):.3f} nats, "
    line += f"accuracy {number(last.get('mlm_masked_accuracy')):.3f}, {last.get('mlm_masked_targets', 0):,} targets"
    if math.isfinite(history.unigram):
        below = below_unigram(history)
        line += f"; piece frequencies alone {history.unigram:.3f} nats, {below:.3f} above the model"
    others = [
        f"at {text}: loss {number(last.get(f'loss_mlm_{kind}')):.3f}, "
        f"accuracy {number(last.get(f'mlm_{kind}_accuracy')):.3f}, {last.get(f'mlm_{kind}_targets', 0):,} targets"
        for kind, text in (("random", "random pieces"), ("kept", "kept pieces"))
    ]
    return [line, "; ".join(others)]


def below_unigram(history: RunHistory) -> float:
    """Return how far the last validation loss at [MASK] is below the cross-entropy of piece frequencies, in nats.

    Raises:
        DataError: the run has not come so far, or an earlier version wrote no loss at [MASK].
    """
    if not history.evaluations or not math.isfinite(history.unigram):
        raise DataError(f"{history.run_dir} holds no evaluation of masked words yet: wanted a run that has come so far")
    if AT_MASK not in history.evaluations[-1]:
        raise DataError(
            f"{history.run_dir}/metrics.jsonl: the last evaluation has the mean over 80/10/10 of an earlier version, "
            f"wanted {AT_MASK}: score.py --task masked_words measures the exported model"
        )
    return history.unigram - number(history.evaluations[-1][AT_MASK])


def number(value: Any) -> float:
    """Return a logged value as a float: null, which stands for what was not finite, and a missing one are NaN."""
    return math.nan if value is None else float(value)


def _band(spreads: Iterable[Row]) -> Band:
    rows = [[number(spread.get(name)) for name in ("min", "median", "max")] for spread in spreads]
    return Band(*(list(column) for column in zip(*rows, strict=True)))


def _median(values: Sequence[float]) -> float:
    known = sorted(value for value in values if math.isfinite(value))
    return known[len(known) // 2] if known else math.nan


def _read_json(path: Path) -> Row:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
