"""Show every run of some folders: state, step, loss, speed, time left, Slurm job.

    python bert_ds/runs.py                    # the runs below runs/
    python bert_ds/runs.py /shared/runs --watch
    python bert_ds/runs.py /shared/runs --json

loss is the training loss, masked the validation loss at [MASK].

running: makes steps. waiting: in Slurm's queue, and continues by itself. stopped: on request, and continues when it is
started again. dead: neither finished nor under way. unreadable, failed, diverged: the note says why. done.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # a script run by path finds its package beside itself
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bert_ds.basics.slurm_queue import read_queue
from bert_ds.configuration.reading.config_problems import printable
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.launch.command_line import run_main
from bert_ds.launch.verbs import verb_parser
from bert_ds.reporting.run_overview import STATES, RunOverview, find_runs, read_overview

COLUMNS = ("run", "state", "step", "loss", "masked", "tokens/s", "ETA", "starts", "job", "updated", "note")
RIGHT = ("step", "loss", "masked", "tokens/s", "ETA", "starts", "job", "updated")
WRAPPED = ("run", "note")
"""Shown whole in a narrow terminal: runs are told apart by the end of their path."""
COLORS = {"running": "green", "waiting": "cyan", "stopped": "yellow", "done": "dim"}


def main() -> None:
    parser = verb_parser("runs")
    parser.add_argument(
        "folders", nargs="*", type=Path, default=[Path("runs")], help="of runs, or runs (default: runs)"
    )
    parser.add_argument("--watch", action="store_true", help="show again every --every seconds")
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="for --watch (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    args = parser.parse_args()
    missing = [str(folder) for folder in args.folders if not folder.is_dir()]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: no such folder")
    if not 0.1 <= args.every <= 86400:
        raise ConfigError(f"--every: found {args.every}, wanted 0.1 to 86400 seconds")
    try:
        if args.watch:
            watch(args.folders, every_s=args.every, as_json=args.json)
        else:
            show(overviews(args.folders), as_json=args.json)
    except BrokenPipeError:  # `runs.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def overviews(folders: Sequence[Path]) -> list[RunOverview]:
    """Return every run below the folders: what is under way first, then what wants somebody, the newest first."""
    queue, now = read_queue(), time.time()
    paths = dict.fromkeys(path for folder in folders for path in find_runs(folder))
    found = [read_overview(path, queue=queue, now=now) for path in paths]
    return sorted(found, key=lambda one: (STATES.index(one.state), -(one.updated or 0.0), one.run_dir))


def show(found: Sequence[RunOverview], *, as_json: bool) -> None:
    """Print the table, or JSON."""
    if as_json:
        print(json.dumps([one._asdict() for one in found], indent=2), flush=True)
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(rich_table(found))
    else:
        print(plain_table(found), flush=True)


def watch(folders: Sequence[Path], *, every_s: float, as_json: bool) -> None:
    """Show the runs again and again, in place on a terminal, until interrupted."""
    if as_json or not sys.stdout.isatty():
        while True:
            show(overviews(folders), as_json=as_json)
            time.sleep(every_s)
    from rich.live import Live

    with Live(rich_table(overviews(folders)), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(every_s)
            live.update(rich_table(overviews(folders)), refresh=True)


def plain_table(found: Sequence[RunOverview]) -> str:
    """Return the table as aligned text."""
    lines = [COLUMNS, *(cells(one, now=time.time()) for one in found)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if name in RIGHT else text.ljust(width)
            for name, text, width in zip(COLUMNS, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def rich_table(found: Sequence[RunOverview]) -> Any:
    """Return the table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", expand=True)
    for name in COLUMNS:
        wraps = name in WRAPPED
        overflow: Literal["fold", "ellipsis"] = "fold" if wraps else "ellipsis"
        table.add_column(name, justify="right" if name in RIGHT else "left", no_wrap=not wraps, overflow=overflow)
    for one in found:
        style = COLORS.get(one.state, "red")
        texts = cells(one, now=time.time())
        table.add_row(
            *(Text(text, style=style if name == "state" else "") for name, text in zip(COLUMNS, texts, strict=True))
        )
    return table


def cells(one: RunOverview, *, now: float) -> tuple[str, ...]:
    """Return the texts of one line."""
    total = f"/{one.total_steps:,}" if one.total_steps is not None else ""
    job = " ".join(part for part in (one.job, (one.job_state or "").lower()) if part)
    return (
        printable(one.run_dir),
        one.state,
        f"{one.step:,}{total}",
        "" if one.loss is None else f"{one.loss:.4f}",
        "" if one.masked_loss is None else f"{one.masked_loss:.4f}",
        "" if one.tokens_per_s is None else f"{one.tokens_per_s:,.0f}",
        "" if one.eta_s is None else duration(one.eta_s),
        str(one.attempts or ""),
        job,
        "" if one.updated is None else f"{duration(max(0.0, now - one.updated))} ago",
        one.note,
    )


def duration(seconds: float) -> str:
    """Return a duration in its two largest units."""
    minutes, whole = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{whole:02d}s" if minutes else f"{whole}s"
    days, hours = divmod(minutes // 60, 24)
    return f"{days}d{hours:02d}h" if days else f"{hours}h{minutes % 60:02d}m"


if __name__ == "__main__":
    run_main(main)
