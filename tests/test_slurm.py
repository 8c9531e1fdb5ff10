"""Pre-training under a real Slurm of two nodes, through the faults that a job meets; run by `make test-slurm`.

After each fault the finished run equals the uninterrupted one, loss by loss, and no process of it is left.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import slurm_runs
from slurm_cluster import SlurmCluster, cluster, processes_left
from slurm_runs import STEPS, assert_ended_well, launches, log_of, submit, wait_for_step
from start_faults import UNSEEN, die_at_start, srun
from test_pretrain import losses, workshop

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[1]

__all__ = ["cluster", "workshop"]  # fixtures


@pytest.fixture(scope="module")
def finished_run(cluster: SlurmCluster, workshop: Path) -> Path:
    """A run on both nodes that nothing happened to, in a folder whose name a shell would love."""
    run_dir = workshop / 'it\'s a $(touch canary); "run" ü & 模型'
    job = submit(cluster, workshop, run_dir)
    assert cluster.wait_for_end(job, seconds=180) == ("COMPLETED", 0), log_of(run_dir)
    return run_dir


def started(cluster: SlurmCluster, workshop: Path, name: str) -> tuple[str, Path]:
    """A job whose run has passed its first checkpoints."""
    run_dir = workshop / name
    job = submit(cluster, workshop, run_dir)
    wait_for_step(run_dir, 25)
    return job, run_dir


def assert_saved_on_sigterm(run_dir: Path) -> None:
    """The ranks saved because Slurm told at least one of them to end; the first to notice tells the other."""
    logs = [(run_dir / f"logs/rank_{rank}.log").read_text() for rank in (0, 1)]
    assert any("asked to stop (SIGTERM), saving at step" in log for log in logs)
    assert all("saving at step" in log for log in logs)


def test_two_nodes_train_one_run_without_ssh_and_every_rank_has_its_logs(finished_run: Path) -> None:
    assert len(losses(finished_run)) == STEPS
    names = {path.name for path in (finished_run / "logs").iterdir()}
    assert {"rank_0.log", "rank_1.log", "rank_0.out", "rank_1.out"} <= names
    environment = json.loads((finished_run / "environment.json").read_text())
    assert environment["variables"]["SLURM_JOB_NUM_NODES"] == "2"
    assert f"step {STEPS}/{STEPS}" in log_of(finished_run)
    assert processes_left(finished_run) == []
    assert not list(ROOT.glob("canary")) and not list(finished_run.parent.rglob("canary"))


def test_a_typo_ends_the_job_in_seconds_with_exit_code_2_and_its_text(cluster: SlurmCluster, workshop: Path) -> None:
    run_dir = workshop / "typo"
    job = submit(cluster, workshop, run_dir, "--set", "optimizer.learning_rate=1e-3")
    assert cluster.wait_for_end(job, seconds=60) == ("FAILED", 2)
    assert "optimizer.learning_rate: unknown setting; it is optimizer.lr" in log_of(run_dir)
    assert not run_dir.exists()


def test_damaged_shards_end_the_job_with_exit_code_3_and_are_not_tried_again(
    cluster: SlurmCluster, workshop: Path
) -> None:
    shards = workshop / "damaged"
    shards.mkdir()
    for path in (one for one in (workshop / "shards").iterdir() if one.is_file()):
        (shards / path.name).write_bytes(path.read_bytes()[: -7 if path.suffix == ".tokens" else None])
    run_dir = workshop / "damaged_run"
    job = submit(cluster, workshop, run_dir, "--set", f"corpus.sources.0.path={shards}")
    assert cluster.wait_for_end(job, seconds=90) == ("FAILED", 3), log_of(run_dir)
    assert "stopped, the data are unusable: rank" in log_of(run_dir)
    assert launches(run_dir) == 1


def test_a_rank_killed_with_9_is_restarted_inside_the_job(
    cluster: SlurmCluster, workshop: Path, finished_run: Path
) -> None:
    job, run_dir = started(cluster, workshop, "killed_rank")
    slurm_runs.kill_rank(cluster, job, run_dir)
    assert_ended_well(cluster, job, run_dir, finished_run)
    assert launches(run_dir) == 2
    assert cluster.job_fact(job, "Restarts") == "0"


def test_a_rank_that_dies_before_it_is_seen_is_ended_by_srun_as_the_job_script_starts_it(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    assert "srun --kill-on-bad-exit=1 " in (ROOT / "slurm/common.sh").read_text()
    verb = [str(ROOT / "bert_ds/pretrain.py"), "--deepspeed_config", "unread", "--run_dir", str(tmp_path / "run")]
    found = die_at_start(tmp_path, srun(cluster, ends_all=True), verb, moment=UNSEEN, limit_s=60)
    assert found.seconds < 30 and found.says == ""  # nobody has heard of it


def test_a_rank_that_hangs_is_found_and_the_stacks_of_every_rank_are_in_the_logs(
    cluster: SlurmCluster, workshop: Path, finished_run: Path
) -> None:
    job, run_dir = started(cluster, workshop, "hanging_rank")
    slurm_runs.stop_rank(cluster, job, run_dir)
    assert_ended_well(cluster, job, run_dir, finished_run)
    for rank in (0, 1):
        assert "(most recent call first)" in (run_dir / f"logs/rank_{rank}.log").read_text(), rank
    assert "hang: rank 1" in (run_dir / "logs/rank_0.out").read_text()
    assert f"job {job}: hang: rank 1 does not answer" in log_of(run_dir)
    assert cluster.job_fact(job, "Restarts") == "0"


def test_a_killed_srun_leaves_no_orphan_and_a_second_job_is_kept_out_of_the_run_folder(
    cluster: SlurmCluster, workshop: Path, finished_run: Path
) -> None:
    job, run_dir = started(cluster, workshop, "killed_srun")
    slurm_runs.kill_srun(cluster, job, run_dir)
    words = ("sbatch", "--parsable", "--nodes=2", f"--output={run_dir}.second", "slurm/pretrain.sh")
    second = cluster.run(*words, workshop / "recipe.json", "ds_configs/zero2.json", run_dir, cwd=ROOT)
    assert cluster.wait_for_end(second, seconds=60) == ("FAILED", 2)
    assert f"belongs to job {job}, which is running" in Path(f"{run_dir}.second").read_text()
    assert_ended_well(cluster, job, run_dir, finished_run)
    assert cluster.job_fact(job, "Restarts") == "0"


def test_a_signal_before_the_time_limit_saves_and_queues_the_job_again(
    cluster: SlurmCluster, workshop: Path, finished_run: Path
) -> None:
    job, run_dir = started(cluster, workshop, "time_limit")
    slurm_runs.signal_time_limit(cluster, job, run_dir)
    assert_ended_well(cluster, job, run_dir, finished_run)
    assert "the time is nearly up, saved at step" in log_of(run_dir)
    assert cluster.job_fact(job, "Restarts") == "1"


def test_a_job_whose_controller_is_down_at_the_signal_is_queued_again_when_it_is_back(
    cluster: SlurmCluster, workshop: Path, finished_run: Path
) -> None:
    job, run_dir = started(cluster, workshop, "no_controller")
    slurm_runs.stop_controller(cluster, job, run_dir)
    assert_ended_well(cluster, job, run_dir, finished_run)
    assert "queued again; Slurm lets it wait" in log_of(run_dir)
    assert cluster.job_fact(job, "Restarts") == "1"


def test_a_node_whose_slurmd_dies_goes_on_and_the_run_ends_well(
    cluster: SlurmCluster, workshop: Path, finished_run: Path
) -> None:
    job, run_dir = started(cluster, workshop, "dead_slurmd")
    slurm_runs.kill_slurmd(cluster, job, run_dir)
    assert_ended_well(cluster, job, run_dir, finished_run)


def test_a_job_that_is_sent_back_to_the_queue_saves_and_resumes(
    cluster: SlurmCluster, workshop: Path, finished_run: Path
) -> None:
    job, run_dir = started(cluster, workshop, "requeued")
    slurm_runs.requeue(cluster, job, run_dir)
    assert_ended_well(cluster, job, run_dir, finished_run)
    assert_saved_on_sigterm(run_dir)
    assert cluster.job_fact(job, "Restarts") == "1"


def test_a_node_that_dies_sends_the_job_back_to_the_queue_and_it_resumes(
    cluster: SlurmCluster, workshop: Path, finished_run: Path
) -> None:
    job, run_dir = started(cluster, workshop, "dead_node")
    slurm_runs.kill_node(cluster, job, run_dir)
    assert_ended_well(cluster, job, run_dir, finished_run)
    assert int(cluster.job_fact(job, "Restarts")) >= 1


def test_a_cancelled_job_saves_leaves_nothing_and_continues_only_when_it_is_submitted_again(
    cluster: SlurmCluster, workshop: Path, finished_run: Path
) -> None:
    job, run_dir = started(cluster, workshop, "cancelled")
    cluster.run("scancel", job)
    assert cluster.wait_for_end(job, seconds=60)[0] == "CANCELLED"
    assert_saved_on_sigterm(run_dir)
    assert processes_left(run_dir) == []
    assert_ended_well(cluster, submit(cluster, workshop, run_dir), run_dir, finished_run)


def test_the_job_scripts_are_clean_for_shellcheck_and_short() -> None:
    scripts = sorted((ROOT / "slurm").glob("*.sh"))
    checked = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert checked.stdout == "", checked.stdout
    assert {path.name: len(path.read_text().splitlines()) <= 150 for path in scripts} == {p.name: True for p in scripts}
