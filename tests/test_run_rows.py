"""A metrics file read in one pass: what later attempts superseded, odd rows, memory that does not follow the rows."""

from __future__ import annotations

import json
import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bert_ds.basics.ranks import DataError
from bert_ds.reporting import run_rows
from bert_ds.reporting.run_figures import _line, draw_figures
from bert_ds.reporting.run_history import read_history
from bert_ds.reporting.run_log import read_metrics
from bert_ds.reporting.run_page import render_page
from bert_ds.reporting.run_rows import read_run_rows


def row(kind: str, step: int, **values: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, "attempt": 1, "time": float(step), **values}


def written(folder: Path, rows: list[Any]) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))
    return path


def test_rows_count_as_the_short_way_of_reading_has_them(tmp_path: Path) -> None:
    rows: list[Any] = [row("start", 0)]
    for turn in range(30):
        rows += [
            row("train", step, loss=float(turn), extra=step if step % 2 else None) for step in range(turn, turn + 9)
        ]
        rows += [row("evaluation", turn + 5, loss=float(turn)), row("skipped", turn + 7), "{torn", "[" * 9000, "7"]
        rows += [row("start", turn + 4)] if turn % 3 else [row("train", turn // 2, loss=-1.0)]
        rows += [row("start", 6)] * (turn == 10)  # before the one that was there already
    path = written(tmp_path, rows)
    found, wanted = read_run_rows(path), read_metrics(path)
    assert list(found.numbers) == [one["step"] for one in wanted]
    assert list(found.columns["loss"]) == [one["loss"] for one in wanted]
    extra = [math.nan if one.get("extra") is None else one["extra"] for one in wanted]
    assert np.array_equal(found.columns["extra"], extra, equal_nan=True)
    assert list(found.whole) == wanted
    assert list(found.evaluations) == read_metrics(path, "evaluation")
    assert list(found.skipped) == read_metrics(path, "skipped")
    assert len(found.attempts) == 22


def test_what_is_kept_does_not_follow_the_number_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, limit in (("MAX_EVENTS", 50), ("MAX_WHOLE_ROWS", 32)):
        monkeypatch.setattr(run_rows, name, limit)
    trust = {f"kind{index}": {"trust_ratio": {"min": 1, "median": 2, "max": 3}} for index in range(20)}
    number = 4_000
    lines = [json.dumps(row("train", step, loss=1.0, trust=trust)) for step in range(number)]
    path = written(tmp_path, [*lines, *(row("skipped", step) for step in range(number))])
    tracemalloc.start()
    found = read_run_rows(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000 < sum(map(len, lines))
    assert len(found.numbers) == number and 32 <= len(found.whole) <= 65 and len(found.skipped) <= 100
    assert len(set(np.diff([one["step"] for one in found.whole[:-1]]))) == 1, "evenly spread"
    assert (found.whole[0]["step"], found.whole[-1]["step"], found.skipped[-1]["step"]) == (0, number - 1, number - 1)


@pytest.mark.parametrize(
    "odd", [{"step": 1.5}, {"step": None}, {"step": -1}, {"step": 10**30}, {"time": None}, {"time": "noon"}]
)
def test_a_row_without_step_or_time_is_named_by_its_line(tmp_path: Path, odd: dict[str, Any]) -> None:
    path = written(tmp_path, [row("start", 0), {**row("train", 1), **odd}])
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: wanted a row with a whole step and a time"):
        read_run_rows(path)


def test_a_file_that_is_no_log_is_refused_at_once(tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: a line of more than 1048576 bytes"):
        read_history(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        read_history(tmp_path)


def test_rows_of_wrong_types_are_drawn_as_gaps(tmp_path: Path) -> None:
    odd = {"trust": [1], "loss_x": 1.0, "tokens_per_s": "fast", "grad_norm": 10**400, "lr": {"a": 1}, "mfu": True}
    rows = [
        {**row("start", 0), "data": 3, "plan": []},
        row("train", 1, **odd),
        row("train", 2, trust={"k": 3, "$k_{$": {"trust_ratio": {"min": 2}}}),
    ]
    rows += [
        row("checkpoint", 2, bytes="many"),
        row("evaluation", 2, loss_mlm="x"),
        {**row("skipped", 2), "time": 1e200},
    ]
    written(tmp_path, rows)
    (tmp_path / "run_config.json").write_text('{"training": [], "name": 7}')
    (tmp_path / "environment.json").write_text('{"versions": 1}')
    history = read_history(tmp_path)
    assert "step skipped" in render_page(history, draw_figures(history))
    (tmp_path / "environment.json").write_text("[]")
    with pytest.raises(DataError, match=r"environment\.json: found an empty list, wanted an object"):
        read_history(tmp_path)


def test_a_line_of_many_points_keeps_its_spikes() -> None:
    drawn: dict[str, Any] = {}

    class Axis:
        def plot(self, x: Any, y: Any) -> None:
            drawn.update(x=x, y=y)

    values = np.sin(np.arange(100_001) / 1e4)
    values[[777, 90_001]], values[5] = (50.0, -50.0), math.nan
    _line(Axis(), range(100_001), values)
    assert len(drawn["x"]) <= 4_002 and (np.diff(drawn["x"]) >= 0).all()
    assert dict(zip(drawn["x"], drawn["y"], strict=True))[777] == 50.0 == -drawn["y"].min()
