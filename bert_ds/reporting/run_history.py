"""What a run folder tells of a run: its rows by kind, its attempts, what it was run with and on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bert_ds.basics import input_gate
from bert_ds.basics.ranks import DataError
from bert_ds.configuration.reading.config_problems import describe
from bert_ds.reporting.run_log import AT_MASK
from bert_ds.reporting.run_rows import Row, RunRows, number, read_run_rows

OVER_ALL = "loss_mlm"
"""The mean over all targets: of the training rows, and of the evaluations of earlier versions."""


class Band(NamedTuple):
    """Smallest, middle and largest value of a kind of layer at each of `trust_numbers`; NaN where a row has none."""

    low: list[float]
    median: list[float]
    high: list[float]


@dataclass(frozen=True)
class RunHistory(RunRows):
    """The rows of a run as they stand, at least one of training, and what it was run with and on."""

    run_dir: Path
    recipe: Row
    """run_config.json, empty where the folder has none."""
    environment: Row
    """environment.json of the last attempt, empty where the folder has none."""
    is_done: bool

    @property
    def trust_numbers(self) -> list[int]:
        """The logged steps of which `trust` tells: all, or evenly spread ones where there are many."""
        return [row["step"] for row in self.whole]

    @property
    def unigram(self) -> float:
        """Cross-entropy of a model that knows only how frequent each piece is, in nats; NaN where it is not known."""
        attempts = self.attempts
        return number(section(attempts[-1], "data").get("unigram_cross_entropy")) if attempts else math.nan

    def series(self, name: str) -> Sequence[float]:
        """Return a figure of every logged step, NaN where it is missing or was not finite."""
        return self.columns.get(name) or [math.nan] * len(self.numbers)

    def names(self, prefix: str) -> list[str]:
        """Return the fields of the training rows that begin so."""
        return sorted(name for name in self.columns if name.startswith(prefix))

    def trust(self, field: str) -> dict[str, Band]:
        """Return `trust_ratio` or `update_norm` by kind of layer; empty without an optimizer that has them."""
        trusts = [section(row, "trust") for row in self.whole]
        kinds = {kind: None for trust in trusts for kind in trust}
        return {kind: _band(section(section(trust, kind), field) for trust in trusts) for kind in kinds}


def read_history(run_dir: Path) -> RunHistory:
    """Return the history of a run folder, finished or still being written.

    Raises:
        DataError: it is not the folder of a run, or no step has been logged yet.
    """
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        raise DataError(f"{path} does not exist: wanted the folder of a run")
    rows = read_run_rows(path)
    if not rows.numbers:
        raise DataError(f"{path} holds no logged step yet: wanted a run that has come so far")
    return RunHistory(
        run_dir=run_dir,
        **vars(rows),
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
    line += f"accuracy {number(last.get('mlm_masked_accuracy')):.3f}, {_targets(last, 'masked')} targets"
    if math.isfinite(history.unigram):
        below = below_unigram(history)
        side = "below" if below < 0 else "above"
        line += f"; piece frequencies alone {history.unigram:.3f} nats, {abs(below):.3f} {side} the model"
    others = [
        f"at {text}: loss {number(last.get(f'loss_mlm_{kind}')):.3f}, "
        f"accuracy {number(last.get(f'mlm_{kind}_accuracy')):.3f}, {_targets(last, kind)} targets"
        for kind, text in (("random", "random pieces"), ("kept", "kept pieces"))
    ]
    found = [] if last.get("loss_replaced") is None else [_detector_line(last)]
    return [line, "; ".join(others), *found]


def _detector_line(last: Row) -> str:
    line = f"replaced tokens: loss {number(last['loss_replaced']):.3f} nats, "
    line += f"accuracy {number(last.get('replaced_accuracy')):.3f} over all tokens, "
    return line + f"{number(last.get('replaced_found')):.3f} of the replaced ones found"


def _targets(last: Row, kind: str) -> str:
    return f"{number(last.get(f'mlm_{kind}_targets', 0)):,.0f}"


def below_unigram(history: RunHistory) -> float:
    """Return how far the last validation loss at [MASK] is below the cross-entropy of piece frequencies, in nats.

    Raises:
        DataError: the run has not come so far, or an earlier version wrote no loss at [MASK].
    """
    if history.evaluations and AT_MASK not in history.evaluations[-1]:
        raise DataError(
            f"{history.run_dir}/metrics.jsonl: the last evaluation has the mean over 80/10/10 of an earlier version, "
            f"wanted {AT_MASK}. The run is sound: pretrain.py --resume auto evaluates its newest checkpoint again, "
            f"also where it is finished (make pretrain: without {history.run_dir}/DONE); score.py --task masked_words "
            "measures its export"
        )
    if not history.evaluations or not math.isfinite(history.unigram):
        raise DataError(f"{history.run_dir} holds no evaluation of masked words yet: wanted a run that has come so far")
    return history.unigram - number(history.evaluations[-1][AT_MASK])


def section(row: Row, name: str) -> Row:
    """Return an object inside a row, empty where there is none."""
    value = row.get(name)
    return value if isinstance(value, dict) else {}


def _band(spreads: Iterable[Row]) -> Band:
    rows = [[number(spread.get(name)) for name in ("min", "median", "max")] for spread in spreads]
    return Band(*(list(column) for column in zip(*rows, strict=True)))


def _median(values: Sequence[float]) -> float:
    known = sorted(value for value in values if math.isfinite(value))
    return known[len(known) // 2] if known else math.nan


def _read_json(path: Path) -> Row:
    if not path.exists():
        return {}
    value = input_gate.read_json(path, error=DataError)
    if not isinstance(value, dict):
        raise DataError(f"{path}: found {describe(value)}, wanted an object")
    return value
