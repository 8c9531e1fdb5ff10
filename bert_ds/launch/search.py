"""`finetune --search`: starts the trials of a search, each a fine-tuning in a process and a run folder of its own.

    bert-ds finetune --task sst2 --data DATA --model DIR --search space.json --run_dir runs/sst2_search

A trial is what `--trial N` of the same command line trains; the search only starts those that are not finished, so
many at a time as there are GPUs or shares of the cores, and compares what they leave behind. The best one on the
validation rows is then scored on the test rows, which no trial looks at.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bert_ds.basics.input_gate import read_json
from bert_ds.basics.processes import signal_at_parents_death, stop_signals_heard
from bert_ds.basics.ranks import EXIT_DIVERGED, EXIT_DONE, EXIT_RUN_AGAIN, DataError, DivergedError, read_ranks
from bert_ds.basics.whole_files import write_json
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.task.search_space import Trial
from bert_ds.configuration.task.task_config import TaskConfig, dump_task
from bert_ds.folders.kept_files import keeping_files
from bert_ds.folders.output_folders import open_run_folder
from bert_ds.launch.launch_checks import checked_task, task_folders
from bert_ds.launch.launcher import OF_ONE_RANK

PLAN = "search.json"
"""In the folder of a search: what is compared, and which trials have diverged."""
Show = Callable[[Path, dict[str, Any]], None]
_VERBS = Path(__file__).resolve().parents[1]
_LOOK_EVERY_S = 0.2


def enter_search(args: argparse.Namespace) -> tuple[Path, TaskConfig]:
    """Check the trials, and that the folder is new or that of the same search; return it and the task before trials.

    Raises:
        ConfigError: a trial is no valid fine-tuning, or the folder belongs to another search.
    """
    base = argparse.Namespace(**{**vars(args), "set": args.base_set, "trial": None})
    task, ds = checked_task(base)
    for trial in args.trials if args.trial is None else args.trials[args.trial :][:1]:
        try:
            checked_task(argparse.Namespace(**{**vars(base), "set": [*args.base_set, *trial.overrides]}))
        except ConfigError as error:
            lines = [line.removeprefix("--set: ") for line in str(error).splitlines()]
            raise ConfigError(f"{args.search}: trial {trial.number} ({trial.text}): " + "\n".join(lines)) from None
    folder, _ = task_folders(base, task)
    facts: dict[str, Any] = {
        "task": json.loads(dump_task(task)),
        "model": str(args.model.absolute()),
        "deepspeed_config": ds.settings,
        "seeds": args.seeds,
        "random_weights": args.random_weights,
    }
    trials = [trial.settings for trial in args.trials]
    open_run_folder(folder)
    begun = _read(folder / PLAN)
    changed = [name for name, value in facts.items() if begun and begun.get(name) != value]
    if changed or begun.get("trials", []) != trials[: len(begun.get("trials", []))]:
        what = f"another {changed[0]}" if changed else "other trials"
        wanted = "wanted the same search, which goes on, one with more trials behind those, or another --run_dir"
        raise ConfigError(f"{folder} was begun with {what}: {wanted}")
    if begun.get("trials") != trials:
        if begun:
            print(f"{folder}: {len(trials) - len(begun['trials'])} trials more than it was begun with")
        _write(folder, PLAN, {**facts, "trials": trials, "diverged": begun.get("diverged", [])})
    return folder, task


def check_or_search(args: argparse.Namespace, *, show: Show) -> None:
    """Refuse what of a fine-tuning can be refused without torch; a search, which needs none, runs and ends here.

    Raises:
        SystemExit: of a search, with its exit code.
    """
    if args.search is None:
        checked_task(args)
    elif args.trial is None:
        raise SystemExit(run_search(args, show=show))
    else:
        enter_search(args)


def run_search(args: argparse.Namespace, *, show: Show) -> int:
    """Run what is not finished, choose, look at the test rows once, write results.json and show it.

    Args:
        args: of finetune.py, without --trial.
        show: takes the folder of the search and what stands in its results.json.

    Returns:
        The exit code: 0, that of a trial that failed, or 75 where the search was asked to stop.
    """
    if (found := read_ranks().world_size) > 1:
        raise ConfigError(f"--search starts its trials itself: found {found} ranks, wanted no launcher; see --parallel")
    folder, task = enter_search(args)
    if code := _Trials(args, folder, task.chosen_metric).run():
        return code
    rows = [row for one in args.trials if (row := trial_row(folder, one, task.chosen_metric)) is not None]
    rows.sort(key=lambda row: math.inf if row["value"] is None else -row["value"])
    if rows[0]["value"] is None:
        raise DivergedError(f"{folder}: no trial has a {task.chosen_metric}: wanted lower learning rates")
    best = next(one for one in args.trials if one.folder == rows[0]["trial"])
    results: dict[str, Any] = {"task": task.name, "metric": task.chosen_metric, "chosen": best.folder, "trials": rows}
    if task.data.test:
        if code := _look_at_test(args, folder, best):
            return code
        results |= _test_results(folder, best, args.seeds)
    _write(folder, "results.json", results)
    show(folder, results)
    return EXIT_DONE


def trial_row(folder: Path, trial: Trial, metric: str) -> dict[str, Any] | None:
    """Return a trial's row of the table, None where it is not finished; one that diverged has no value."""
    row = {"trial": trial.folder, "settings": trial.settings, "value": None, "deviation": None, "step": None}
    if trial.number in _read(folder / PLAN).get("diverged", []):
        return row
    path = folder / trial.folder
    results = _read(path / "results.json")
    runs = [path / f"seed_{seed}" for seed in results.get("seeds", [])] or [path]
    if "validation" not in results or not all((run / "DONE").is_file() for run in runs):
        return None
    value = results["validation"].get(metric)
    if isinstance(value, dict):  # several seeds
        row["deviation"], value = value["deviation"], value["mean"]
    if not isinstance(value, int | float):
        raise DataError(f"{path}/results.json has no {metric} of the validation rows: wanted rows with labels")
    return row | {"value": value if math.isfinite(value) else None, "step": results.get("step")}


def gpus(devices: Path = Path("/dev")) -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES calls each GPU that a trial may have."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name.strip()]
    return [str(number) for number, _ in enumerate(devices.glob("nvidia[0-9]*"))]


def start(command: Sequence[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, which is asked to stop when this one dies; what it says goes to log."""
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal_at_parents_death(signal.SIGTERM),
        )


class _Trials:
    """The trials that run, one in each place."""

    def __init__(self, args: argparse.Namespace, folder: Path, metric: str) -> None:
        self._args, self._folder, self._metric = args, folder, metric
        cards = gpus()
        cores = len(os.sched_getaffinity(0))
        self._num_places = args.parallel or len(cards) or max(1, cores // 4)
        threads = {"OMP_NUM_THREADS": str(max(1, cores // self._num_places))}
        self._environments = [
            threads | _alone() | ({"CUDA_VISIBLE_DEVICES": cards[place % len(cards)]} if cards else {})
            for place in range(self._num_places)
        ]
        self._running: dict[int, tuple[Trial, Any, float]] = {}
        self._is_asked = False
        self._code = EXIT_DONE

    def run(self) -> int:
        """Run all that are not finished; return the exit code."""
        for number in stop_signals_heard():
            signal.signal(number, lambda number, frame: self._ask())
        left = [trial for trial in self._args.trials if trial_row(self._folder, trial, self._metric) is None]
        done = len(self._args.trials) - len(left)
        print(f"{self._folder}: {len(self._args.trials)} trials, {done} of them done, {self._num_places} at a time")
        is_told = False
        while left or self._running:
            for place in range(self._num_places):
                if left and place not in self._running and not self._is_asked and not self._code:
                    trial = left.pop(0)
                    self._running[place] = (trial, self._start(trial, place), time.monotonic())
            if not self._running:
                break
            time.sleep(_LOOK_EVERY_S)
            if self._is_asked and not is_told:
                is_told = True
                for _, process, _ in self._running.values():
                    process.send_signal(signal.SIGTERM)
            for place, (trial, process, since) in list(self._running.items()):
                if (code := process.poll()) is not None:
                    del self._running[place]
                    self._ended(trial, code, seconds=time.monotonic() - since)
        if self._is_asked and not self._code and left:
            print(f"{self._folder}: asked to stop, {len(left)} trials have not begun; the same command continues")
        return self._code or (EXIT_RUN_AGAIN if self._is_asked else EXIT_DONE)

    def _start(self, trial: Trial, place: int) -> Any:
        words = [*sys.argv[1:], "--trial", str(trial.number), "--resume", "auto"]
        command = [sys.executable, str(_VERBS / "finetune.py"), *words]
        return start(command, self._environments[place], _log(self._folder, trial))

    def _ended(self, trial: Trial, code: int, *, seconds: float) -> None:
        what = f"{trial.folder} ({trial.text})"
        if code == EXIT_DIVERGED:
            plan = _read(self._folder / PLAN)
            _write(self._folder, PLAN, {**plan, "diverged": [*plan["diverged"], trial.number]})
            print(f"{what}: diverged after {seconds:.0f} s", flush=True)
        elif code == EXIT_DONE and (row := trial_row(self._folder, trial, self._metric)) is not None:
            print(f"{what}: {self._metric} {row['value']}, {seconds:.0f} s", flush=True)
        elif not (self._is_asked and (code < 0 or code == EXIT_RUN_AGAIN)):
            # A negative code is a signal's, as of the kernel where memory ran out.
            self._code = self._code or (code if code > 0 else EXIT_RUN_AGAIN)
            said = _last_line(_log(self._folder, trial))
            print(f"{what} ended with {code}: {said}; see {_log(self._folder, trial)}", file=sys.stderr, flush=True)

    def _ask(self) -> None:
        self._is_asked = True


def _look_at_test(args: argparse.Namespace, folder: Path, trial: Trial) -> int:
    """Score the chosen trial on the test rows, unless that was done; return the exit code."""
    looks = [name for name in _looks(folder) if name != trial.folder]
    if looks:
        print(f"the test rows have been looked at by {', '.join(looks)} before: this is no first look at them")
    words = ["--task", str(args.task), "--side", "test", *(["--data", str(args.data)] if args.data else [])]
    words += [word for override in (*args.base_set, *trial.overrides) for word in ("--set", override)]
    for below in _seed_folders(args.seeds):
        output = folder / "test" / trial.folder / below
        if (output / "results.json").is_file():
            continue
        output.parent.mkdir(parents=True, exist_ok=True)
        places = ["--model", str(folder / trial.folder / below / "hf"), "--output", str(output)]
        command = [sys.executable, str(_VERBS / "score.py"), *words, *places]
        log = folder / "logs/test.out"
        if code := start(command, _alone(), log).wait():
            print(f"scoring the test rows ended with {code}: {_last_line(log)}; see {log}", file=sys.stderr)
            return code if code > 0 else EXIT_RUN_AGAIN
    return EXIT_DONE


def _test_results(folder: Path, trial: Trial, seeds: Sequence[int] | None) -> dict[str, Any]:
    """Return the figures of the chosen trial on the test rows, means where there are several seeds."""
    found = [_read(folder / "test" / trial.folder / b / "results.json").get("test", {}) for b in _seed_folders(seeds)]
    names = [name for name in found[0] if all(name in one for one in found)]
    means = {name: math.fsum(one[name] for one in found) / len(found) for name in names}
    return {"test": means, "test_looked_at_by": _looks(folder)}


def _looks(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "test").glob("trial_*"))


def _seed_folders(seeds: Sequence[int] | None) -> list[str]:
    return [f"seed_{seed}" for seed in seeds or ()] or ["."]


def _alone() -> dict[str, str]:
    """Return the environment of a process that is the only rank of a launch, whatever this one was started by."""
    return {
        name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT")
    } | OF_ONE_RANK


def _log(folder: Path, trial: Trial) -> Path:
    return folder / "logs" / f"{trial.folder}.out"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if ": error: " in line]
    return (errors or [line for line in lines if line.strip()] or ["it said nothing"])[-1][:500]


def _write(folder: Path, name: str, value: dict[str, Any]) -> None:
    with keeping_files(folder, [name]):
        write_json(folder / name, value)


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of ours; {} where there is none yet."""
    if not path.is_file():
        return {}
    value = read_json(path, error=DataError)
    if not isinstance(value, dict):
        raise DataError(f"{path}: found {type(value).__name__}, wanted an object")
    return value
