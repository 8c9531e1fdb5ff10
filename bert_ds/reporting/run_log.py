"""What a run says: metrics.jsonl, a log per rank, step lines or a progress bar.

Only rank 0 writes metrics and the console; every rank writes its own `logs/rank_K.log`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bert_ds.basics.ranks import LAUNCHER_PATIENCE_S, Ranks
from bert_ds.reporting.metrics_file import numbered_rows

AT_MASK = "loss_mlm_masked"
"""The validation loss that counts, in an evaluation row of a pre-training."""


class RunLog:
    """The log of one rank of one attempt at a run.

    Args:
        run_dir: the run folder; `logs/` and `metrics.jsonl` are made in it.
        ranks: place of this process in the job.
        total_steps: length of the progress bar.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, *, total_steps: int) -> None:
        self.run_dir = run_dir
        self.ranks, self.is_main = ranks, ranks.is_main
        self.total_steps = total_steps
        self.attempt = 1
        self._logger = _rank_logger(run_dir, ranks)
        self._file = -1
        self._line_end = b""
        self._bar: Any = None
        self._last_step: int | None = None
        self._step_s, self._save_s, self._is_told = 0.0, 0.0, False
        if self.is_main:
            path = run_dir / "metrics.jsonl"
            repair_metrics(path)
            self.attempt = 1 + max((row.get("attempt", 0) for row in read_rows(path)), default=0)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def start(self, step: int, facts: Mapping[str, Any]) -> None:
        """Write the row that opens this attempt at the step it continues from."""
        self.row("start", step, facts)
        if self.is_main and sys.stdout.isatty():
            self._bar = _Bar(self.total_steps, step)

    def info(self, message: str) -> None:
        """Log a message in this rank's file and, on rank 0, on the console."""
        self._say(logging.INFO, message)

    def warning(self, message: str) -> None:
        """Log a warning; every rank shows its own on the console."""
        self._say(logging.WARNING, message)

    def row(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl with a single write; a number that is not finite becomes null."""
        if self._file < 0:
            return
        row = {"kind": kind, "step": step, "attempt": self.attempt, "time": round(time.time(), 3), **values}
        line = self._line_end + json.dumps(_finite(row)).encode() + b"\n"
        try:
            self._line_end = b"" if os.write(self._file, line) == len(line) else b"\n"
        except OSError as error:
            self.warning(f"a row of metrics.jsonl is lost: {error}")

    def train_row(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a training row and show it: a line each time, and on a terminal a bar below the lines."""
        self.row("train", step, values)
        if self._last_step is not None and step > self._last_step:  # the first row's time holds what is done once
            self._note_duration(step_s=values.get("seconds", 0.0) / (step - self._last_step))
        self._last_step = step
        self.info(step_line(step, self.total_steps, values=values))
        if self._bar:
            self._bar.update(step)

    def evaluation_row(self, step: int, values: Mapping[str, Any]) -> None:
        """Append an evaluation row and show it."""
        self.row("evaluation", step, values)
        self.info(f"evaluation at step {step}: " + "  ".join(f"{name} {_short(v)}" for name, v in values.items()))

    def checkpoint_row(self, step: int, *, stall_s: float, background_s: float, num_bytes: int) -> None:
        """Append the row of a save that took so many seconds of the training, and more behind it."""
        self.row("checkpoint", step, {"seconds": stall_s, "background_s": background_s, "bytes": num_bytes})
        self._note_duration(save_s=stall_s + background_s)

    def close(self) -> None:
        """Close the files and the progress bar; a second call does nothing."""
        if self._bar:
            self._bar.close()
            self._bar = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        for handler in list(self._logger.handlers):
            self._logger.removeHandler(handler)
            logging.getLogger("DeepSpeed").removeHandler(handler)
            handler.close()

    def _note_duration(self, *, step_s: float = 0.0, save_s: float = 0.0) -> None:
        """Say once that the end on request takes longer than DeepSpeed's launcher waits."""
        self._step_s, self._save_s = step_s or self._step_s, save_s or self._save_s
        is_long = min(self._step_s, self._save_s) > 0 and self._step_s + self._save_s > LAUNCHER_PATIENCE_S
        if self.is_main and is_long and not self._is_told:
            self._is_told = True
            self.warning(
                f"warning: a step ({self._step_s:.0f} s) and a save ({self._save_s:.0f} s) together take longer than "
                f"the {LAUNCHER_PATIENCE_S} s that the deepspeed launcher waits after SIGTERM or Ctrl-C before it "
                "kills: bert-ds and Slurm wait for the save"
            )

    def _say(self, level: int, message: str) -> None:
        self._logger.log(level, message)
        if self.is_main or level >= logging.WARNING:
            if self._bar:
                self._bar.print(message)
            else:
                print(message, flush=True)


class _Bar:
    """A rich progress bar that stays below the printed lines."""

    def __init__(self, total: int, done: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, transient=True)
        self._task = self._progress.add_task("step", total=total, completed=done)
        self._progress.start()

    def update(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def print(self, message: str) -> None:
        self._progress.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def step_line(step: int, total_steps: int, *, values: Mapping[str, Any]) -> str:
    """Return the one-line summary of a training row; values that are missing or unknown are left out."""
    terms = "  ".join(f"{key[5:]} {_short(value)}" for key, value in values.items() if key.startswith("loss_"))
    parts = [f"step {step}/{total_steps}", f"loss {_short(values['loss'])}" + (f" ({terms})" if terms else "")]
    for label, key, text in (
        ("lr", "lr", "{:.3g}"),
        ("grad", "grad_norm", "{:.3g}"),
        ("", "tokens_per_s", "{:,.0f} tokens/s"),
        ("padding avoided", "padding_avoided", "{:.0%}"),
        ("filling", "filling_share", "{:.1%}"),
        ("MFU", "mfu", "{:.1%}"),
        ("data wait", "data_wait_share", "{:.0%}"),
        ("slow:", "slow_rank", "{}"),
    ):
        if values.get(key) is not None:
            parts.append(f"{label} {text.format(values[key])}".strip())
    if values.get("eta_s") is not None:
        minutes, seconds = divmod(round(values["eta_s"]), 60)
        parts.append(f"ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d}")
    return "  ".join(parts)


def read_metrics(path: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Return the rows of one kind in the order of their steps, the newest row for each step.

    A later attempt continues from the step of its `start` row: what earlier attempts wrote beyond that step is
    superseded, even where the later attempt has not come as far yet. A line torn by a kill or a full disk is ignored.
    """
    newest: dict[int, dict[str, Any]] = {}
    for row in read_rows(path):
        if row.get("kind") == "start":
            newest = {step: old for step, old in newest.items() if step <= row["step"]}
        if row.get("kind") == kind:
            newest[row["step"]] = row
    return [newest[step] for step in sorted(newest)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return every whole row of the file as it was written, superseded ones included."""
    if not path.exists():
        return []
    return [row for _, row in numbered_rows(path)]


def repair_metrics(path: Path) -> None:
    """Cut a last line that a kill left without its end; a file that does not exist is left alone."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def _rank_logger(run_dir: Path, ranks: Ranks) -> logging.Logger:
    """Return a logger into logs/rank_K.log that also receives DeepSpeed's messages.

    DeepSpeed shows warnings and drops the rest; here the rest goes into the file alone, after what its launcher would
    have told of this rank.
    """
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(run_dir / "logs" / f"rank_{ranks.rank}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger(f"bert_ds.reporting.run_log.{id(handler)}")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    deepspeed = logging.getLogger("DeepSpeed")
    for shown in deepspeed.handlers:
        if isinstance(shown, logging.StreamHandler) and not isinstance(shown, logging.FileHandler):
            shown.setLevel(max(shown.level, logging.WARNING))
    deepspeed.setLevel(logging.INFO)
    deepspeed.addHandler(handler)
    place = f"{os.environ.get('MASTER_ADDR', '-')}:{os.environ.get('MASTER_PORT', '-')}"
    logger.info(
        f"rank {ranks.rank} of {ranks.world_size}, local rank {ranks.local_rank}, process {os.getpid()} on "
        f"{platform.node()}, rendezvous at {place}"
    )
    return logger


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
