"""Runs of two ranks under the Slurm of `slurm_cluster`, and the faults that can happen to them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

from slurm_cluster import SlurmCluster, processes, processes_left, processes_of, wait_until
from test_pretrain import losses

ROOT = Path(__file__).resolve().parents[1]
STEPS = 100
OPTIMIZER = "muon"
"""Its matrices travel between the nodes at every step."""
SETTINGS = (
    *("--set", f"training.total_steps={STEPS}", "--set", "checkpoints.every_steps=10", "--hang_limit", "8"),
    *("--set", f'optimizer={{"type": "{OPTIMIZER}", "lr": 5e-3}}'),
)


def submit(cluster: SlurmCluster, workshop: Path, run_dir: Path, *options: str, flags: tuple[str, ...] = ()) -> str:
    """Submit a run on both nodes and return the number of the job; its log is beside the run folder."""
    words = ("sbatch", "--parsable", "--nodes=2", f"--output={run_dir}.out", *flags, "slurm/pretrain.sh")
    files = (workshop / "recipe.json", "ds_configs/zero2.json", run_dir)
    return cluster.run(*words, *files, *SETTINGS, *options, cwd=ROOT)


def wait_for_step(run_dir: Path, step: int) -> None:
    """Wait until a run has written this step or a later one."""
    path = run_dir / "metrics.jsonl"

    def reached() -> bool:
        lines = path.read_bytes().splitlines() if path.exists() else []
        return any(json.loads(line)["step"] >= step for line in lines)

    wait_until(reached, seconds=120)


def log_of(run_dir: Path) -> str:
    """The log of the job."""
    return Path(f"{run_dir}.out").read_text(encoding="utf-8")


def launches(run_dir: Path) -> int:
    """How many launches the job has made in all."""
    return json.loads((run_dir / "restarts.json").read_text())["launches"]


def assert_ended_well(cluster: SlurmCluster, job: str, run_dir: Path, finished_run: Path) -> None:
    """The job completed, the losses are the uninterrupted run's to the last bit, and no process is left."""
    assert cluster.wait_for_end(job, seconds=300) == ("COMPLETED", 0), log_of(run_dir)
    assert (run_dir / "DONE").exists()
    assert losses(run_dir) == losses(finished_run)
    assert processes_left(run_dir) == []


def rank_pid(run_dir: Path, rank: int) -> int:
    """The process of a rank."""
    for pid in processes_of(run_dir):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        words = processes().get(pid, ["", ""])
        if f"SLURM_PROCID={rank}".encode() in environment and words[1].endswith("pretrain.py"):
            return pid
    raise AssertionError(f"rank {rank} of {run_dir} is not running")


def kill_rank(cluster: SlurmCluster, job: str, run_dir: Path) -> None:
    """A rank gets SIGKILL."""
    os.kill(rank_pid(run_dir, 1), signal.SIGKILL)


def stop_rank(cluster: SlurmCluster, job: str, run_dir: Path) -> None:
    """A rank stops for ever without dying."""
    os.kill(rank_pid(run_dir, 1), signal.SIGSTOP)


def kill_srun(cluster: SlurmCluster, job: str, run_dir: Path) -> None:
    """The launcher gets SIGKILL; its tasks do not."""
    for pid in [pid for pid in processes_of(run_dir) if processes()[pid][0] == "srun"]:
        os.kill(pid, signal.SIGKILL)


def signal_time_limit(cluster: SlurmCluster, job: str, run_dir: Path) -> None:
    """What --signal=B:USR1@300 sends when the time limit is near."""
    cluster.run("scancel", "--batch", "--signal=USR1", job)


def signal_ranks(cluster: SlurmCluster, job: str, run_dir: Path) -> None:
    """What --signal=USR1@300 without B: sends."""
    cluster.run("scancel", "--signal=USR1", job)


def requeue(cluster: SlurmCluster, job: str, run_dir: Path) -> None:
    """An administrator, or preemption, sends the job back to the queue."""
    cluster.run("scontrol", "requeue", job)


def stop_controller(cluster: SlurmCluster, job: str, run_dir: Path) -> None:
    """slurmctld is dead when the time is nearly up, and comes back a while after the job has asked for it."""
    script = next(pid for pid in processes_of(run_dir) if processes()[pid][1:2][0].endswith("slurm_script"))
    os.kill(int((cluster.folder / "slurmctld.pid").read_text()), signal.SIGKILL)
    os.kill(script, signal.SIGUSR1)
    wait_until(lambda: "slurmctld does not queue it again" in log_of(run_dir), seconds=180)
    cluster.run("slurmctld")


def kill_slurmd(cluster: SlurmCluster, job: str, run_dir: Path) -> None:
    """A node's daemon dies, its tasks do not; it is started again when the run has ended without it."""
    os.kill(cluster.daemon_of("node2"), signal.SIGKILL)
    wait_until((run_dir / "DONE").exists, seconds=180)
    cluster.start_node("node2")


def kill_node(cluster: SlurmCluster, job: str, run_dir: Path) -> None:
    """A node dies with all that runs on it, and comes back when its job is in the queue again."""
    cluster.kill_node("node2")
    wait_until(lambda: cluster.job_fact(job, "Restarts") == "1", seconds=180)
    cluster.start_node("node2")


def wait_for_the_time_limit(cluster: SlurmCluster, job: str, run_dir: Path) -> None:
    """Nothing is done: the job was submitted with a time limit that it does not reach the end in."""
    wait_until(lambda: cluster.job_fact(job, "Restarts") == "1", seconds=180)


FAULTS: dict[str, Callable[[SlurmCluster, str, Path], None]] = {
    "a rank killed with -9": kill_rank,
    "a rank that hangs": stop_rank,
    "srun killed with -9": kill_srun,
    "signal before the time limit": signal_time_limit,
    "signal to the ranks": signal_ranks,
    "scontrol requeue": requeue,
    "slurmctld down at the signal": stop_controller,
    "a node's slurmd killed": kill_slurmd,
    "a node killed": kill_node,
    "the time limit itself": wait_for_the_time_limit,
}
LONG = ("--set", "training.total_steps=6000", "--set", "checkpoints.every_steps=500")
"""Options of a run that Slurm signals while it trains, with TIME_LIMIT: long enough for an idle machine."""
TIME_LIMIT = ("--time=2", "--signal=B:USR1@45")
