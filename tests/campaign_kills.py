"""Kill training again and again and compare what comes out with the run that was left alone.

    python tests/campaign_kills.py kills [--kills 25] [--only CASE]
    python tests/campaign_kills.py soak [--minutes 10] [--every_s 15]
    python tests/campaign_kills.py table

kills: every case (ZeRO stage, optimizer, precision, ranks, way of saving) trains two runs of the same length, with
dropout, two micro-steps per step and evaluations. One of them is killed: a random rank, at a random moment after it has
resumed, by SIGKILL, SIGSEGV or SIGABRT, most of the time while a checkpoint is written. All losses, weights and
optimizer state at the end must have the bits of the uninterrupted run. Rows go to tests/results/kills.jsonl, and a
case that is there already is not repeated.

soak: steps of a tenth of a second, a kill every 15 seconds; how much of the work counted.

Everything is imported once and forked, so that a launch costs a fraction of a second.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer
import torch
import torch.distributed as dist
from campaign_rows import add_row, read_rows
from tiny_training import (
    FACTS,
    TinyModel,
    ds_config,
    full_weights,
    micro_batch,
    optimizer_digest,
    step_batches,
    tiny_loop,
    tiny_services,
)

from bert_ds.configuration.recipe.optimizer_config import AdamWConfig, LambConfig
from bert_ds.reporting.run_log import read_metrics
from bert_ds.training.checkpoints.checkpoint_folder import find_checkpoint, step_of
from bert_ds.training.checkpoints.checkpoint_loader import resume
from bert_ds.training.checkpoints.checkpoint_saver import CheckpointPolicy, CheckpointSaver
from bert_ds.training.checkpoints.train_state import TrainState
from bert_ds.training.engine import make_engine
from bert_ds.training.launch.process_group import leave_out_shared_memory_operator
from bert_ds.training.loop.evaluation import Evaluation, evaluate
from bert_ds.training.loop.train_loop import train
from bert_ds.training.optimizers.factory import make_optimizer

RESULTS = Path(__file__).parent / "results/kills.jsonl"
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)
ACCUMULATION = 2


@dataclass(frozen=True)
class Case:
    """What is trained how."""

    stage: int
    optimizer: str = "adamw"
    precision: str = "fp32"
    ranks: int = 1
    asynchronous: bool = False
    offload: bool = False

    @property
    def name(self) -> str:
        parts = [f"zero{self.stage}", self.optimizer, self.precision, f"{self.ranks}rank"]
        return "-".join([*parts, *["async"] * self.asynchronous, *["offload"] * self.offload])


CASES = [
    Case(2, asynchronous=True, ranks=2),
    *[Case(stage, optimizer) for stage in (0, 1, 2, 3) for optimizer in ("adamw", "lamb")],
    Case(1, "lamb", "bf16", asynchronous=True),
    Case(2, "adamw", "bf16", offload=True),
    Case(3, "lamb", "bf16", ranks=2, asynchronous=True),
    Case(0, "lamb", "bf16", asynchronous=True),
    Case(3, ranks=2),
]


def train_here(case: Case, run_dir: Path, *, rank: int, steps: int, step_s: float, begun: int) -> None:
    """Resume, train to `steps` saving at every second one, leave a digest; writes a byte when training begins."""
    config = ds_config(case.stage, precision=case.precision, accumulation=ACCUMULATION, world_size=case.ranks)
    if case.offload:
        config |= {"zero_force_ds_cpu_optimizer": False}
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    model, settings = TinyModel(), {"adamw": AdamWConfig, "lamb": LambConfig}[case.optimizer]
    optimizer = make_optimizer(settings(lr=1e-2, weight_decay=0.1), model.named_parameters())
    engine = make_engine(model, optimizer, config)
    services = tiny_services(run_dir, rank, case.ranks)
    state = resume(engine, run_dir, name=None, facts=FACTS, log=services.log) or TrainState()
    policy = CheckpointPolicy(keep_last=2, facts=FACTS, asynchronous=case.asynchronous)
    saver = CheckpointSaver(engine, run_dir, policy=policy, log=services.log)
    services.log.start(state.step, {})

    def batches() -> Iterator[Any]:
        for micro_batches in step_batches(state.step, rank, ACCUMULATION):
            time.sleep(step_s)
            yield micro_batches

    held_out = [micro_batch(0, 100 + rank)]
    services = replace(
        services,
        save=saver.save,
        settle=saver.settle,
        evaluate=lambda at: Evaluation(evaluate(engine, held_out)),
    )
    loop = tiny_loop(steps, checkpoint_every_steps=2, evaluate_every_steps=5)
    os.write(begun, b"x")
    train(engine, batches(), state=state, loop=loop, services=services)
    digest = hashlib.sha256(full_weights(engine).numpy().tobytes() + optimizer_digest(engine).encode()).hexdigest()
    (run_dir / f"digest_{rank}").write_text(digest)


def launch(case: Case, run_dir: Path, *, steps: int, step_s: float = 0.0) -> tuple[list[int], int]:
    """Fork the ranks; return their process ids and a descriptor that gives a byte when each begins to train."""
    run_dir.mkdir(parents=True, exist_ok=True)
    reader, writer = os.pipe()
    store = tempfile.mktemp(dir=run_dir.parent, prefix="store-")
    pids = []
    for rank in range(case.ranks):
        pid = os.fork()
        if pid == 0:
            try:
                sys.stdout = open(run_dir / f"stdout_{rank}", "a", encoding="utf-8")  # noqa: SIM115
                os.dup2(sys.stdout.fileno(), 1)
                os.dup2(sys.stdout.fileno(), 2)
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.ranks))
                os.environ.update(LOCAL_SIZE=str(case.ranks), LOCAL_WORLD_SIZE=str(case.ranks))
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=case.ranks)
                leave_out_shared_memory_operator()
                deepspeed.init_distributed(dist_backend="gloo", verbose=False, dist_init_required=False)
                train_here(case, run_dir, rank=rank, steps=steps, step_s=step_s, begun=writer)
                os._exit(0)
            finally:
                os._exit(1)
        pids.append(pid)
    os.close(writer)
    return pids, reader


def kill_once(
    case: Case, run_dir: Path, clock: random.Random, *, steps: int, wait_s: float, step_s: float = 0.0
) -> dict[str, Any]:
    """Launch, kill a random rank wait_s after all have begun, end the others as a launcher does."""
    started = time.monotonic()
    pids, begun = launch(case, run_dir, steps=steps, step_s=step_s)
    for _ in pids:
        assert os.read(begun, 1) == b"x", f"a rank of {case.name} did not begin to train: see {run_dir}"
    start_s = time.monotonic() - started
    time.sleep(wait_s)
    victim, number = clock.randrange(case.ranks), clock.choice(SIGNALS)
    saving = any((run_dir / "checkpoints").glob(".tmp-global_step*"))
    os.kill(pids[victim], number)
    for pid in pids:
        if pid != pids[victim]:
            os.kill(pid, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    os.close(begun)
    return {"signal": number.name, "saving": saving, "killed": codes[victim] == -number, "start_s": start_s}


def finish(case: Case, run_dir: Path, *, steps: int, step_s: float = 0.0) -> None:
    pids, begun = launch(case, run_dir, steps=steps, step_s=step_s)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    os.close(begun)
    assert codes == [0] * case.ranks, f"{case.name}: exit codes {codes}, see {run_dir}"


def run_case(case: Case, work: Path, num_kills: int) -> dict[str, Any]:
    """Kill one run num_kills times, let it end, and compare it with the run that was left alone."""
    clock, steps = random.Random(case.name), 4 * num_kills
    killed, whole = work / case.name / "killed", work / case.name / "whole"
    shutil.rmtree(work / case.name, ignore_errors=True)
    begun, kills, lost = time.monotonic(), [], 0
    while len(kills) < num_kills:
        found = find_checkpoint(killed)
        before = 0 if found is None else step_of(found.name)
        if before + 2 >= steps:
            break
        kills.append(kill_once(case, killed, clock, steps=steps, wait_s=clock.expovariate(1 / 0.05)))
        after = find_checkpoint(killed)
        lost += (0 if after is None else step_of(after.name)) < before
    finish(case, killed, steps=steps)
    finish(case, whole, steps=steps)
    losses = [[row["loss"] for row in read_metrics(path / "metrics.jsonl")] for path in (killed, whole)]
    evaluations = [read_metrics(path / "metrics.jsonl", "evaluation") for path in (killed, whole)]
    digests = [[(path / f"digest_{rank}").read_text() for rank in range(case.ranks)] for path in (killed, whole)]
    return {
        "kind": "kills",
        "case": case.name,
        "kills": sum(kill["killed"] for kill in kills),
        "while_saving": sum(kill["killed"] and kill["saving"] for kill in kills),
        "signals": {name: sum(kill["signal"] == name for kill in kills) for name in ("SIGKILL", "SIGSEGV", "SIGABRT")},
        "steps": steps,
        "checkpoints_lost": lost,
        "same_losses": losses[0] == losses[1] and len(losses[1]) == steps,
        "same_evaluations": [row["loss"] for row in evaluations[0]] == [row["loss"] for row in evaluations[1]],
        "same_weights_and_optimizer": digests[0] == digests[1],
        "seconds": round(time.monotonic() - begun),
    }


def soak(work: Path, *, minutes: float, every_s: float) -> dict[str, Any]:
    """Train for some minutes with a kill every so often; count the steps that were taken and the steps that counted."""
    case, run_dir, clock = Case(2, asynchronous=True), work / "soak", random.Random(1)
    shutil.rmtree(run_dir, ignore_errors=True)
    begun, starts = time.monotonic(), []
    while time.monotonic() - begun < 60 * minutes:
        wait_s = clock.uniform(0.5, 1.5) * every_s
        starts.append(kill_once(case, run_dir, clock, steps=10**6, wait_s=wait_s, step_s=0.1)["start_s"])
    seconds = time.monotonic() - begun
    lines = (run_dir / "metrics.jsonl").read_bytes().split(b"\n")
    taken = sum(json.loads(line)["kind"] == "train" for line in lines if line.endswith(b"}"))
    found = find_checkpoint(run_dir)
    useful = 0 if found is None else step_of(found.name)
    return {
        "kind": "soak",
        "case": case.name,
        "minutes": round(seconds / 60, 1),
        "kills": len(starts),
        "steps_taken": taken,
        "steps_lost": taken - useful,
        "goodput": round(useful / taken, 4),
        "seconds_to_restart": round(sum(starts) / len(starts), 2),
        "load": os.getloadavg()[0],
    }


def survived(row: dict[str, Any]) -> bool:
    """Whether nothing was lost by the kills of a row."""
    same = ("same_losses", "same_evaluations", "same_weights_and_optimizer")
    return all(row[name] for name in same) and not row["checkpoints_lost"]


def print_table() -> None:
    rows = [row for row in read_rows(RESULTS) if row["kind"] == "kills"]
    print("| case | kills | while a checkpoint was written | run equal bit for bit |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['case']} | {row['kills']} | {row['while_saving']} | {'yes' if survived(row) else 'NO'} |")
    good = sum(row["kills"] for row in rows if survived(row))
    print(f"| all | {good} of {sum(row['kills'] for row in rows)} | {sum(row['while_saving'] for row in rows)} | |")
    print(*(row for row in read_rows(RESULTS) if row["kind"] != "kills"), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "soak", "table"))
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--only")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every_s", type=float, default=15.0)
    parser.add_argument("--work", type=Path, default=Path("runs/campaign-kills"))
    args = parser.parse_args()
    if args.what == "table":
        return print_table()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    # What DeepSpeed imports and loads late, imported once for all children.
    assert deepspeed.runtime.zero.muon.muon_optimizer and torch._dynamo
    leave_out_shared_memory_operator()
    if args.what == "soak":
        return add_row(RESULTS, soak(args.work, minutes=args.minutes, every_s=args.every_s))
    done = {row["case"] for row in read_rows(RESULTS) if row["kind"] == "kills"}
    for case in CASES:
        if args.only in (None, case.name) and case.name not in done:
            num_kills = 2 * args.kills if case is CASES[0] else args.kills
            row = run_case(case, args.work, num_kills)
            add_row(RESULTS, row)
            assert survived(row), row


if __name__ == "__main__":
    main()
