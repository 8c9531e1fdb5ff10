"""The state of a run as its folder and Slurm's queue tell it, read in milliseconds whatever the length of the run."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bert_ds.basics.exit_record import read_exits
from bert_ds.basics.input_gate import open_regular, parse_json, read_json, read_text
from bert_ds.basics.ranks import EXIT_DIVERGED, EXIT_DONE, EXIT_RUN_AGAIN
from bert_ds.basics.slurm_queue import QueuedJob
from bert_ds.configuration.reading.config_problems import found_wanted, printable
from bert_ds.reporting.run_pulse import is_alive

TAIL_BYTES = 64_000
"""Of metrics.jsonl and of a log; a row has some hundred bytes."""
MARKS = ("metrics.jsonl", "run_config.json", "task_config.json", "submit.json", "slurm_job")
"""A folder with one of these is a run."""
SILENT_S = 120.0
"""A run that no scheduler watches and that has no lock counts as dead after this long without a row, and at least ten
times a row's time."""

State = Literal["running", "waiting", "stopped", "dead", "unreadable", "failed", "diverged", "done"]
STATES: tuple[State, ...] = ("running", "waiting", "stopped", "dead", "unreadable", "failed", "diverged", "done")
"""In the order of the table: what is under way, what wants somebody, what is over."""


class RunOverview(NamedTuple):
    """One line of the table; None is what the folder does not tell."""

    run_dir: str
    state: State
    step: int
    total_steps: int | None
    loss: float | None
    """Of the newest training row, over the targets of the recipe's masks."""
    masked_loss: float | None
    """At [MASK], of the newest evaluation row."""
    tokens_per_s: float | None
    eta_s: float | None
    attempts: int
    job: str | None
    """Number of the Slurm job."""
    job_state: str | None
    """Its state in the queue; None where it is not in the queue."""
    updated: float | None
    """Time of the newest row, in seconds since 1970."""
    note: str
    """One sentence: why it waits, how it ended, what comes next."""


def find_runs(folder: Path, *, depth: int = 3) -> Iterator[Path]:
    """Yield the run folders in a folder, itself included, in the order of their names, and what cannot be listed."""
    try:
        is_run = any((folder / name).exists() for name in MARKS)
        entries = sorted(os.scandir(folder), key=lambda one: one.name) if depth and folder.is_dir() else []
    except OSError:
        is_run, entries = True, []
    if is_run:
        yield folder
    for entry in entries:
        with contextlib.suppress(OSError):
            if entry.is_dir(follow_symlinks=False) and entry.name not in ("checkpoints", "logs", "tokenizer", "hf"):
                yield from find_runs(Path(entry.path), depth=depth - 1)


def read_overview(run_dir: Path, *, queue: Mapping[str, QueuedJob] | None, now: float) -> RunOverview:
    """Return what a run folder and the queue say; of a folder that cannot be read, why.

    Args:
        run_dir: the run folder.
        queue: from `read_queue`; None where there is no Slurm.
        now: seconds since 1970.
    """
    try:
        return _read(run_dir, queue=queue, now=now)
    except Exception as error:  # whatever lies in one folder, the table shows the others
        note = printable(f"{type(error).__name__}: {error}")
        nothing: dict[str, Any] = dict.fromkeys(RunOverview._fields)
        told = {"run_dir": str(run_dir), "state": "unreadable", "step": 0, "attempts": 0, "note": note}
        return RunOverview(**{**nothing, **told})


def _read(run_dir: Path, *, queue: Mapping[str, QueuedJob] | None, now: float) -> RunOverview:
    os.scandir(run_dir).close()  # a folder that may not be listed is no empty one
    rows = _tail_rows(run_dir / "metrics.jsonl")
    start: dict[str, Any] = next((row for row in reversed(rows) if row.get("kind") == "start"), {})
    trained = [row for row in rows[rows.index(start) if start else 0 :] if row.get("kind") == "train"]
    last: dict[str, Any] = trained[-1] if trained else {}
    job = _job_number(run_dir)
    queued = queue.get(job) if queue is not None and job is not None else None
    updated = _number(rows[-1], "time") if rows else None
    silent_s = now - (updated or 0.0)
    limit_s = max(SILENT_S, 10 * (_number(last, "seconds") or 0.0))
    in_queue = None if queue is None or job is None else (queued.state if queued else "")
    alive = is_alive(run_dir, now=now)
    state, note = _state(run_dir, in_queue=in_queue, alive=alive, is_silent=silent_s > limit_s)
    if queued and state == "waiting":
        note = f"{note}; Slurm: {queued.reason}" if note else f"Slurm: {queued.reason}"
    if state == "running" and silent_s > limit_s and rows:
        note = f"no row for {silent_s / 60:.0f} min"
    step = int(max(_number(last, "step") or 0, _number(start, "step") or 0))
    speaks = state in ("running", "waiting", "stopped")
    return RunOverview(
        run_dir=str(run_dir),
        state=state,
        step=step,
        total_steps=_total_steps(run_dir),
        loss=_number(last, "loss"),
        masked_loss=next(
            (_number(row, "loss_mlm_masked") for row in reversed(rows) if _is_evaluation(row, up_to=step)), None
        ),
        tokens_per_s=_number(last, "tokens_per_s"),
        eta_s=_number(last, "eta_s") if speaks else None,
        attempts=int(max((_number(row, "attempt") or 0 for row in rows), default=0)),
        job=job,
        job_state=queued.state if queued else None,
        updated=updated,
        note=printable(note),
    )


def _is_evaluation(row: Mapping[str, Any], *, up_to: int) -> bool:
    """Whether it is one that no later attempt has superseded by going back behind it."""
    return row.get("kind") == "evaluation" and (_number(row, "step") or 0) <= up_to


def _state(run_dir: Path, *, in_queue: str | None, alive: bool | None, is_silent: bool) -> tuple[State, str]:
    """Return the state and a note.

    Args:
        run_dir: the run folder.
        in_queue: state of its job; None where no Slurm can be asked, "" where it has no such job.
        alive: whether the lock says that a launch is there; None where there is no lock.
        is_silent: no row has come for too long.
    """
    verdict = _read_json(run_dir / "restarts.json")
    reason = str(verdict.get("reason", ""))
    if in_queue in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"):
        return "waiting", reason
    if in_queue or alive:
        return "running", ""
    if (run_dir / "DONE").exists():
        return "done", ""
    failed = _failure(run_dir)
    if failed is not None:
        return failed
    if verdict.get("action") == "requeue" and in_queue is None:
        return "waiting", reason
    if verdict.get("action") == "stop":
        return ("stopped" if verdict.get("exit_code") == EXIT_RUN_AGAIN else "failed"), reason
    if in_queue == "":
        return "dead", f"Slurm no longer knows its job{'; ' + reason if reason else ''}"
    if alive is None and not is_silent:
        return "running", ""
    return _without_scheduler(run_dir)


def _failure(run_dir: Path) -> tuple[State, str] | None:
    """Return the error that a rank of the last launch has recorded, where it is one that ends a run."""
    verdict = _read_json(run_dir / "restarts.json")
    for rank, record in read_exits(run_dir / "logs/exits").items():
        if record.code in (EXIT_DONE, EXIT_RUN_AGAIN) or verdict.get("action") == "again":
            continue
        text = record.message.splitlines()[0] if record.message else f"exit code {record.code}"
        return ("diverged" if record.code == EXIT_DIVERGED else "failed"), f"rank {rank}: {text}"
    return None


def _without_scheduler(run_dir: Path) -> tuple[State, str]:
    lines = _tail(run_dir / "logs/rank_0.log").decode(errors="replace").splitlines()
    told = next((line for line in reversed(lines) if re.search("asked to stop|was not written|step [0-9]+/", line)), "")
    if "asked to stop" in told:
        return "stopped", "--resume auto continues it"
    errors = [line for line in lines if " ERROR " in line or "was not written" in line]
    return "dead", errors[-1] if errors else "no sign of life; --resume auto continues it"


def _job_number(run_dir: Path) -> str | None:
    """Return the newer of the job that ran here last and the one that was submitted last."""
    found = []
    for name, read in (("slurm_job", _read_number), ("submit.json", lambda path: str(_read_json(path).get("job", "")))):
        path = run_dir / name
        if path.is_file() and re.fullmatch("[0-9]{1,18}", number := read(path)):
            found.append((path.stat().st_mtime, number))
    return max(found)[1] if found else None


def _read_number(path: Path) -> str:
    try:
        return read_text(path, max_bytes=100).strip()
    except ValueError:
        return ""


def _total_steps(run_dir: Path) -> int | None:
    found = _read_json(run_dir / "run_config.json").get("training")
    total = found.get("total_steps") if isinstance(found, dict) else None
    if isinstance(total, int):
        return total
    told = re.findall(rb"step [0-9]+/([0-9]+)  loss", _tail(run_dir / "logs/rank_0.log"))  # fine-tuning counts epochs
    return int(told[-1]) if told else None


def _tail_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in _tail(path).decode(errors="replace").split("\n"):
        try:
            row = parse_json(line, where=path)
        except ValueError:
            continue  # the first line of the tail is cut, and a kill may have torn the last
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _number(row: Mapping[str, Any], name: str) -> float | None:
    """Return a value of a row; None where it is not there or was not finite."""
    value = row.get(name)
    if value is not None and not (isinstance(value, int | float) and abs(value) < 1e18):
        raise ValueError(f"metrics.jsonl: {name}: {found_wanted(value, 'a number')}")
    return value


def _tail(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            return file.read(TAIL_BYTES)
    except (OSError, ValueError):
        return b""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
