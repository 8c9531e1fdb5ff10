"""Check a run and a job against each other and submit the job to Slurm.

    python bert_ds/submit.py --run my_run.json --deepspeed_config ds_configs/zero2.json --run_dir runs/mine \\
        --nodes 8 --gpus_per_node 8 --time 24:00:00 --partition gpu --dry_run

Everything that `check_run.py` knows is checked at the job's number of ranks; memory, disk and time on top. The command
that is printed is the one that is run, and can be copied. Exit code 2: nothing was submitted; every problem is on
stderr, one per line.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a script run by path finds its package beside itself
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bert_ds.basics.whole_files import write_json
from bert_ds.configuration.deepspeed_file.ds_config import load_pair
from bert_ds.configuration.job_config import JobConfig, parse_job_config
from bert_ds.configuration.plan_table import plan_table
from bert_ds.configuration.reading.shipped_files import named_file
from bert_ds.configuration.recipe.precision import planned, planned_on_gpus
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.configuration.run_plan import RunPlan, make_plan
from bert_ds.folders.kept_files import keeping_files
from bert_ds.folders.output_folders import claim_run_folder, open_run_folder
from bert_ds.launch.command_line import run_main
from bert_ds.launch.slurm_job import (
    Speed,
    gpu_memory_bytes,
    job_problems,
    job_rows,
    job_warnings,
    sbatch_command,
    site_settings,
    speed_at_mfu,
    speed_of_run,
)
from bert_ds.launch.verb_arguments import add_pair_options
from bert_ds.launch.verbs import verb_parser
from bert_ds.training.checkpoints.checkpoint_folder import candidates, step_of
from bert_ds.training.loop.throughput import peak_flops

ROOT = Path(__file__).resolve().parents[1]
JOB_OPTIONS = (
    *("job_name", "nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "memory_per_node", "time"),
    *("partition", "account", "qos", "reservation", "constraint", "exclude"),
)


def main() -> int:
    args = parse_arguments()
    run, ds = load_pair(args.run, args.deepspeed_config, overrides=args.set)
    job = parse_job_config(job_values(args, default_name=run.name))
    claim_run_folder(Path(job.run_dir))
    plan = make_plan(run, ds, job.world_size)  # what is refused here would be refused at the launch
    if job.gpus_per_node:
        plan = make_plan(planned_on_gpus(run), ds, job.world_size)
    saved = candidates(Path(job.run_dir))
    held_bytes = sum(path.stat().st_size for folder in saved for path in folder.iterdir())
    problems = job_problems(job, plan, gpu_memory_bytes=memory_of(args), held_bytes=held_bytes)
    if problems:
        raise ConfigError("\n".join(problems))
    speed = speed_of(args, plan)
    rows = [*plan_table(plan), *job_rows(job, plan, speed=speed, done_steps=step_of(saved[0].name) if saved else 0)]
    if plan.run is not run:
        rows.insert(1, ("precision", "decided at the launch (planned for bf16, which auto is on a GPU)"))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")
    for warning in (*plan.warnings, *job_warnings(job, plan, speed=speed)):
        print(f"warning: {warning}", file=sys.stderr)
    return submit(job, rows=rows, dry_run=args.dry_run)


def parse_arguments() -> argparse.Namespace:
    parser = verb_parser("submit")
    add_pair_options(parser)
    parser.add_argument("--run_dir", required=True, help="run folder, on a file system that all nodes share")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override of the recipe")
    parser.add_argument("--nodes", type=int, default=1, help="machines (default %(default)s)")
    parser.add_argument("--gpus_per_node", type=int, required=True, help="GPUs of each, one rank per GPU; 0: CPUs")
    parser.add_argument("--tasks_per_node", type=int, help="ranks of each machine without GPUs (default 1)")
    parser.add_argument("--cpus_per_task", type=int, help="processor cores of each rank")
    parser.add_argument("--memory_per_node", help="host memory of each machine, as in 200G; 0: all")
    parser.add_argument("--time", help="longest time of one start, as in 24:00:00 or 2-12:00:00")
    for name in ("partition", "account", "qos", "reservation", "constraint", "exclude"):
        parser.add_argument(f"--{name}", help="as sbatch takes it")
    parser.add_argument("--exclusive", action="store_true", help="whole machines")
    parser.add_argument("--job_name", help="name in the queue (default: the recipe's)")
    parser.add_argument("--gpu", help="name of the GPU, as in H100: its memory is checked, its peak gives an estimate")
    parser.add_argument("--gpu_memory_gb", type=float, help="memory of one GPU")
    parser.add_argument("--mfu", type=float, default=0.35, help="assumed share of --gpu's peak (default %(default)s)")
    parser.add_argument("--tokens_per_s", type=float, help="expected speed of the whole job")
    parser.add_argument("--like", type=Path, metavar="RUN_DIR", help="an earlier run whose measured speed is expected")
    parser.add_argument(
        "--preflight", choices=("auto", "on", "off"), default="auto", help="measure every node first (auto: of several)"
    )
    parser.add_argument("--dry_run", action="store_true", help="check and print, submit nothing")
    args = parser.parse_args()
    for name in ("gpu_memory_gb", "mfu", "tokens_per_s"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1e15:
            parser.error(f"--{name}: found {value}, wanted a positive number")
    return args


def job_values(args: argparse.Namespace, *, default_name: str) -> dict[str, Any]:
    """Return the job as JSON values; paths are made absolute, as the job starts in another folder."""
    given = {name: getattr(args, name) for name in JOB_OPTIONS if getattr(args, name) is not None}
    spread = os.path.abspath(named_file(args.deepspeed_config, "DeepSpeed file"))
    paths = {"deepspeed_config": spread, "run_dir": os.path.abspath(args.run_dir)}
    recipe = os.path.abspath(named_file(args.run, "recipe")) if args.run else None
    return {
        "job_name": default_name,
        **given,
        **paths,
        "run": recipe,
        "overrides": args.set,
        "exclusive": args.exclusive,
        "preflight": args.preflight,
    }


def memory_of(args: argparse.Namespace) -> float | None:
    """Return the memory of one GPU in bytes, where it was given or its name."""
    if args.gpu_memory_gb is not None:
        return args.gpu_memory_gb * 1e9
    return gpu_memory_bytes(args.gpu) if args.gpu else None


def speed_of(args: argparse.Namespace, plan: RunPlan) -> Speed | None:
    """Return the expected speed, from the best of the sources that were given."""
    if args.tokens_per_s is not None:
        return Speed(args.tokens_per_s, "given")
    if args.like is not None:
        return speed_of_run(args.like, world_size=plan.world_size)
    peak = peak_flops(args.gpu, planned(plan.run.training.precision)) if args.gpu else None
    return speed_at_mfu(plan, peak_flops=peak, mfu=args.mfu, gpu=args.gpu) if peak else None


def submit(job: JobConfig, *, rows: list[tuple[str, str]], dry_run: bool) -> int:
    """Print the command, run it, and keep what was submitted in the run folder."""
    folder = ROOT / "slurm" if (ROOT / "slurm/pretrain.sh").is_file() else ROOT / "bert_ds/_shipped/slurm"
    command = sbatch_command(job, folder / "pretrain.sh")
    site = site_settings(Path(os.environ.get("BERT_DS_SITE", folder / "site.env")))
    print(f"\ncd {shlex.quote(str(ROOT))} && {shlex.join([*(f'{k}={v}' for k, v in site.items()), *command])}")
    if dry_run:
        return 0
    run_dir = Path(job.run_dir)
    try:
        open_run_folder(run_dir)  # sbatch opens the log in it
        done = subprocess.run(
            command, cwd=ROOT, env={**site, **os.environ}, capture_output=True, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"sbatch could not be run: {error}") from None
    if done.returncode:
        raise ConfigError(f"sbatch refused the job: {done.stderr.strip() or done.stdout.strip()}")
    number = done.stdout.strip().partition(";")[0]
    facts = {"format": 1, "job": number, "time": round(time.time(), 3), "command": command, "plan": dict(rows)}
    with keeping_files(run_dir, ["submit.json"]):
        write_json(run_dir / "submit.json", {**facts, "config": job.model_dump(mode="json")})
    print(f"submitted job {number}; its log is {run_dir}/slurm-{number}.out")
    return 0


if __name__ == "__main__":
    run_main(main)
