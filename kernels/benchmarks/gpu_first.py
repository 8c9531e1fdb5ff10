"""All that the first minutes on a card should answer, the most important first; run it again to go on.

    make gpu-first                                                  9 minutes
    python kernels/benchmarks/gpu_first.py --minutes 9 --wheels W   where DeepSpeed is not installed: from wheels in W
    python kernels/benchmarks/gpu_first.py --dry_run                every stage at tiny size on a CPU, records nothing

Facts of the machine; the kernel tests that want a card; what in a step waits for it; `make pretrain`'s run and its
export; BERT-base with LAMB under ZeRO 1, 2, 3, whose losses are to be equal; ModernBERT, Muon; operators and whole
steps against others (`bench_gpu`); the profile of a step and the host's part of it; peak memory against the planner's.
Each is a process of its own with a time limit: one that fails is recorded and ends no other. Rows go to
results/gpu_first.csv with GPU, versions and commit. What is done under the same circumstances is not done again; what
failed or ran out of time comes after what has not been tried. Exit codes: 0 all is done, 1 something failed, 75 only
time was short.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from bench_bars import bars_table
from bench_harness import RESULTS, append_rows, read_rows, recorded
from gpu_first_stages import GOES_ON, ROOT, ZERO_STAGES, Stage, counts_of_tests, facts_stage, figures_in, make_stages

DONE, FAILED, UNFINISHED, WAITING = "done", "failed", "unfinished", "not tried"
OUTCOME = "outcome"
CIRCUMSTANCES = ("gpu", "torch", "triton", "commit")
# What a process may take to end when it is asked to; a run saves.
_END_S = 8.0
EQUAL_LOSSES = 0.01
"""Relative difference up to which the losses of two ZeRO stages count as equal: bf16, sums in another order."""


@dataclass(frozen=True)
class FirstRow:
    """One line of the record."""

    time: str
    gpu: str
    torch: str
    triton: str
    commit: str
    driver: str
    transformers: str
    deepspeed: str
    stage: str
    name: str
    value: str
    unit: str
    note: str


class Outcome(NamedTuple):
    """How a stage ended."""

    state: str
    seconds: float
    note: str
    """Of one that is not done: why."""
    figures: list[tuple[str, str, str]]
    """(name, value, unit)."""


def run_stage(stage: Stage, limit_s: float, *, log: Path, environment: Mapping[str, str]) -> Outcome:
    """Run the commands of a stage until one fails or the time is up; what they print goes to a file."""
    begun = time.monotonic()
    limit_s = min(limit_s, stage.limit_s)
    state, note = DONE, ""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        for command in stage.commands:
            left = limit_s - (time.monotonic() - begun)
            minutes = f"{max(0.0, left - _END_S) / 60:.2f}"
            words = [sys.executable, *(word.replace("{minutes}", minutes) for word in command)]
            code = _run(words, left, output=output, environment={**environment, **stage.environment})
            if code is None:
                state, note = UNFINISHED, f"stopped after {time.monotonic() - begun:.0f} s in {_short(command)}"
            elif code != 0:
                state, note = FAILED, f"{_short(command)} ended with {code}: {_last_line(log)}"
            if state != DONE:
                break
    text = log.read_text(encoding="utf-8", errors="replace")
    tests = counts_of_tests(text) if any("pytest" in command for command in stage.commands) else []
    if state == DONE and GOES_ON in text:
        state, note = UNFINISHED, "something is left for the next call"
    return Outcome(state, time.monotonic() - begun, note, [*figures_in(text), *tests])


def _run(words: list[str], limit_s: float, *, output: Any, environment: Mapping[str, str]) -> int | None:
    """Return the exit code of a process, None where its time was up; nothing that it started in its group is left."""
    process = subprocess.Popen(
        words, cwd=ROOT, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        process_group=0,
    )  # fmt: skip
    try:
        return process.wait(max(0.1, limit_s))
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        return None
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _short(command: Sequence[str]) -> str:
    return " ".join(Path(word).name if "/" in word else word for word in command[:2])


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b|FAILED |E  ", line)]
    return (errors or lines or ["it said nothing"])[-1][:200]


def in_order(stages: Sequence[Stage], states: Mapping[str, str]) -> list[Stage]:
    """Return what is to be done: first what was never tried, then what failed or ran out of time."""
    never = [stage for stage in stages if stage.name not in states]
    return never + [stage for stage in stages if states.get(stage.name, DONE) != DONE]


def known_states(path: Path, facts: Mapping[str, str]) -> dict[str, str]:
    """Return how each stage ended the last time under these circumstances; nothing of a commit with changes."""
    if not recorded(path, facts, ("stage",)):
        return {}
    rows = [row for row in read_rows(path) if all(row[name] == facts[name] for name in CIRCUMSTANCES)]
    return {row["stage"]: row["value"] for row in rows if row["name"] == OUTCOME}


def rows_of(stage: str, outcome: Outcome, facts: Mapping[str, str]) -> list[FirstRow]:
    """Return the rows of a stage: its figures, then how it ended."""
    columns = ("gpu", "torch", "triton", "commit", "driver", "transformers", "deepspeed")
    common = {name: facts.get(name, "unknown") for name in columns}
    common |= {"time": datetime.now(UTC).isoformat(timespec="seconds"), "stage": stage}
    rows = [FirstRow(**common, name=name, value=value, unit=unit, note="") for name, value, unit in outcome.figures]
    rows.append(FirstRow(**common, name="seconds", value=f"{outcome.seconds:.1f}", unit="s", note=""))
    return [*rows, FirstRow(**common, name=OUTCOME, value=outcome.state, unit="", note=outcome.note)]


def do_stages(
    stages: Sequence[Stage], *, states: dict[str, str], end: float, do: Callable[[Stage, float], Outcome]
) -> None:
    """Do the stages in turn until the clock says `end` (of time.monotonic), and keep their states."""
    for stage in in_order(stages, states):
        left = end - time.monotonic()
        if left < stage.least_s:
            print(f"{stage.name:14} not begun: {left:.0f} s are left, wanted {stage.least_s:.0f}", flush=True)
            continue
        outcome = do(stage, left)
        states[stage.name] = outcome.state
        print(f"{stage.name:14} {outcome.state} in {outcome.seconds:.0f} s {outcome.note}", flush=True)


def summary(stages: Sequence[Stage], rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a Markdown table of how each stage ended, and what its rows say; `rows` are those of one machine."""
    lines = ["| stage | outcome | found |", "|---|---|---|"]
    for stage in stages:
        own = [row for row in rows if row["stage"] == stage.name]
        ends = [place for place, row in enumerate(own) if row["name"] == OUTCOME]
        if not ends:
            lines.append(f"| {stage.name} | {WAITING} | |")
            continue
        last = own[ends[-2] + 1 if len(ends) > 1 else 0 : ends[-1]]
        found = "; ".join(f"{row['name']} {row['value']} {row['unit']}".strip() for row in last)
        note = own[ends[-1]]["note"].replace("|", "/")
        lines.append(f"| {stage.name} | {own[ends[-1]]['value']} | {f'{note}; ' if note else ''}{found} |")
    return [*lines, "", losses_line(rows)]


def losses_line(rows: Sequence[Mapping[str, str]]) -> str:
    """Say whether the ZeRO stages gave the same losses."""
    losses: list[dict[str, float]] = [
        {row["name"]: float(row["value"]) for row in rows if row["stage"] == f"zero{n}" and row["name"][:5] == "loss "}
        for n in ZERO_STAGES
    ]
    if not all(losses):
        return "losses under ZeRO 1, 2, 3: not measured"
    common = set.intersection(*(set(each) for each in losses))
    at_steps = [[each[name] for each in losses] for name in common]
    apart = [max(values) / min(values) - 1 for values in at_steps]
    if not apart or not all(math.isfinite(value) for values in at_steps for value in values):
        return "losses under ZeRO 1, 2, 3: NOT equal: a run has other steps, or a loss that is no number"
    verdict = "equal" if max(apart) <= EQUAL_LOSSES else "NOT equal"
    return f"losses under ZeRO 1, 2, 3: {verdict}: at most {100 * max(apart):.3f} % apart at {len(common)} steps"


def install_wheels(wheels: Path, target: Path) -> str:
    """Install all wheels of a folder into another one, and return what went wrong, "" where nothing did."""
    found = sorted(str(wheel) for wheel in wheels.glob("*.whl"))
    if not found:
        return f"--wheels: {wheels} holds no *.whl"
    options = ("--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(target))
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *options, *found]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]


def make_environment(site: Path | None, *, dry_run: bool) -> dict[str, str]:
    """Return the variables of the stages' processes: this checkout, then what came of wheels, then what was there."""
    paths = [ROOT, ROOT / "kernels", *([site] if site else []), os.environ.get("PYTHONPATH", "")]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path))}
    # DeepSpeed's own launcher is not asked for one rank; PATH may lack it.
    return found | {"HF_HUB_OFFLINE": "1"} | ({"DS_ACCELERATOR": "cpu"} if dry_run else {})


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call (default: %(default)s)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that are put before what is installed")
    parser.add_argument("--stages", nargs="+", help="these alone")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/gpu_first", help="folder of runs and logs")
    parser.add_argument("--commit", help="what the rows say in a copy of the files that git does not know")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="tiny sizes on a CPU, records nothing")
    return parser.parse_args()


def main() -> int:
    """Learn what machine this is, do what the record lacks, say what was found."""
    args = parse()
    end = time.monotonic() + 60 * args.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the running stage is ended too
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-first-")))
        results = scratch / "results" if args.dry_run else args.results.absolute()
        trouble = install_wheels(args.wheels, scratch / "site") if args.wheels else ""
        environment = make_environment(scratch / "site" if args.wheels else None, dry_run=args.dry_run)
        logs = (scratch if args.dry_run else args.work.absolute()) / "logs"
        first = run_stage(facts_stage(args.commit), 90.0, log=logs / "facts.log", environment=environment)
        facts = {name: value for name, value, _ in first.figures}
        if facts.get("device") == "cpu" and not args.dry_run:
            raise SystemExit("no CUDA device: nothing here is worth measuring; --dry_run tries the stages themselves")
        facts = {name: "unknown" for name in CIRCUMSTANCES} | facts
        path = results / "gpu_first.csv"
        states = known_states(path, facts)
        append_rows(path, rows_of("facts", first, facts))
        if trouble:
            print(f"wheels: {trouble}", flush=True)
            append_rows(path, rows_of("wheels", Outcome(FAILED, 0.0, trouble, []), facts))
        for name, value, unit in first.figures:
            print(f"{name:>16}: {value} {unit}".rstrip())
        work = (scratch if args.dry_run else args.work.absolute()) / work_name(facts)
        stages = make_stages(work, results=results, commit=args.commit, dry_run=args.dry_run)
        stages = [stage for stage in stages if not args.stages or stage.name in args.stages]

        def do(stage: Stage, left: float) -> Outcome:
            outcome = run_stage(stage, left, log=logs / f"{stage.name}.log", environment=environment)
            append_rows(path, rows_of(stage.name, outcome, facts))
            return outcome

        do_stages(stages, states=states, end=end, do=do)
        code = finish([facts_stage(None), *stages], {"facts": first.state, **states}, results=results, facts=facts)
        return 1 if trouble else code


def work_name(facts: Mapping[str, str]) -> str:
    """Return the folder of the runs of one GPU and commit; of a commit with changes one for each call."""
    commit = facts["commit"]
    stamp = f"-{time.time_ns()}" if commit == "unknown" or commit.endswith("+") else ""
    return re.sub(r"[^\w.-]+", "_", f"{commit}-{facts['gpu']}{stamp}")


def finish(stages: Sequence[Stage], states: Mapping[str, str], *, results: Path, facts: Mapping[str, str]) -> int:
    """Print what the records say of this machine and the bars, and return the exit code."""
    rows = [
        row for row in read_rows(results / "gpu_first.csv") if all(row[name] == facts[name] for name in CIRCUMSTANCES)
    ]
    print("", *summary(stages, rows), "", sep="\n")
    print(*bars_table(read_rows(results / "ops.csv"), read_rows(results / "train_step.csv")), sep="\n")
    left = [stage.name for stage in stages if states.get(stage.name) != DONE]
    if left:
        print(f"\nnot done: {', '.join(left)}; {GOES_ON}")
    if facts["commit"].endswith("+"):
        print("the checkout has changes: nothing of this call counts as done in the next one")
    if FAILED in [states.get(stage.name) for stage in stages]:
        return 1
    return 75 if left else 0


if __name__ == "__main__":
    sys.exit(main())
