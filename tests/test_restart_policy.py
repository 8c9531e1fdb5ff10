"""What a job does after a launch, fact by fact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bert_ds.basics.exit_record import ExitRecord, read_exits, record_exit
from bert_ds.training.launch.restart_policy import LaunchEnd, Progress, Verdict, judge

ROOT = Path(__file__).resolve().parents[1]
SAVED = ExitRecord(75, "")
PROGRESS = Progress("17", best_step=40, without_progress=0, launches=3)


def verdict(progress: Progress = PROGRESS, limit: int = 3, **facts: Any) -> Verdict:
    """What is decided about a launch of two ranks that left a checkpoint of step 60, with these facts changed."""
    end: dict[str, Any] = {"exits": {}, "world_size": 2, "srun_code": 137, "newest_step": 60, "is_done": False}
    return judge(LaunchEnd(**{**end, **facts}), progress, limit=limit)[0]


def test_the_marker_ends_the_job_well_whatever_srun_answers() -> None:
    assert verdict(is_done=True, srun_code=137)[:2] == verdict(is_done=True, stop="USR1")[:2] == ("done", 0)


def test_a_run_that_has_saved_nothing_is_never_said_to_have_saved() -> None:
    for facts in ({"stop": "TERM"}, {"stop": "USR1"}, {"exits": {0: SAVED, 1: SAVED}}):
        sentence = verdict(newest_step=0, **facts).sentence
        assert "no checkpoint yet" in sentence and "saved" not in sentence
        assert "saved at step 60" in verdict(**facts).sentence


def test_exit_code_0_without_the_marker_is_not_success() -> None:
    found = verdict(srun_code=0, exits={0: ExitRecord(0, ""), 1: ExitRecord(0, "")})
    assert found.action == "again"
    assert found.sentence.startswith("the ranks ended although the run is not done")


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_an_error_that_would_come_back_ends_the_job_with_its_code_and_text(code: int) -> None:
    found = verdict(exits={1: ExitRecord(code, "shards/a.tokens is damaged")}, stop="USR1", nodes_answer=False)
    assert found[:2] == ("stop", code)
    assert found.sentence.endswith("rank 1: shards/a.tokens is damaged")


def test_a_permanent_code_of_srun_counts_only_where_no_rank_says_otherwise() -> None:
    assert verdict(srun_code=2)[:2] == ("stop", 2)
    assert verdict(srun_code=2, exits={0: SAVED}).action == "again"


def test_a_dead_rank_is_launched_again_at_once() -> None:
    found = verdict(exits={0: ExitRecord(1, "RuntimeError: Connection closed by peer")})
    assert (found.action, found.delay_s) == ("again", 0)
    assert found.sentence == (
        "rank 0 ended with exit code 1 (RuntimeError: Connection closed by peer); launching again from step 60"
    )
    assert verdict(exits={0: SAVED}).sentence.startswith("rank 1 ended without a word (srun: 137)")


def test_the_rank_that_srun_names_first_is_the_reason_where_none_of_them_has_left_a_word() -> None:
    said = "srun: launch/slurm: noise\nsrun: error: node2: task 1: Exited with exit code 127\n"
    said += "srun: error: node1: task 0: Killed\n"
    found = verdict(srun_said=said)
    assert found.sentence.startswith(
        "rank 1 on node2 ended without a word (srun: Exited with exit code 127); launching"
    )
    start = ExitRecord(75, "rank 1 on node2 (process 7) died before all ranks had met")
    assert verdict(srun_said=said, exits={0: start}).sentence.startswith("rank 1 on node2 (process 7) died before")


def test_a_hang_is_the_reason_whatever_else_the_ranks_say_and_is_no_wish_to_stop() -> None:
    hang = ExitRecord(75, "hang: rank 1 does not answer")
    for exits in ({0: hang}, {0: hang, 1: SAVED}, {0: ExitRecord(1, "Connection closed by peer"), 1: hang}):
        found = verdict(exits=exits)
        assert (found.action, found.sentence) == ("again", f"{hang.message}; launching again from step 60")


def test_a_node_that_does_not_answer_sends_the_job_back_to_the_queue() -> None:
    assert verdict(nodes_answer=False).action == "requeue"


def test_when_the_time_is_up_the_job_is_queued_again() -> None:
    assert verdict(stop="USR1", exits={0: SAVED, 1: SAVED})[:2] == ("requeue", 75)


def test_ranks_that_were_all_asked_to_stop_are_queued_again() -> None:
    assert verdict(exits={0: SAVED, 1: SAVED}).action == "requeue"


def test_a_job_that_slurm_ends_is_left_to_slurm() -> None:
    assert verdict(stop="TERM", exits={0: SAVED, 1: SAVED})[:2] == ("stop", 75)


def test_launches_without_a_newer_checkpoint_are_bounded_and_wait_longer_each_time() -> None:
    progress, seen = Progress("17"), []
    for newest in (20, 20, 20, 40, 40, 40, 40):
        end = LaunchEnd({}, world_size=2, srun_code=137, newest_step=newest, is_done=False)
        found, progress = judge(end, progress, limit=3)
        seen.append((found.action, found.delay_s))
    assert seen == [("again", 0), ("again", 0), ("again", 10), ("again", 0), ("again", 0), ("again", 10), ("stop", 0)]
    assert found.exit_code == 1
    assert found.sentence == (
        "stopped: 3 launches in a row left no checkpoint newer than step 40; the last one: all ranks ended without a "
        "word (srun: 137)"
    )


def test_the_bound_holds_through_time_limits_that_are_too_short_for_one_checkpoint() -> None:
    assert verdict(Progress("17", 60, 2, 5), stop="USR1", exits={0: SAVED, 1: SAVED})[:2] == ("stop", 1)


def test_progress_is_kept_through_a_requeue_and_forgotten_by_another_job(tmp_path: Path) -> None:
    path = tmp_path / "restarts.json"
    path.write_text(json.dumps(Progress("17", 40, 2, 9)._asdict()))
    assert Progress.load(path, "17") == Progress("17", 40, 2, 9)
    assert Progress.load(path, "18") == Progress("18")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"job": "17"}', '{"job": "17", "best_step": "a"}', "null", "\x00"])
def test_a_damaged_memory_is_a_fresh_start(tmp_path: Path, text: str) -> None:
    path = tmp_path / "restarts.json"
    path.write_text(text)
    assert Progress.load(path, "17") == Progress("17")


def test_a_rank_records_how_it_ended_only_where_a_job_script_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    record_exit(5, "nan")
    monkeypatch.setenv("BERT_DS_EXITS", str(tmp_path))
    monkeypatch.setenv("SLURM_PROCID", "3")
    record_exit(5, "the loss is nan")
    monkeypatch.setenv("RANK", "1")
    record_exit(75)
    assert read_exits(tmp_path) == {1: ExitRecord(75, ""), 3: ExitRecord(5, "the loss is nan")}


def test_the_verb_prints_one_line_for_the_script_and_one_sentence_for_the_log(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/global_step60").mkdir(parents=True)
    (tmp_path / "DONE").write_text("{}")
    os.utime(tmp_path / "DONE", (1, 1))
    exits = tmp_path / "logs/exits"
    exits.mkdir(parents=True)
    (exits / "started").write_text("")
    (exits / "rank_0.json").write_text('{"code": 1, "message": "OSError: no route"}')
    script = ROOT / "bert_ds/judge_launch.py"
    command = [sys.executable, script, "--run_dir", tmp_path, "--job", 17, "--world_size", 2, "--srun_code", 143]
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert found.stdout == "again 75 0\n", "a marker that is older than the launch says nothing about it"
    assert found.stderr == ("job 17: rank 0 ended with exit code 1 (OSError: no route); launching again from step 60\n")
    assert Progress.load(tmp_path / "restarts.json", "17") == Progress("17", 60, 0, 1)
    silent = [*map(str, command), "--nodes_answer", "no"]
    assert subprocess.run(silent, capture_output=True, text=True, timeout=60).stdout == "requeue 75 0\n"
