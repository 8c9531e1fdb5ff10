"""Storms of signals over whole launches: each run must save where it was stopped and go on as if nothing had happened.

    python tests/campaign_storms.py storms [--first 0] [--storms 200] [--whole_imports]
    python tests/campaign_storms.py table

A storm: up to ten SIGTERM, SIGINT, SIGUSR1 and SIGHUP at random moments within 1.5 s, each to one or all processes of a
random kind (bert-ds, DeepSpeed's runner, its per-node launcher, ranks, loader processes), to the process group, or the
end of the terminal. It begins at a random moment of the start or at a random step. Afterwards every process must end by
itself and the newest checkpoint must be of the last step that was taken. The run is then continued, and losses,
evaluations and the checkpoint at its end, weights and optimizer, must have the bits of the run that was left alone.

The processes are those of a user: DeepSpeed's runner, its launcher, the ranks and a loader process each. Unless
--whole_imports is given, `light_launcher` spares the two launchers the import of torch. Storms with the same number are
the same; those that are recorded in tests/results/storms.jsonl are not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from campaign_rows import add_row, read_rows
from ranks_harness import free_port
from test_pretrain import make_workshop

from bert_ds import pretrain
from bert_ds.processes import STOP_SIGNALS, command_of, is_rank, parent_of, process_identity
from bert_ds.reporting.run_log import read_metrics
from bert_ds.training.checkpoint_engine import load_safely
from bert_ds.training.checkpoint_folder import find_checkpoint, step_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results/storms.jsonl"
STEPS = 40
MARK = "BERT_DS_STORM"
"""Environment variable by which all processes of a launch are known, whoever has become their parent."""
PATIENCE_S = 300.0


class Blow(NamedTuple):
    """A signal of a storm."""

    at_s: float
    target: str
    """A kind of process, "group" or "terminal"."""
    signal: str
    every: bool
    """To all processes of the kind, not to a random one."""


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
    return Storm(way, draw.choice((1, 1, 2)), at_step, draw.random(), tuple(sorted(blows)))


class Launch:
    """A launch on a terminal of its own."""

    def __init__(
        self, work: Path, run_dir: Path, *, way: str, ranks: int, nohup: bool = False, light: bool = True
    ) -> None:
        self.mark = f"{run_dir.name}-{os.urandom(4).hex()}"
        self.run_dir, self._is_read = run_dir, True
        launcher = ["--num_gpus", str(ranks), "--master_port", str(free_port())]
        if way == "bert-ds":
            command = [sys.executable, "-m", "bert_ds.console", "pretrain", *launcher, "--", *arguments(work, run_dir)]
        else:
            script = [str(ROOT / "bert_ds/pretrain.py"), *arguments(work, run_dir)]
            command = [sys.executable, "-m", "deepspeed.launcher.runner", *launcher, *script]
        path = os.environ.get("PYTHONPATH", "")
        environment = {**os.environ, MARK: self.mark, "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = f"{ROOT / 'tests/light_launcher'}:{path}" if light else path
        self.terminal, side = os.openpty()
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=side,
            stdout=side,
            stderr=side,
            start_new_session=True,
            preexec_fn=partial(_take_terminal, nohup),
        )
        os.close(side)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with (self.run_dir.parent / f"{self.run_dir.name}.txt").open("ab") as copy, contextlib.suppress(OSError):
            while self._is_read:
                if select.select([self.terminal], [], [], 0.1)[0]:
                    copy.write(os.read(self.terminal, 65536))
                    copy.flush()

    def hang_up(self) -> None:
        """Close the terminal; what is written to it from now on fails."""
        if self._is_read:
            self._is_read = False
            self._reader.join()
            os.close(self.terminal)

    def processes(self) -> dict[str, list[int]]:
        """Return the living processes by kind."""
        found: dict[str, list[int]] = {"bert-ds": [], "runner": [], "launcher": [], "ranks": [], "loaders": []}
        for pid in marked(self.mark):
            command = command_of(pid)
            if is_rank(pid):
                kind = "loaders" if is_rank(parent_of(pid)) else "ranks"
            elif "deepspeed.launcher" in command:
                kind = "runner" if "deepspeed.launcher.runner" in command else "launcher"
            else:
                kind = "bert-ds"
            found[kind].append(pid)
        return found

    def strike(self, blow: Blow, draw: random.Random) -> None:
        """Send the signal of a blow, if there is somebody to receive it."""
        number = signal.Signals[blow.signal]
        if blow.target == "terminal":
            return self.hang_up()
        with contextlib.suppress(ProcessLookupError):
            if blow.target == "group":
                return os.killpg(self.process.pid, number)
            pids = self.processes()[blow.target]
            for pid in pids if blow.every else draw.sample(pids, min(1, len(pids))):
                os.kill(pid, number)

    def await_step(self, step: int) -> bool:
        """Wait until a step has been taken; False where the launch ends before."""
        while steps_taken(self.run_dir) < step:
            if self.process.poll() is not None and not marked(self.mark):
                return False
            time.sleep(0.05)
        return True

    def await_end(self) -> int | None:
        """Wait for the end of all processes; return the exit code, None where they had to be killed."""
        deadline = time.monotonic() + PATIENCE_S
        while marked(self.mark) and time.monotonic() < deadline:
            self.process.poll()
            time.sleep(0.1)
        left = marked(self.mark)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        code = self.process.wait()
        self.hang_up()
        return None if left else code


def _take_terminal(nohup: bool) -> None:
    for number in (*STOP_SIGNALS, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    if nohup:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def marked(mark: str) -> list[int]:
    """Return the living processes whose environment has the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry.name)
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes() and process_identity(pid):
                found.append(pid)
    return found


def arguments(work: Path, run_dir: Path) -> list[str]:
    """Return what pretrain is told."""
    files = ("--run", work / "recipe.json", "--deepspeed_config", ROOT / "ds_configs/zero2.json")
    return [*map(str, files), "--run_dir", str(run_dir), "--resume", "auto"]


def steps_taken(run_dir: Path) -> int:
    """Return the newest step of the run folder."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def finish(work: Path, run_dir: Path, *, ranks: int) -> None:
    """Let the run go on to its end, in processes forked from this one, which has imported everything."""
    port, pids = free_port(), []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            try:
                out = os.open(run_dir.parent / f"{run_dir.name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                os.dup2(out, 1)
                os.dup2(out, 2)
                facts = {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": ranks,
                    "LOCAL_SIZE": ranks,
                    "MASTER_PORT": port,
                }
                os.environ.update({name: str(value) for name, value in facts.items()}, MASTER_ADDR="127.0.0.1")
                sys.argv = [pretrain.__file__, *arguments(work, run_dir)]
                os._exit(pretrain.main())
            finally:
                os._exit(1)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * ranks, f"the continued run ended with {codes}: see {run_dir}.txt"


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


def weather(work: Path, storm: Storm, run_dir: Path, *, start_s: float, light: bool) -> dict[str, Any]:
    """Launch a run into a storm, let it continue, and say what came of it."""
    begun = time.monotonic()
    draw, launch = random.Random(str(storm)), Launch(work, run_dir, way=storm.way, ranks=storm.ranks, light=light)
    if storm.at_step is None:
        time.sleep(storm.at_share * start_s)
    else:
        launch.await_step(storm.at_step)
    struck = time.monotonic()
    for blow in storm.blows:
        time.sleep(max(0.0, struck + blow.at_s - time.monotonic()))
        launch.strike(blow, draw)
    code = launch.await_end()
    taken, found, done = steps_taken(run_dir), find_checkpoint(run_dir), (run_dir / "DONE").exists()
    saved = 0 if found is None else step_of(found.name)
    if not done:
        finish(work, run_dir, ranks=storm.ranks)
    row = {"steps": taken, "saved": saved, "done": done, "code": code, "hangs": code is None}
    same = digest(run_dir) == digest(work / f"whole_{storm.ranks}")
    return {**row, "same": same, "seconds": round(time.monotonic() - begun, 1)}


def survived(row: dict[str, Any]) -> bool:
    """Whether nothing was lost: all ended by themselves, the last step was saved, the run came out the same."""
    trained = row["steps"] > 0
    told = row["way"] != "bert-ds" or not trained or row["code"] == (0 if row["done"] else 75)
    return row["saved"] == row["steps"] and row["same"] and not row["hangs"] and told


def prepare(work: Path, *, light: bool) -> float:
    """Make corpus, recipe and the runs that are left alone; return the seconds that a start takes."""
    if not (work / "recipe.json").exists():
        make_workshop(work)
        recipe = json.loads((work / "recipe.json").read_text())
        recipe["training"]["total_steps"], recipe["evaluation"]["every_steps"] = STEPS, 20
        recipe["checkpoints"] = {"every_steps": 15, "keep_last": 2}
        (work / "recipe.json").write_text(json.dumps(recipe))
    for ranks in (1, 2):
        if not (work / f"whole_{ranks}/DONE").exists():
            finish(work, work / f"whole_{ranks}", ranks=ranks)
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
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    args.work = args.work.absolute()
    start_s = prepare(args.work, light=not args.whole_imports)
    recorded = {row["number"] for row in read_rows(RESULTS)}
    for number in (number for number in range(args.first, args.storms) if number not in recorded):
        storm, run_dir = make_storm(number), args.work / f"storm_{number}"
        shutil.rmtree(run_dir, ignore_errors=True)
        row = weather(args.work, storm, run_dir, start_s=start_s, light=not args.whole_imports)
        facts = json.loads((run_dir / "environment.json").read_text())
        known = {"number": number, **storm._asdict(), "whole_imports": args.whole_imports}
        row = {**known, **row, "machine": facts["devices"][0], "commit": facts["commit"]}
        add_row(RESULTS, row)
        if survived(row):
            shutil.rmtree(run_dir)


if __name__ == "__main__":
    main()
