"""A validated job as a command line of sbatch, and what can be known about it before it is submitted."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from bert_ds.basics.input_gate import read_text
from bert_ds.configuration.job_config import JobConfig
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.run_plan import RunPlan, size_text
from bert_ds.reporting.run_log import read_metrics

SIGNAL_BEFORE_END_S = 300
"""How long before the time limit the job script is told; stands in the script as --signal=B:USR1@300."""
GPU_MEMORY_GB = {
    "B200": 180,
    "H200": 141,
    "H100": 80,
    "H20": 96,
    "GH200": 96,
    "A100": 40,
    "A100 80GB": 80,
    "A800": 80,
    "A10": 24,
    "A10G": 24,
    "A40": 48,
    "L40S": 48,
    "L4": 24,
}
"""Memory of one GPU in 10^9 bytes, from NVIDIA's data sheets; the smaller where a name is sold in two sizes."""

_SITE_SETTING = re.compile(r"\s*export\s+(SBATCH_[A-Z_]+)=([A-Za-z0-9._,:/=+-]+)\s*(#.*)?")


class Speed(NamedTuple):
    """How fast all ranks together are expected to be."""

    tokens_per_s: float
    source: str
    """Where the number comes from."""


def sbatch_command(job: JobConfig, script: Path) -> list[str]:
    """Return the words of the command; no shell reads them, and no value goes through --export.

    Args:
        job: what is asked of Slurm.
        script: slurm/pretrain.sh.
    """
    flags: dict[str, object] = {
        "job-name": job.job_name,
        "nodes": job.nodes,
        "gpus-per-node": job.gpus_per_node or None,
        "ntasks-per-node": job.ranks_per_node,
        "cpus-per-task": job.cpus_per_task,
        "mem": job.memory_per_node,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "reservation": job.reservation,
        "constraint": job.constraint,
        "exclude": job.exclude,
        "output": f"{job.run_dir}/slurm-%j.out",
    }
    words = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    overrides = [word for override in job.overrides for word in ("--set", override)]
    exclusive = ["--exclusive"] if job.exclusive else []
    places = [job.run or "", job.deepspeed_config, job.run_dir]
    preflight = [] if job.preflight == "auto" else ["--preflight", job.preflight]
    return ["sbatch", "--parsable", *words, *exclusive, str(script), *places, *overrides, *preflight]


def site_settings(path: Path) -> dict[str, str]:
    """Return the SBATCH_* variables that a site file exports; sbatch takes them as defaults of its flags.

    Only plain values are read: the file is a shell script and no shell runs here.
    """
    if not path.exists():
        return {}
    matches = (_SITE_SETTING.fullmatch(line) for line in read_text(path, error=ConfigError).splitlines())
    return {match[1]: match[2] for match in matches if match is not None}


def speed_of_run(run_dir: Path, *, world_size: int) -> Speed:
    """Return the median speed that another run has logged, per rank, times the ranks of this one.

    Raises:
        ConfigError: the folder holds no training rows.
    """
    rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if row.get("tokens_per_s")]
    starts = read_metrics(run_dir / "metrics.jsonl", "start")
    if not rows or not starts:
        raise ConfigError(f"--like {run_dir}: wanted the folder of a run that has logged steps")
    ranks = _ranks_of(starts[-1]) or world_size
    median = sorted(row["tokens_per_s"] for row in rows)[len(rows) // 2]
    text = f"measured in {run_dir} on {ranks} ranks" + (f", taken {world_size / ranks:g} times" * (ranks != world_size))
    return Speed(median * world_size / ranks, text)


def speed_at_mfu(plan: RunPlan, *, peak_flops: float, mfu: float, gpu: str) -> Speed:
    """Return the speed at an assumed utilisation of the GPUs' dense peak."""
    flops = plan.max_flops / plan.max_tokens()
    return Speed(peak_flops * mfu * plan.world_size / flops, f"assuming {mfu:.0%} of the peak of {gpu}")


def expected_seconds(plan: RunPlan, speed: Speed, *, done_steps: int) -> float:
    """Return the time that the remaining steps take if every example is full; of a run by the clock, its minutes."""
    if plan.run.training.max_minutes is not None:
        return 60 * plan.run.training.max_minutes
    return plan.max_tokens(done_steps) / speed.tokens_per_s


def job_problems(job: JobConfig, plan: RunPlan, *, gpu_memory_bytes: float | None, held_bytes: int) -> list[str]:
    """Return what would let the job fail although both of its files are right.

    Args:
        job: what is asked of Slurm.
        plan: the run on the job's ranks.
        gpu_memory_bytes: of one GPU, None where it is not known.
        held_bytes: what the run's checkpoints take already.
    """
    problems = []
    needed = plan.memory().device
    if job.gpus_per_node and gpu_memory_bytes is not None and needed > gpu_memory_bytes:
        text = f"a rank needs at least {size_text(needed)}, a GPU has {size_text(gpu_memory_bytes)}"
        problems.append(f"{plan.ds.name}: {text}: a smaller micro-batch, a higher ZeRO stage or more nodes help")
    free = shutil.disk_usage(_existing(Path(job.run_dir))).free
    if plan.disk_bytes - held_bytes > free:
        text = f"its checkpoints need {size_text(plan.disk_bytes)}, its file system has {size_text(free)} free"
        problems.append(f"--run_dir {job.run_dir}: {text}")
    if job.time_s is not None and job.time_s < 2 * SIGNAL_BEFORE_END_S:
        text = f"found {job.time}, wanted at least {2 * SIGNAL_BEFORE_END_S // 60} minutes"
        problems.append(f"--time: {text}: the run is told to save {SIGNAL_BEFORE_END_S // 60} minutes before the end")
    return problems


def job_rows(job: JobConfig, plan: RunPlan, *, speed: Speed | None, done_steps: int) -> list[tuple[str, str]]:
    """Return what follows for the job as rows of name and text."""
    what = f"{job.gpus_per_node} GPUs" if job.gpus_per_node else f"{job.ranks_per_node} CPU tasks"
    rows = [("job", f"{job.job_name}: {job.world_size} ranks on {job.nodes} nodes of {what}")]
    if speed is None:
        return [*rows, ("time", "not known: --tokens_per_s, --like RUN_DIR or --gpu NAME give an estimate")]
    seconds = expected_seconds(plan, speed, done_steps=done_steps)
    left = _steps_left(plan, done_steps) if plan.run.training.total_steps else "training.max_minutes"
    text = f"at most {hours_text(seconds)} for {left} at {speed.tokens_per_s:,.0f} tokens/s ({speed.source})"
    if job.time_s is not None:
        starts = -(-int(seconds) // (job.time_s - SIGNAL_BEFORE_END_S)) or 1
        text += f"; {starts} starts of {job.time}" if starts > 1 else f"; one start of {job.time}"
    return [*rows, ("time", text)]


def _steps_left(plan: RunPlan, done_steps: int) -> str:
    return f"{plan.total_steps - done_steps:,} steps" + (f" after step {done_steps:,}" if done_steps else "")


def job_warnings(job: JobConfig, plan: RunPlan, *, speed: Speed | None) -> list[str]:
    """Return what works and may not be meant."""
    every = plan.run.checkpoints.every_steps or plan.run.training.total_steps
    if speed is None or every is None:
        return []
    seconds = every * plan.max_tokens_per_step / speed.tokens_per_s
    if job.time_s is not None and seconds > job.time_s:
        return [f"checkpoints are {hours_text(seconds)} apart and a start lasts {job.time}: a fault may cost all of it"]
    return []


def hours_text(seconds: float) -> str:
    """Return a duration as hours:minutes, with days where there are any."""
    minutes = round(seconds / 60)
    days, hours = divmod(minutes // 60, 24)
    return (f"{days}-" if days else "") + f"{hours:02d}:{minutes % 60:02d} h"


def gpu_memory_bytes(name: str) -> float:
    """Return the memory of a GPU that is known by name.

    Raises:
        ConfigError: it is not known.
    """
    if name not in GPU_MEMORY_GB:
        raise ConfigError(f"--gpu: found {name!r}, wanted one of {', '.join(GPU_MEMORY_GB)}; else --gpu_memory_gb")
    return GPU_MEMORY_GB[name] * 1e9


def _ranks_of(start: Mapping[str, object]) -> int | None:
    """Return the ranks of an attempt from its row in metrics.jsonl, where the plan is kept as text."""
    plan = start.get("plan")
    match = re.search(r"x ([0-9]+) ranks", str(plan.get("global batch", ""))) if isinstance(plan, dict) else None
    return int(match[1]) if match else None


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
