"""Storms of signals over whole launches: each run must save where it was stopped and go on as if nothing had happened.

    python tests/campaign_storms.py storms [--first 0] [--storms 200] [--whole_imports]
    python tests/campaign_storms.py table

A storm: up to ten SIGTERM, SIGINT, SIGUSR1 and SIGHUP at random moments within 1.5 s, each to one or all processes of a
random kind (bert-ds, DeepSpeed's runner, its per-node launcher, ranks, loader processes), to the process group, or the
end of the terminal. It begins at a random step, or at a random moment of the start, of a new run or of one that goes on
from a checkpoint. Afterwards every process must end by itself and the newest checkpoint must be of the last step that
was taken. The run is then continued, and losses, evaluations and the checkpoint at its end, weights and optimizer, must
have the bits of the run that was left alone.

test_storms has two under nohup: such a run goes on when its terminal is closed and all get SIGHUP, until the storm.

The processes are those of a user: DeepSpeed's runner, its launcher, the ranks and a loader process each. Unless
--whole_imports is given, `light_launcher` spares the two launchers the import of torch. Storms with the same number are
the same; those that are recorded in tests/results/storms.jsonl are not repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from campaign_rows import add_row, read_rows
from forked_verbs import run_verb
from stormed_launch import PATIENCE_S, Blow, Launch, arguments, marked, steps_taken
from test_pretrain import make_workshop

from bert_ds.basics.processes import STOP_SIGNALS
from bert_ds.reporting.run_log import read_metrics
from bert_ds.training.checkpoints.checkpoint_engine import load_safely
from bert_ds.training.checkpoints.checkpoint_folder import find_checkpoint, step_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results/storms.jsonl"
STEPS = 40


class Storm(NamedTuple):
    """What happens to a launch."""

    way: str
    """"deepspeed" or "bert-ds"."""
    ranks: int
    at_step: int | None
    """Where it begins; None: while the launch starts."""
    at_share: float
    """Of the seconds that the start takes."""
    blows: tuple[Blow, ...]
    continued: bool = False
    """The launch finds a checkpoint of an earlier one."""


def make_storm(number: int) -> Storm:
    """Return the storm of this number, the same at every call."""
    draw = random.Random(f"storm {number}")
    way = draw.choice(("deepspeed", "bert-ds"))
    kinds = ["runner", "launcher", "ranks", "loaders", "group", *["bert-ds"] * (way == "bert-ds")]
    targets = draw.sample(kinds, draw.randint(1, len(kinds)))
    count = draw.randint(1, 10)
    blows = [
        Blow(
            draw.choice((0.0, draw.uniform(0.0, 1.5))),
            draw.choice(targets),
            draw.choice(STOP_SIGNALS).name,
            draw.random() < 0.5,
        )
        for _ in range(count)
    ]
    if draw.random() < 0.25:
        blows.append(Blow(draw.uniform(0.0, 1.5), "terminal", "SIGHUP", True))
    at_step = draw.randint(1, STEPS - 2) if draw.random() < 0.75 else None
    ranks, at_share = draw.choice((1, 1, 2)), draw.random()
    continued = at_step is None and draw.random() < 0.5
    return Storm(way, ranks, at_step, at_share, tuple(sorted(blows)), continued)


def storm_under_nohup(way: str) -> Storm:
    """Return one that reaches every process, twice each launcher and rank."""
    kinds = ("runner", "launcher", "ranks", "loaders", "group")
    blows = [Blow(0.0, kind, name, True) for kind in kinds for name in ("SIGTERM", "SIGINT")]
    return Storm(way, 1, 3, 0.0, tuple(blows))


def finish(work: Path, run_dir: Path, *, ranks: int) -> None:
    """Let the run go on to its end, in forked processes."""
    done = run_verb(ROOT / "bert_ds/pretrain.py", *arguments(work, run_dir), world_size=ranks, timeout_s=PATIENCE_S)
    assert done.returncode == 0, f"the continued run of {run_dir} ended with {done.returncode}: {done.stderr[-3000:]}"


def digest(run_dir: Path) -> str:
    """Return a hash of losses, evaluations and of the weights and optimizer state of the newest checkpoint."""
    seen = hashlib.sha256()
    for kind in ("train", "evaluation"):
        rows = read_metrics(run_dir / "metrics.jsonl", kind)
        seen.update(json.dumps([[row["step"], row["loss"]] for row in rows]).encode())
    checkpoint = find_checkpoint(run_dir)
    assert checkpoint is not None
    for path in sorted(checkpoint.glob("*.pt")):
        content = load_safely(path)
        for value in _tensors(content["module"] if "module" in content else content["optimizer_state_dict"]):
            seen.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        yield value.reshape(-1)
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from _tensors(value[key])
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def weather(
    work: Path, storm: Storm, run_dir: Path, *, start_s: float, light: bool, nohup: bool = False
) -> dict[str, Any]:
    """Launch a run into a storm, let it continue, and say what came of it."""
    begun, whole = time.monotonic(), work / f"whole_{storm.ranks}"
    if storm.continued:
        shutil.copytree(whole, run_dir, ignore=shutil.ignore_patterns(f"global_step{STEPS}", "DONE", "run.lock"))
        found = find_checkpoint(run_dir)
        assert found is not None
        rows = [row for row in read_rows(run_dir / "metrics.jsonl") if row["step"] <= step_of(found.name)]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = steps_taken(run_dir)
    draw = random.Random(str(storm))
    launch = Launch(work, run_dir, way=storm.way, ranks=storm.ranks, nohup=nohup, light=light)
    if storm.at_step is None:
        time.sleep(storm.at_share * start_s)
    else:
        launch.await_step(storm.at_step)
    if nohup:
        launch.hang_up()
        for pid in marked(launch.mark):
            os.kill(pid, signal.SIGHUP)
        assert launch.await_step(steps_taken(run_dir) + 5), "a run does not go on under nohup"
    struck = time.monotonic()
    for blow in storm.blows:
        time.sleep(max(0.0, struck + blow.at_s - time.monotonic()))
        launch.strike(blow, draw)
    code = launch.await_end()
    taken, found, done = steps_taken(run_dir), find_checkpoint(run_dir), (run_dir / "DONE").exists()
    saved = 0 if found is None else step_of(found.name)
    if not done:
        finish(work, run_dir, ranks=storm.ranks)
    row = {"took": taken - before, "steps": taken, "saved": saved, "done": done, "code": code, "hangs": code is None}
    same = digest(run_dir) == digest(whole)
    return {**row, "same": same, "seconds": round(time.monotonic() - begun, 1)}


def survived(row: dict[str, Any]) -> bool:
    """Whether nothing was lost: all ended by themselves, the last step was saved, the run came out the same."""
    told = row["way"] != "bert-ds" or not row["took"] or row["code"] == (0 if row["done"] else 75)
    return row["saved"] == row["steps"] and row["same"] and not row["hangs"] and told


def prepare(work: Path, *, steps: int) -> None:
    """Make corpus, recipe and the runs that are left alone."""
    if not (work / "recipe.json").exists():
        make_workshop(work)
        recipe = json.loads((work / "recipe.json").read_text())
        recipe["training"]["total_steps"], recipe["evaluation"]["every_steps"] = steps, 20
        recipe["checkpoints"] = {"every_steps": 15, "keep_last": 2}
        (work / "recipe.json").write_text(json.dumps(recipe))
    for ranks in (1, 2)[: 2 if steps == STEPS else 1]:
        if not (work / f"whole_{ranks}/DONE").exists():
            finish(work, work / f"whole_{ranks}", ranks=ranks)


def time_start(work: Path, *, light: bool) -> float:
    """Return the seconds that a start takes, of a launch that is left alone and must be like the others."""
    shutil.rmtree(work / "start", ignore_errors=True)
    begun, launch = time.monotonic(), Launch(work, work / "start", way="deepspeed", ranks=1, light=light)
    launch.await_step(1)
    start_s = time.monotonic() - begun
    assert launch.await_end() == 0
    assert digest(work / "start") == digest(work / "whole_1"), "a run that is left alone is not repeated"
    return start_s


def print_table() -> None:
    rows = read_rows(RESULTS)
    print("| started by | ranks | storms | signals | while starting | saved where stopped | equal bit for bit | lost |")
    print("|---|---|---|---|---|---|---|---|")
    groups = [(way, ranks) for way in ("deepspeed", "bert-ds") for ranks in (1, 2)]
    for name, mine in [
        *(
            (f"{way} | {ranks}", [row for row in rows if (row["way"], row["ranks"]) == (way, ranks)])
            for way, ranks in groups
        ),
        ("all | ", rows),
    ]:
        sums = [len(mine), sum(len(row["blows"]) for row in mine), sum(row["at_step"] is None for row in mine)]
        sums += [sum(row["saved"] == row["steps"] for row in mine), sum(row["same"] for row in mine)]
        sums += [sum(not survived(row) for row in mine)]
        print(f"| {name} | {' | '.join(map(str, sums))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("storms", "table"))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--storms", type=int, default=200, metavar="N", help="up to storm N - 1")
    parser.add_argument("--whole_imports", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/campaign-storms"))
    args = parser.parse_args()
    if args.what == "table":
        return print_table()
    args.work = args.work.absolute()
    light = not args.whole_imports
    prepare(args.work, steps=STEPS)
    start_s = time_start(args.work, light=light)
    recorded = {row["number"] for row in read_rows(RESULTS)}
    for number in (number for number in range(args.first, args.storms) if number not in recorded):
        storm, run_dir = make_storm(number), args.work / f"storm_{number}"
        shutil.rmtree(run_dir, ignore_errors=True)
        row = weather(args.work, storm, run_dir, start_s=start_s, light=light)
        facts = json.loads((run_dir / "environment.json").read_text())
        known = {"number": number, **storm._asdict(), "whole_imports": args.whole_imports}
        row = {**known, **row, "machine": facts["devices"][0], "commit": facts["commit"]}
        add_row(RESULTS, row)
        if survived(row):
            shutil.rmtree(run_dir)


if __name__ == "__main__":
    main()
