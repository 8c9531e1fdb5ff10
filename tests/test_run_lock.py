"""Two launches in one run folder: the second is refused, and what a dead one leaves behind stops nobody."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.reporting.run_pulse import LOCK
from bert_ds.training.launch import run_lock
from bert_ds.training.launch.run_lock import DEAD_AFTER_S, lock_run_folder

ROOT = Path(__file__).resolve().parents[1]
OWNER = """
import sys, time
from pathlib import Path
from bert_ds.training.launch import run_lock
from bert_ds.training.launch.run_lock import lock_run_folder
lock_run_folder(Path(sys.argv[1]), patience_s=0)
print("held", flush=True)
time.sleep(600)
"""


def launch(run_dir: Path) -> subprocess.Popen[str]:
    """A process that holds the folder."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER, run_dir], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "held\n"
    return owner


def test_the_second_launch_is_told_who_the_first_is(tmp_path: Path) -> None:
    with launch(tmp_path) as first:
        with pytest.raises(ConfigError, match=f"in use by process {first.pid} on"):
            lock_run_folder(tmp_path, patience_s=0.3)
        first.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_launch_leaves_the_folder_free(tmp_path: Path, number: signal.Signals) -> None:
    with launch(tmp_path) as first:
        first.send_signal(number)
        first.wait()
    with launch(tmp_path) as second:
        second.kill()


def test_a_launch_waits_for_the_end_of_the_one_before(tmp_path: Path) -> None:
    with launch(tmp_path) as first:
        second = subprocess.Popen(
            [sys.executable, "-c", OWNER.replace("patience_s=0", "patience_s=60"), tmp_path],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(1)
        first.kill()
        assert second.stdout is not None and second.stdout.readline() == "held\n"
        second.kill()
        second.wait()


def other_machines_lock(run_dir: Path, *, age_s: float, job: str | None = None) -> None:
    facts = {"host": "another-node", "pid": 7, "job": job, "started": "2026-01-01 00:00:00"}
    (run_dir / LOCK).write_text(json.dumps(facts))
    now = (run_dir / LOCK).stat().st_mtime
    os.utime(run_dir / LOCK, (now - age_s, now - age_s))


def test_a_lock_that_another_machine_renews_counts_without_flock(tmp_path: Path) -> None:
    other_machines_lock(tmp_path, age_s=30)
    with pytest.raises(ConfigError, match="process 7 on another-node, started 2026-01-01"):
        lock_run_folder(tmp_path, patience_s=0)


def test_a_lock_that_a_dead_machine_has_left_does_not(tmp_path: Path) -> None:
    other_machines_lock(tmp_path, age_s=DEAD_AFTER_S + 1)
    lock_run_folder(tmp_path, patience_s=0)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_requeued_job_takes_over_from_its_earlier_start_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    other_machines_lock(tmp_path, age_s=1, job="42")
    lock_run_folder(tmp_path, patience_s=0)


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError):
        lock_run_folder(tmp_path, patience_s=0)
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("content", ["", "not JSON", "[]", "\0" * 50])
def test_a_lock_without_an_owner_is_free(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    lock_run_folder(tmp_path, patience_s=0)


def test_the_owner_renews_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "RENEWED_EVERY_S", 0.05)
    lock_run_folder(tmp_path, patience_s=0)
    os.utime(tmp_path / LOCK, (0, 0))
    deadline = time.monotonic() + 20
    while (tmp_path / LOCK).stat().st_mtime < 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / LOCK).stat().st_mtime > 1


def test_a_lock_is_renewed_often_enough_to_count() -> None:
    assert 3 * run_lock.RENEWED_EVERY_S < DEAD_AFTER_S
