"""One HTML page about a run: everything is in the file, nothing is loaded from elsewhere, no script runs."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from bert_ds.reporting.run_figures import Picture
from bert_ds.reporting.run_history import RunHistory, section, summary_lines
from bert_ds.reporting.run_rows import number

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1120px; padding: 0 1rem; color: #222 }
h1 { margin-bottom: 0 } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd } img { max-width: 100% }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums } .quiet { color: #777 } .bad { color: #c0392b }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto }
"""


def is_page(path: Path) -> bool:
    """Whether a file is such a page, of this version or an earlier one."""
    return path.is_file() and not path.is_symlink() and _STYLE.encode() in path.read_bytes()


def render_page(history: RunHistory, pictures: Sequence[Picture]) -> str:
    """Return the page as text."""
    name = str(history.recipe.get("name", history.run_dir.name))
    body = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="quiet">{escape(_state(history))}</p>',
        *(f"<p>{escape(line)}</p>" for line in summary_lines(history)),
        *(picture_section(picture) for picture in pictures),
        _evaluations(history),
        _events(history),
        _facts(history),
    ]
    return page_of(name, body)


def page_of(name: str, body: Iterable[str]) -> str:
    """Return a page of these parts."""
    head = f'<meta charset="utf-8"><title>{escape(name)}</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _state(history: RunHistory) -> str:
    total = section(history.recipe, "training").get("total_steps")
    reached = f"step {history.numbers[-1]}" + (f" of {total}" if total else "")
    state = "finished" if history.is_done else "not finished"
    number = len(history.attempts)
    return f"{state}, {reached}, {number} attempt{'s' * (number != 1)}, last row {_clock(history.whole[-1])}"


def picture_section(picture: Picture) -> str:
    """Return a picture with its title and what it shows."""
    data = base64.b64encode(picture.png).decode()
    image = f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{data}">'
    return f'<h2>{escape(picture.title)}</h2>\n{image}\n<p class="quiet">{escape(picture.caption)}</p>'


def _evaluations(history: RunHistory) -> str:
    if not history.evaluations:
        return "<h2>Evaluations</h2><p>None yet.</p>"
    hidden = {"kind", "step", "attempt", "time"}
    names = [name for name in history.evaluations[-1] if name not in hidden]
    rows = [[row["step"], *(number(row.get(name)) for name in names)] for row in history.evaluations]
    return "<h2>Evaluations</h2>\n" + table(["step", *names], rows)


def _events(history: RunHistory) -> str:
    events: list[tuple[Any, ...]] = []
    for row in history.attempts:
        text = f"attempt {row.get('attempt')} begins" if row["step"] == 0 else f"attempt {row.get('attempt')} continues"
        events.append((row["time"], row["step"], text))
    for row in history.checkpoints:
        text = f"checkpoint, {number(row.get('bytes')) / 1e6:,.0f} MB in {number(row.get('seconds')):.1f} s"
        events.append((row["time"], row["step"], text))
    for row in history.skipped:
        events.append((row["time"], row["step"], f"step skipped: loss {number(row.get('loss')):.4g}, not applied"))
    rows = [[_utc(moment), step, text] for moment, step, text in sorted(events)]
    return f"<h2>Events</h2>\n<p>{len(history.skipped)} skipped steps.</p>\n" + table(["time", "step", "event"], rows)


def _facts(history: RunHistory) -> str:
    environment, versions = history.environment, section(history.environment, "versions")
    plan = section(history.attempts[-1], "plan") if history.attempts else {}
    rows: list[list[Any]] = [["folder", str(history.run_dir)], ["commit", environment.get("commit")]]
    rows += [[name, environment.get(name)] for name in ("hostname", "devices", "world_size", "python")]
    rows += [[name, value] for name, value in (*versions.items(), *plan.items())]
    recipe = escape(json.dumps(history.recipe, indent=2))
    return f"<h2>The run</h2>\n{table([], rows)}\n<details><summary>recipe</summary><pre>{recipe}</pre></details>"


def table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as a table; floats have four digits."""
    head = "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in names) + "</tr>" if names else ""
    return f"<table>{head}" + "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows) + "</table>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'<td class="n">{value:.4f}</td>'
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return f"<td>{escape('' if value is None else str(value))}</td>"


def _clock(row: Any) -> str:
    return _utc(row["time"])


def _utc(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return f"{seconds:g} s"
