"""The table and the picture of a search as one HTML page: the metric of every trial over each setting."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bert_ds.basics.whole_files import write_text
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.folders.kept_files import keeping_files
from bert_ds.reporting.run_figures import BLUE, RED, Picture, png_of
from bert_ds.reporting.run_page import page_of, picture_section, table

PAGE, _FIGURE = "search.html", "figures/search.png"


def show_search(folder: Path, results: Mapping[str, Any]) -> None:
    """Print the table of a search, the best trial first, and write search.html and figures/search.png into its folder.

    Args:
        folder: with a marker.
        results: as in its results.json: `task`, `metric`, `chosen`, `trials`, and `test` where there is one.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    names, metric = list(results["trials"][0]["settings"]), results["metric"]
    print(f"{'trial':<10} {metric:<20} settings")
    rows = []
    for row in results["trials"]:
        value, shown = row["value"], [_shown(row["settings"][name]) for name in names]
        spread = "" if row["deviation"] is None else f" +- {row['deviation']:.4f}"
        text = "none" if value is None else f"{value:.4f}{spread}"
        print(f"{row['trial']:<10} {text:<20} {' '.join(map('='.join, zip(names, shown, strict=True)))}")
        rows.append([row["trial"], *shown, value, row["deviation"], row["step"]])
    test = ", ".join(f"{name} {value:.4f}" for name, value in results.get("test", {}).items()) or "none"
    print(f"{results['chosen']} is chosen; test rows: {test}")
    picture = _draw(results)
    body = [
        f"<h1>{escape(results['task'])}</h1>",
        f"<p>{escape(results['chosen'])} has the best {escape(metric)} on the validation rows. Test rows: {test}.</p>",
        table(["trial", *names, metric, "deviation", "best step"], rows),
        picture_section(picture),
    ]
    with keeping_files(folder, [PAGE, _FIGURE]):
        (folder / _FIGURE).parent.mkdir(exist_ok=True)
        (folder / _FIGURE).write_bytes(picture.png)
        write_text(folder / PAGE, page_of(results["task"], body))
    print(folder / PAGE)


def _draw(results: Mapping[str, Any]) -> Picture:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the picture of a search needs matplotlib: pip install matplotlib") from error
    names = list(results["trials"][0]["settings"])
    known = [row for row in results["trials"] if row["value"] is not None]
    with rc_context({"text.parse_math": False}):  # a name may hold a dollar sign
        figure = Figure(figsize=(1 + 3.4 * len(names), 3.4), layout="constrained")
        for axis, name in zip(figure.subplots(1, len(names), squeeze=False, sharey=True)[0], names, strict=True):
            _draw_setting(axis, [row["settings"][name] for row in known], [row["value"] for row in known])
            axis.set_xlabel(name)
            axis.grid(alpha=0.25)
        figure.axes[0].set_ylabel(results["metric"])
        png = png_of(figure)
    caption = "Each point is a trial, the red one is chosen. What diverged is not shown."
    return Picture("search", "Trials", caption, png)


def _draw_setting(axis: Any, found: Sequence[Any], values: Sequence[float]) -> None:
    """Draw values of the metric over those of a setting, the first of which is the best."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    places = found
    if not all(type(one) in (int, float) for one in found):
        words = list(dict.fromkeys(map(_shown, found)))
        places = [words.index(_shown(one)) for one in found]
        axis.set_xticks(range(len(words)), words)
    elif min(found) > 0 and max(found) > 8 * min(found):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.plot(places, values, "o", color=BLUE, alpha=0.7)
    axis.plot(places[:1], values[:1], "o", color=RED)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
