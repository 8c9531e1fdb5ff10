"""metrics.jsonl, step lines and the facts of the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bert_ds.basics.ranks import Ranks
from bert_ds.reporting.environment import write_environment
from bert_ds.reporting.run_log import RunLog, read_metrics, repair_metrics, step_line

MAIN = Ranks(0, 0, 2)


def write_rows(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(step: int, attempt: int) -> dict[str, Any]:
    return {"kind": "train", "step": step, "attempt": attempt}


def test_rows_carry_kind_step_and_attempt(tmp_path: Path) -> None:
    log = RunLog(tmp_path, MAIN, total_steps=10)
    log.row("evaluation", 5, {"loss": 1.5})
    log.close()
    [row] = read_metrics(tmp_path / "metrics.jsonl", "evaluation")
    assert (row["kind"], row["step"], row["attempt"], row["loss"]) == ("evaluation", 5, 1, 1.5)


def test_every_opening_is_a_new_attempt(tmp_path: Path) -> None:
    for attempt in (1, 2, 3):
        log = RunLog(tmp_path, MAIN, total_steps=10)
        log.start(0, {})
        log.row("start", 0, {"rolled_back_from": 2})
        assert log.attempt == attempt
        log.close()


def test_only_rank_0_writes_metrics_and_every_rank_has_its_own_log(tmp_path: Path) -> None:
    log = RunLog(tmp_path, Ranks(1, 1, 2), total_steps=10)
    log.row("train", 1, {})
    log.info("hello")
    log.close()
    assert not (tmp_path / "metrics.jsonl").exists()
    assert "hello" in (tmp_path / "logs/rank_1.log").read_text()


def test_the_newest_row_of_a_step_is_kept(tmp_path: Path) -> None:
    path = write_rows(tmp_path, train(1, 1), train(2, 1), train(2, 2), train(3, 2))
    assert [(row["step"], row["attempt"]) for row in read_metrics(path)] == [(1, 1), (2, 2), (3, 2)]


def test_what_an_earlier_attempt_wrote_beyond_the_resumed_step_is_superseded(tmp_path: Path) -> None:
    start = {"kind": "start", "step": 2, "attempt": 2}
    path = write_rows(tmp_path, train(1, 1), train(2, 1), train(3, 1), train(4, 1), start, train(3, 2))
    assert [(row["step"], row["attempt"]) for row in read_metrics(path)] == [(1, 1), (2, 1), (3, 2)]


def test_a_torn_last_line_is_ignored_by_readers(tmp_path: Path) -> None:
    path = write_rows(tmp_path, train(1, 1))
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert [row["step"] for row in read_metrics(path)] == [1]


def test_a_torn_last_line_is_cut_when_a_run_continues(tmp_path: Path) -> None:
    path = write_rows(tmp_path, train(1, 1))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "train", "st')
    repair_metrics(path)
    assert path.read_bytes() == whole


def test_a_file_of_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind')
    repair_metrics(path)
    assert path.read_bytes() == b""


def test_a_number_that_is_not_finite_becomes_null(tmp_path: Path) -> None:
    log = RunLog(tmp_path, MAIN, total_steps=10)
    log.row("train", 1, {"loss": float("nan"), "parts": {"a": float("inf")}})
    log.close()
    [row] = read_metrics(tmp_path / "metrics.jsonl")
    assert (row["loss"], row["parts"]) == (None, {"a": None})


def test_the_step_line_leaves_out_what_is_unknown() -> None:
    values = {"loss": 7.25, "loss_mlm": 6.5, "loss_pair": 0.75, "lr": 1e-4, "mfu": None, "tokens_per_s": 12345.0}
    assert step_line(5, 100, values=values) == (
        "step 5/100  loss 7.2500 (mlm 6.5000  pair 0.7500)  lr 0.0001  12,345 tokens/s"
    )


def test_without_a_terminal_there_are_plain_lines_and_no_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path, MAIN, total_steps=10)
    log.start(0, {})
    log.train_row(1, {"loss": 2.0})
    log.close()
    assert capsys.readouterr().out == "step 1/10  loss 2.0000\n"


def test_a_bar_on_a_terminal_leaves_the_lines_readable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    log = RunLog(tmp_path, MAIN, total_steps=10)
    log.start(0, {})
    log.train_row(1, {"loss": 2.0})
    log.close()
    assert "step 1/10  loss 2.0000" in capsys.readouterr().out


def test_the_environment_file_names_versions_and_holds_no_foreign_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-1")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    write_environment(tmp_path, MAIN, devices=["cpu"])
    text = (tmp_path / "environment.json").read_text()
    facts = json.loads(text)
    assert facts["versions"]["deepspeed"] == "0.19.8"
    assert facts["variables"]["SLURM_JOB_ID"] == "77"
    assert "canary-1" not in text


def test_a_step_and_a_save_that_deepspeeds_launcher_would_cut_are_told_once_both_are_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path, MAIN, total_steps=100)
    log.start(0, {})
    log.train_row(1, {"loss": 1.0, "seconds": 500.0})  # kernels compile
    log.checkpoint_row(1, stall_s=2.0, background_s=19.0, num_bytes=9)
    log.train_row(11, {"loss": 1.0, "seconds": 80.0})
    log.checkpoint_row(11, stall_s=1.0, background_s=1.0, num_bytes=9)
    assert "warning" not in capsys.readouterr().out
    log.checkpoint_row(12, stall_s=2.0, background_s=21.0, num_bytes=9)
    log.train_row(21, {"loss": 1.0, "seconds": 80.0})
    log.checkpoint_row(21, stall_s=2.0, background_s=21.0, num_bytes=9)
    log.close()
    told = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert told == [
        "warning: a step (8 s) and a save (23 s) together take longer than the 30 s that the deepspeed launcher waits "
        "after SIGTERM or Ctrl-C before it kills: bert-ds and Slurm wait for the save"
    ]
    [row, *_] = read_metrics(tmp_path / "metrics.jsonl", "checkpoint")
    assert (row["seconds"], row["background_s"], row["bytes"]) == (2.0, 19.0, 9)
