"""Which batch a step that is replayed was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bert_ds.training.loop.bad_steps import trouble_folder
from bert_ds.training.loop.replay import _batch_of

START = {"kind": "start", "step": 0}
WENT_BACK = {"kind": "start", "step": 6, "rolled_back_from": 9, "passed_over": 3}
RESUMED = {"kind": "start", "step": 6}


def written(run_dir: Path, *rows: dict[str, object]) -> Path:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return run_dir


@pytest.mark.parametrize(("step", "batch"), [(6, None), (7, 10), (8, 11)])
def test_a_step_after_going_back_is_replayed_on_the_batch_it_was_trained_on(
    tmp_path: Path, step: int, batch: int | None
) -> None:
    assert _batch_of(written(tmp_path, START, WENT_BACK), step) == batch


def test_a_launch_that_continues_a_checkpoint_from_before_goes_by_that_checkpoint(tmp_path: Path) -> None:
    assert _batch_of(written(tmp_path, START, WENT_BACK, RESUMED), 8) is None


def test_the_report_of_a_bad_step_says_its_batch(tmp_path: Path) -> None:
    report = trouble_folder(written(tmp_path, START, WENT_BACK), 8) / "rank_0.json"
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps({"batch": 14}), encoding="utf-8")
    assert _batch_of(tmp_path, 8) == 14
