"""The table of runs: each state from the files that a run leaves, and the three ways to print it."""

from __future__ import annotations

import fcntl
import io
import json
import os
import platform
import select
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bert_ds.basics.slurm_queue import QueuedJob, parse_queue
from bert_ds.reporting.run_overview import TAIL_BYTES, RunOverview, find_runs, read_overview
from bert_ds.reporting.run_pulse import LOCK, RENEWED_EVERY_S

ROOT = Path(__file__).resolve().parents[1]
NOW = 1_000_000.0
RUNNING = {"17": QueuedJob("RUNNING", "None", "N/A")}
PENDING = {"17": QueuedJob("PENDING", "BeginTime", "N/A")}


def rows(last_step: int, *, attempt: int = 1, start: int = 0, age_s: float = 10.0) -> list[dict[str, Any]]:
    """An attempt's rows up to a step, ending age_s ago."""
    found: list[dict[str, Any]] = [{"kind": "start", "step": start, "attempt": attempt, "time": NOW - age_s - 50}]
    for step in range(start + 1, last_step + 1):
        facts = {"loss": 9.0 - step / 100, "tokens_per_s": 1000.0 + step, "eta_s": 60.0, "seconds": 1.0}
        found.append({"kind": "train", "step": step, "attempt": attempt, "time": NOW - age_s, **facts})
    return found


def make_run(folder: Path, *, metrics: list[dict[str, Any]], job: str | None = None, **files: Any) -> Path:
    """A run folder of 100 steps in which a job may have run, with JSON files of these names."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "run_config.json").write_text(json.dumps({"training": {"total_steps": 100}}))
    if job is not None:
        (folder / "slurm_job").write_text(f"{job}\n")
    for name, content in files.items():
        path = folder / {"done": "DONE", "restarts": "restarts.json", "submit": "submit.json"}[name]
        path.write_text(json.dumps(content))
    return folder


def record_end(run_dir: Path, code: int, message: str, rank: int = 0) -> None:
    """What a rank leaves when it ends."""
    (run_dir / "logs/exits").mkdir(parents=True, exist_ok=True)
    (run_dir / f"logs/exits/rank_{rank}.json").write_text(json.dumps({"code": code, "message": message}))


def overview(run_dir: Path, queue: dict[str, QueuedJob] | None = None) -> RunOverview:
    return read_overview(run_dir, queue=queue, now=NOW)


def test_a_running_job_shows_its_newest_step_loss_speed_and_time_left(tmp_path: Path) -> None:
    found = overview(make_run(tmp_path / "a", metrics=rows(40), job="17"), RUNNING)
    assert found == RunOverview(
        run_dir=str(tmp_path / "a"),
        state="running",
        step=40,
        total_steps=100,
        loss=8.6,
        masked_loss=None,
        tokens_per_s=1040.0,
        eta_s=60.0,
        attempts=1,
        job="17",
        job_state="RUNNING",
        updated=NOW - 10.0,
        note="",
    )


def test_a_running_job_without_news_says_so(tmp_path: Path) -> None:
    found = overview(make_run(tmp_path / "a", metrics=rows(40, age_s=3600), job="17"), RUNNING)
    assert (found.state, found.note) == ("running", "no row for 60 min")


def test_a_job_that_was_queued_again_waits_and_says_why(tmp_path: Path) -> None:
    restarts = {"action": "requeue", "exit_code": 75, "reason": "the time is nearly up, saved at step 40"}
    run_dir = make_run(tmp_path / "a", metrics=rows(40, age_s=500), job="17", restarts=restarts)
    found = overview(run_dir, PENDING)
    assert (found.state, found.note) == ("waiting", "the time is nearly up, saved at step 40; Slurm: BeginTime")
    assert overview(run_dir).state == "waiting", "without squeue the folder says the same"


def test_a_submitted_job_that_has_not_started_waits(tmp_path: Path) -> None:
    run_dir = tmp_path / "a"
    run_dir.mkdir()
    (run_dir / "submit.json").write_text('{"job": "17"}')
    found = overview(run_dir, PENDING)
    assert (found.state, found.step, found.total_steps, found.job) == ("waiting", 0, None, "17")


def test_a_finished_run_is_done_and_one_that_is_continued_is_running(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "a", metrics=rows(100, age_s=9999), job="17", done={"step": 100})
    assert (overview(run_dir, {}).state, overview(run_dir, {}).eta_s) == ("done", None)
    assert overview(run_dir, RUNNING).state == "running"


@pytest.mark.parametrize(
    ("code", "state"), [(2, "failed"), (3, "failed"), (4, "failed"), (1, "failed"), (5, "diverged")]
)
def test_a_rank_s_error_ends_a_run_with_its_first_line_as_the_note(tmp_path: Path, code: int, state: str) -> None:
    run_dir = make_run(tmp_path / "a", metrics=rows(40), job="17")
    record_end(run_dir, code, "10 steps in a row\nmore", rank=3)
    found = overview(run_dir, {})
    assert (found.state, found.note) == (state, "rank 3: 10 steps in a row")


def test_a_job_that_gave_up_is_failed_and_a_cancelled_one_stopped(tmp_path: Path) -> None:
    gave_up = {"action": "stop", "exit_code": 1, "reason": "3 launches in a row left no checkpoint"}
    found = overview(make_run(tmp_path / "a", metrics=rows(40), job="17", restarts=gave_up), {})
    assert (found.state, found.note) == ("failed", "3 launches in a row left no checkpoint")
    cancelled = {"action": "stop", "exit_code": 75, "reason": "ended by Slurm, saved at step 40"}
    assert overview(make_run(tmp_path / "b", metrics=rows(40), job="17", restarts=cancelled), {}).state == "stopped"


def test_a_job_that_slurm_does_not_know_and_that_said_nothing_is_dead(tmp_path: Path) -> None:
    assert overview(make_run(tmp_path / "a", metrics=rows(40), job="17"), {}).state == "dead"


def test_without_slurm_a_run_is_dead_after_a_while_and_running_before(tmp_path: Path) -> None:
    assert overview(make_run(tmp_path / "a", metrics=rows(40, age_s=100))).state == "running"
    dead = overview(make_run(tmp_path / "b", metrics=rows(40, age_s=130)))
    assert (dead.state, dead.eta_s) == ("dead", None)
    slow = [{**row, "seconds": 30.0} for row in rows(40, age_s=290)]
    assert overview(make_run(tmp_path / "c", metrics=slow)).state == "running"


def test_without_slurm_a_run_that_was_asked_to_stop_is_stopped(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "a", metrics=rows(40, age_s=5000))
    (run_dir / "logs").mkdir()
    (run_dir / "logs/rank_0.log").write_text("INFO asked to stop (SIGTERM), saving at step 40\nINFO saved\n")
    assert (overview(run_dir).state, overview(run_dir).note) == ("stopped", "--resume auto continues it")


def lock(run_dir: Path, *, host: str, age_s: float) -> None:
    (run_dir / LOCK).write_text(json.dumps({"host": host, "pid": 7}))
    os.utime(run_dir / LOCK, (NOW - age_s, NOW - age_s))


def test_a_held_lock_is_a_running_run_and_a_free_one_is_not_at_once(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "a", metrics=rows(40, age_s=0.5), done={"step": 40})
    lock(run_dir, host=platform.node(), age_s=5)
    with (run_dir / LOCK).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert overview(run_dir).state == "running"
    assert overview(run_dir).state == "done"
    (run_dir / "DONE").unlink()
    assert (overview(run_dir).state, overview(run_dir).note) == ("dead", "no sign of life; --resume auto continues it")
    (run_dir / "logs").mkdir()
    (run_dir / "logs/rank_0.log").write_text(
        "INFO step 40/100  loss 8\nINFO asked to stop (SIGTERM), saving\nINFO saved\n"
    )
    assert overview(run_dir).state == "stopped"


def test_where_machines_share_no_lock_a_run_is_running_while_its_lock_is_renewed(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "a", metrics=rows(40, age_s=0.5))
    lock(run_dir, host="another-node", age_s=9)
    assert overview(run_dir).state == "running"
    lock(run_dir, host="another-node", age_s=10.5)
    assert overview(run_dir).state == "dead"
    assert 3 * RENEWED_EVERY_S < 10


def test_looking_leaves_the_lock_to_whoever_starts_next(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "a", metrics=rows(40))
    lock(run_dir, host=platform.node(), age_s=5)
    before = (run_dir / LOCK).stat().st_mtime
    overview(run_dir)
    with (run_dir / LOCK).open() as free:
        fcntl.flock(free, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert (run_dir / LOCK).stat().st_mtime == before


def test_a_run_that_went_on_after_a_stop_and_one_that_could_not_save_are_dead(tmp_path: Path) -> None:
    asked = "INFO asked to stop (SIGTERM), saving at step 40\n"
    for name, after in (
        ("a", "INFO step 41/100  loss 8.6\n"),
        ("b", "WARNING checkpoint was not written: disk full\n"),
    ):
        run_dir = make_run(tmp_path / name, metrics=rows(40, age_s=5000))
        (run_dir / "logs").mkdir()
        (run_dir / "logs/rank_0.log").write_text(asked + after)
        assert overview(run_dir).state == "dead"
    assert "disk full" in overview(run_dir).note


def damaged(folder: Path) -> list[Path]:
    """Run folders with what no run writes."""
    made = [make_run(folder / f"broken_{index}", metrics=rows(4)) for index in range(7)]
    (made[0] / "metrics.jsonl").write_text('{"kind": "train", "step": "four", "time": 1}\n')
    (made[1] / "metrics.jsonl").write_text('{"kind": "train", "step": 4, "loss": [1], "time": 1}\n')
    (made[2] / "metrics.jsonl").write_text('{"kind": "train", "step": 4, "time": "noon"}\n')
    (made[3] / "run_config.json").write_text("[" * 100_000)
    for path, name in ((made[4], "metrics.jsonl"), (made[5], "restarts.json"), (made[6], LOCK)):
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)
    return made


def test_a_broken_run_folder_is_a_row_that_says_so_and_the_others_are_shown(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    damaged(folder)
    make_run(folder / "whole", metrics=rows(100), done={"step": 100})
    os.mkdir(os.fsencode(folder) + b"/bro\xffken")
    (folder / "bro\udcffken/slurm_job").write_text("17")
    shown = runs(folder)
    assert (shown.returncode, shown.stderr) == (0, "")
    states = {line.split()[0].rpartition("/")[2]: line for line in shown.stdout.splitlines()[1:]}
    assert [name for name, line in states.items() if "unreadable" in line] == [f"broken_{index}" for index in range(3)]
    assert 'metrics.jsonl: step: found "four", wanted a number' in states["broken_0"]
    assert "done" in states["whole"] and "bro\\udcffken" in states
    assert len(states) == 9


def test_a_folder_that_may_not_be_listed_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "runs/a", metrics=rows(4))
    make_run(tmp_path / "runs/b", metrics=rows(100), done={"step": 100})
    whole = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("runs/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may list everything
    assert [overview(path).state for path in find_runs(tmp_path)] == ["unreadable", "done"]


def test_the_length_of_a_fine_tuning_is_read_from_its_log(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "a", metrics=rows(40), job="17")
    (run_dir / "run_config.json").unlink()
    (run_dir / "logs").mkdir()
    (run_dir / "logs/rank_0.log").write_text("INFO step 39/250  loss 0.5\nINFO step 40/250  loss 0.4  lr 1e-05\n")
    assert overview(run_dir, RUNNING).total_steps == 250


def test_what_a_later_attempt_took_back_does_not_count(tmp_path: Path) -> None:
    metrics = [*rows(40), *rows(23, attempt=2, start=20)]
    found = overview(make_run(tmp_path / "a", metrics=metrics, job="17"), RUNNING)
    assert (found.step, found.loss, found.attempts) == (23, 8.77, 2)
    fresh = overview(make_run(tmp_path / "b", metrics=[*rows(40), *rows(20, attempt=2, start=20)], job="17"), RUNNING)
    assert (fresh.step, fresh.loss) == (20, None)


def test_a_torn_line_and_a_foreign_file_are_passed_over(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "a", metrics=rows(40), job="17")
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'\x00\xff\n[1]\n"x"\n{"kind": "train", "ste')
    (run_dir / "restarts.json").write_text("[")
    assert overview(run_dir, RUNNING).step == 40


def test_of_a_long_run_only_the_tail_is_read(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "a", metrics=rows(40), job="17")
    path = run_dir / "metrics.jsonl"
    whole = path.read_bytes()
    with path.open("wb") as file:
        file.truncate(10**10)
        file.seek(10**10)
        file.write(b"\n" + whole)
    assert len(whole) < TAIL_BYTES < 10**10
    assert overview(run_dir, RUNNING).step == 40


def test_control_characters_of_a_message_do_not_reach_the_terminal(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "a", metrics=rows(4), job="17")
    record_end(run_dir, 3, "a\x1b[2Jb")
    assert overview(run_dir, {}).note == "rank 0: a\\x1b[2Jb"


def test_runs_are_found_below_folders_and_what_is_inside_a_run_is_not_one(tmp_path: Path) -> None:
    for name in ("a", "team/b", "team/b/seed_1"):
        make_run(tmp_path / name, metrics=[])
    make_run(tmp_path / "a/checkpoints/global_step1", metrics=[])
    os.symlink(tmp_path, tmp_path / "team/loop")
    assert [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)] == ["a", "team/b", "team/b/seed_1"]
    assert list(find_runs(tmp_path / "a")) == [tmp_path / "a"]


def test_the_queue_is_read_by_number() -> None:
    text = "17|RUNNING|None|2026-11-25T15:47:45\n18|PENDING|Dependency|N/A\nslurm_load_jobs error\n"
    assert parse_queue(text) == {
        "17": QueuedJob("RUNNING", "None", "2026-11-25T15:47:45"),
        "18": QueuedJob("PENDING", "Dependency", "N/A"),
    }


def runs(folder: Path, *arguments: object, queue: str = "") -> subprocess.CompletedProcess[str]:
    """Run the verb where squeue prints this queue."""
    programs = folder.parent / "bin"
    programs.mkdir(exist_ok=True)
    squeue = programs / "squeue"
    squeue.write_text(f"#!/bin/sh\nprintf '%s' '{queue}'\n")
    squeue.chmod(squeue.stat().st_mode | stat.S_IXUSR)
    command = [sys.executable, ROOT / "bert_ds/runs.py", folder, *arguments]
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=60)


def test_the_validation_loss_is_that_at_mask_and_none_of_a_step_that_was_taken_back(tmp_path: Path) -> None:
    evaluations = [
        {"kind": "evaluation", "step": step, "attempt": 1, "time": NOW, "loss_mlm": 1.0, "loss_mlm_masked": loss}
        for step, loss in ((20, 5.25), (40, 4.5))
    ]
    metrics = [*rows(40), *evaluations]
    assert overview(make_run(tmp_path / "a", metrics=metrics)).masked_loss == 4.5
    assert "4.5000" in runs(tmp_path / "a").stdout
    again = make_run(tmp_path / "b", metrics=[*metrics, *rows(23, attempt=2, start=20)])
    assert overview(again).masked_loss == 5.25


def test_piped_the_table_is_plain_text_with_what_is_under_way_first(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/a", metrics=rows(100), done={"step": 100})
    make_run(tmp_path / "runs/b", metrics=rows(40), job="17")
    make_run(tmp_path / "runs/older", metrics=rows(100, age_s=500), done={"step": 100})
    make_run(tmp_path / "runs/0", metrics=rows(100, age_s=900), done={"step": 100})
    found = runs(tmp_path / "runs", queue="17|RUNNING|None|N/A\n")
    lines = found.stdout.splitlines()
    assert " ".join(lines[0].split()) == "run state step loss masked tokens/s ETA starts job updated note"
    assert [line.split()[:3] for line in lines[1:]] == [
        [f"{tmp_path}/runs/b", "running", "40/100"],
        [f"{tmp_path}/runs/a", "done", "100/100"],
        [f"{tmp_path}/runs/older", "done", "100/100"],
        [f"{tmp_path}/runs/0", "done", "100/100"],
    ]
    assert "17 running" in lines[1]
    assert "\x1b" not in found.stdout


def test_json_holds_every_field(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/a", metrics=rows(100), done={"step": 100})
    (found,) = json.loads(runs(tmp_path / "runs", "--json").stdout)
    assert set(found) == set(RunOverview._fields)
    assert (found["state"], found["step"]) == ("done", 100)


def test_a_folder_that_is_not_there_is_one_line_with_exit_code_2(tmp_path: Path) -> None:
    refused = runs(tmp_path / "nowhere")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"runs.py: error: {tmp_path}/nowhere: no such folder\n"


def on_a_terminal(folder: Path, *arguments: str, until: bytes) -> bytes:
    """Run the verb on a terminal until it has shown some text, and interrupt it."""
    terminal, side = os.openpty()
    command = [sys.executable, str(ROOT / "bert_ds/runs.py"), str(folder), *arguments]
    env = {**os.environ, "PATH": f"{folder.parent / 'bin'}:{os.environ['PATH']}", "TERM": "xterm", "COLUMNS": "200"}
    # Whatever started the tests may have left SIGINT ignored, as a shell does for what it runs in the background.
    process = subprocess.Popen(
        command,
        stdin=side,
        stdout=side,
        stderr=side,
        env=env,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    os.close(side)
    shown = b""
    try:
        while until not in shown:
            assert select.select([terminal], [], [], 60)[0], f"nothing more is shown: {shown!r}"
            shown += os.read(terminal, 65536)
            assert len(shown) < 1 << 20, f"{until!r} never comes: {shown[-4000:]!r}"
        process.send_signal(signal.SIGINT)
        while chunk := os.read(terminal, 65536):
            shown += chunk
    except OSError:  # the terminal's other side is closed
        pass
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
        os.close(terminal)
    return shown


def test_on_a_terminal_the_table_is_live_in_color_and_ends_without_a_traceback(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/a", metrics=rows(100), done={"step": 100})
    shown = on_a_terminal(tmp_path / "runs", "--watch", "--every", "0.2", until=b"100/100")
    assert b"\x1b[" in shown and b"100/100" in shown
    assert b"Traceback" not in shown and b"runs.py: interrupted" in shown


def test_piped_and_watched_it_prints_one_table_after_the_other(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/a", metrics=rows(100), done={"step": 100})
    command = [sys.executable, str(ROOT / "bert_ds/runs.py"), str(tmp_path / "runs"), "--watch", "--every", "0.1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = [process.stdout.readline().split()[:2] for _ in range(4)]
    process.stdout.close()
    assert found == [["run", "state"], [f"{tmp_path}/runs/a", "done"]] * 2
    assert process.wait(timeout=30) == 0, "a reader that goes away is no error"


def test_a_narrow_terminal_shows_the_whole_path_of_a_run(tmp_path: Path) -> None:
    from rich.console import Console

    from bert_ds import runs

    run_dir = make_run(
        tmp_path / "experiments" / ("bert_large_phase1_" + "x" * 60) / "seed_3", metrics=rows(40), job="17"
    )
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(runs.rich_table([overview(run_dir, RUNNING)]))
    lines = console.export_text().splitlines()
    width = lines[0].index("state")
    assert "".join(line[:width].strip() for line in lines[1:]) == str(run_dir)
