"""Pre-training under a real Slurm of two nodes, through every fault that a job meets; run by `make test-slurm`.

After each fault the finished run equals the uninterrupted one, loss by loss, and no process of it is left.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, missing_packages, processes, processes_of, wait_until
from test_pretrain import losses, workshop

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[1]
STEPS = 120
SETTINGS = ("--set", f"training.total_steps={STEPS}", "--set", "checkpoints.every_steps=20")

__all__ = ["workshop"]  # a fixture


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A running Slurm; its job scripts find the interpreter of the tests."""
    missing = missing_packages()
    assert not missing, f"apt-get install {' '.join(missing)}"
    slurm = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    site = slurm.folder / "site.env"
    site.write_text(f"PYTHON={sys.executable}\nexport MASTER_ADDR=127.0.0.1\n", encoding="utf-8")
    slurm.environment.update(BERT_DS_SITE=str(site), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


def submit(cluster: SlurmCluster, workshop: Path, run_dir: Path, *options: str, flags: tuple[str, ...] = ()) -> str:
    """Submit a run on both nodes and return the number of the job; its log is beside the run folder."""
    words = ("sbatch", "--parsable", "--nodes=2", f"--output={run_dir}.out", *flags, "slurm/pretrain.sh")
    files = (workshop / "recipe.json", "ds_configs/zero2.json", run_dir)
    return cluster.run(*words, *files, *SETTINGS, *options, cwd=ROOT)


def step_reached(run_dir: Path) -> int:
    """The newest step in the metrics of a run."""
    path = run_dir / "metrics.jsonl"
    return (
        max((row["step"] for row in map(json.loads, path.read_bytes().splitlines())), default=0) if path.exists() else 0
    )


def wait_for_step(run_dir: Path, step: int) -> None:
    """Wait until a run has written this step."""
    wait_until(lambda: step_reached(run_dir) >= step, seconds=120)


def rank_pid(run_dir: Path, rank: int) -> int:
    """The process of a rank: the parent of its loader processes, by Slurm's variable in its environment."""
    for pid in processes_of(run_dir):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        words = processes().get(pid, [""])
        if f"SLURM_PROCID={rank}".encode() in environment and words[1].endswith("pretrain.py"):
            return pid
    raise AssertionError(f"rank {rank} of {run_dir} is not running")


def log_of(run_dir: Path) -> str:
    """The log of the job."""
    return Path(f"{run_dir}.out").read_text(encoding="utf-8")


def restarts(run_dir: Path) -> dict[str, object]:
    """What the job remembers of its launches."""
    return json.loads((run_dir / "restarts.json").read_text())


def assert_ended_well(cluster: SlurmCluster, job: str, run_dir: Path, finished_run: Path) -> None:
    """The job completed, the losses are the uninterrupted run's, and no process is left."""
    assert cluster.wait_for_end(job, seconds=240) == ("COMPLETED", 0), log_of(run_dir)
    assert (run_dir / "DONE").exists()
    assert losses(run_dir) == losses(finished_run)
    assert processes_of(run_dir) == []


@pytest.fixture(scope="module")
def finished_run(cluster: SlurmCluster, workshop: Path) -> Path:
    """A run on both nodes that nothing happened to."""
    run_dir = workshop / "uninterrupted"
    job = submit(cluster, workshop, run_dir)
    assert cluster.wait_for_end(job, seconds=180) == ("COMPLETED", 0), log_of(run_dir)
    return run_dir


def test_two_nodes_train_one_run_without_ssh_and_every_rank_has_its_logs(finished_run: Path) -> None:
    assert len(losses(finished_run)) == STEPS
    assert (finished_run / "DONE").exists()
    names = {path.name for path in (finished_run / "logs").iterdir()}
    assert {"rank_0.log", "rank_1.log", "rank_0.out", "rank_1.out"} <= names
    environment = json.loads((finished_run / "environment.json").read_text())
    assert environment["variables"]["SLURM_JOB_NUM_NODES"] == "2"
    assert f"step {STEPS}/{STEPS}" in log_of(finished_run)
    assert processes_of(finished_run) == []


def test_a_typo_ends_the_job_in_seconds_with_exit_code_2_and_its_text(cluster: SlurmCluster, workshop: Path) -> None:
    run_dir, begun = workshop / "typo", time.monotonic()
    job = submit(cluster, workshop, run_dir, "--set", "optimizer.learning_rate=1e-3")
    assert cluster.wait_for_end(job, seconds=60) == ("FAILED", 2)
    print(f"seconds from sbatch to the end: {time.monotonic() - begun:.1f}")
    assert "optimizer.learning_rate: unknown setting; it is optimizer.lr" in log_of(run_dir)
    assert not run_dir.exists()


def test_a_rank_killed_with_9_is_restarted_inside_the_job(
    cluster: SlurmCluster, workshop: Path, finished_run: Path
) -> None:
    run_dir = workshop / "killed_rank"
    job = submit(cluster, workshop, run_dir)
    wait_for_step(run_dir, 30)
    os.kill(rank_pid(run_dir, 1), signal.SIGKILL)
    assert_ended_well(cluster, job, run_dir, finished_run)
    assert restarts(run_dir)["launches"] == 2
    assert cluster.job_fact(job, "Restarts") == "0"
    assert "launching again from step 20" in log_of(run_dir)


def test_a_killed_srun_leaves_no_orphan_and_the_job_goes_on(
    cluster: SlurmCluster, workshop: Path, finished_run: Path
) -> None:
    run_dir = workshop / "killed_srun"
    job = submit(cluster, workshop, run_dir)
    wait_for_step(run_dir, 30)
    for pid in [pid for pid in processes_of(run_dir) if processes()[pid][0] == "srun"]:
        os.kill(pid, signal.SIGKILL)
    assert_ended_well(cluster, job, run_dir, finished_run)
    assert cluster.job_fact(job, "Restarts") == "0"


def test_a_rank_that_hangs_is_found_and_the_stacks_of_every_rank_are_in_the_logs(
    cluster: SlurmCluster, workshop: Path, finished_run: Path
) -> None:
    run_dir = workshop / "hanging_rank"
    job = submit(cluster, workshop, run_dir, "--hang_limit", "6")
    wait_for_step(run_dir, 30)
    os.kill(rank_pid(run_dir, 1), signal.SIGSTOP)
    assert_ended_well(cluster, job, run_dir, finished_run)
    for rank in (0, 1):
        assert "Current thread" in (run_dir / f"logs/rank_{rank}.log").read_text(), rank
    assert "hang: rank 1" in (run_dir / "logs/rank_0.out").read_text()
    assert cluster.job_fact(job, "Restarts") == "0"


def test_a_signal_before_the_time_limit_saves_and_queues_the_job_again(
    cluster: SlurmCluster, workshop: Path, finished_run: Path
) -> None:
    run_dir = workshop / "time_limit"
    job = submit(cluster, workshop, run_dir)
    wait_for_step(run_dir, 30)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@300 sends
    wait_until(lambda: cluster.job_fact(job, "Restarts") == "1", seconds=60)
    assert "the time is nearly up, saved at step" in log_of(run_dir)
    assert_ended_well(cluster, job, run_dir, finished_run)


def test_a_node_that_dies_sends_the_job_back_to_the_queue_and_it_resumes(
    cluster: SlurmCluster, workshop: Path, finished_run: Path
) -> None:
    run_dir = workshop / "dead_node"
    job = submit(cluster, workshop, run_dir)
    wait_for_step(run_dir, 30)
    cluster.kill_node("node2")
    wait_until(lambda: cluster.job_fact(job, "Restarts") == "1", seconds=120)
    cluster.start_node("node2")
    assert_ended_well(cluster, job, run_dir, finished_run)


def test_a_cancelled_job_saves_leaves_nothing_and_is_not_queued_again(
    cluster: SlurmCluster, workshop: Path, finished_run: Path
) -> None:
    run_dir = workshop / "cancelled"
    job = submit(cluster, workshop, run_dir)
    wait_for_step(run_dir, 30)
    cluster.run("scancel", job)
    assert cluster.wait_for_end(job, seconds=60)[0] == "CANCELLED"
    wait_until(lambda: processes_of(run_dir) == [], seconds=30)
    again = submit(cluster, workshop, run_dir)
    assert_ended_well(cluster, again, run_dir, finished_run)
