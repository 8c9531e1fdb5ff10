"""What `campaign_race.py` has recorded, as tables in Markdown and as a picture."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BELOW = (0.0, 1.0, 1.5, 2.0, 2.5, 3.0)
"""Nats below the unigram cross-entropy, for which minutes and tokens are told."""
AFTER = (2.0, 5.0, 10.0)
"""Minutes, after which the loss is told."""
Row = dict[str, Any]
Point = Sequence[float]
"""Minutes, tokens, loss and accuracy at [MASK]."""


def print_tables(rows: Iterable[Row]) -> None:
    """Print every contestant's end, and the way of those with ten minutes."""
    groups = grouped(rows)
    print(
        "| machine | text | minutes | contestant | rate | batch | seeds | tokens/s | tokens | loss at [MASK] "
        "| below unigram |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for (amx, text, minutes, name, lr, batch), of_group in groups:
        losses = [row["loss"] for row in of_group]
        speed, tokens = (statistics.mean(row[key] for row in of_group) for key in ("tokens_per_s", "tokens"))
        below = of_group[0]["unigram"] - statistics.mean(losses)
        cells = [_machine(amx), text, f"{minutes:g}", name, f"{lr:g}", batch, len(losses), f"{speed:,.0f}"]
        cells += [f"{tokens / 1e6:.2f} M", _mean(losses), f"{below:.3f}"]
        print("| " + " | ".join(map(str, cells)) + " |")
    ends = [f"loss after {minutes:g} min" for minutes in AFTER]
    ways = [f"unigram - {nats:g}: min, tokens" for nats in BELOW]
    print("\n| machine | text | contestant | " + " | ".join((*ends, *ways)) + " |")
    print("|---" * (3 + len(ends) + len(ways)) + "|")
    for (amx, text, minutes, name, *_), of_group in groups:
        curves = [row["curve"] for row in of_group]
        if minutes < max(AFTER) or curves[0][0][0] > min(AFTER):  # the last: nothing was evaluated on the way
            continue
        cells = [_mean([loss_after(curve, when) for curve in curves]) for when in AFTER]
        cells += [_reached([reached(row["curve"], row["unigram"] - nats) for row in of_group]) for nats in BELOW]
        print(f"| {_machine(amx)} | {text} | {name} | " + " | ".join(cells) + " |")


def grouped(rows: Iterable[Row]) -> list[tuple[tuple[Any, ...], list[Row]]]:
    """Return the rows of trainings that differ in their seeds alone, by (amx, text, minutes, name, rate, batch)."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "task" not in row:
            key = tuple(row[name] for name in ("amx", "text", "minutes", "name", "lr", "batch"))
            groups.setdefault(key, []).append(row)
    return sorted(groups.items(), key=lambda pair: pair[0][:3])


def loss_after(curve: Sequence[Point], minutes: float) -> float:
    """Return the loss after so many minutes, between two evaluations on the line through them; NaN before the first."""
    times, losses = [point[0] for point in curve], [point[2] for point in curve]
    return float(np.interp(minutes, times, losses, left=float("nan")))


def reached(curve: Sequence[Point], loss: float) -> tuple[float, float] | None:
    """Return minutes and tokens at which the line through the evaluations first reaches a loss; None if never."""
    if curve[0][2] <= loss:
        return curve[0][0], curve[0][1]
    for before, after in itertools.pairwise(curve):
        if after[2] <= loss:
            share = (before[2] - loss) / (before[2] - after[2])
            return before[0] + share * (after[0] - before[0]), before[1] + share * (after[1] - before[1])
    return None


def draw(rows: Iterable[Row], path: Path) -> None:
    """Draw the loss over the minutes of every training of ten minutes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5))
    groups = [(key, of_group) for key, of_group in grouped(rows) if key[2] == max(AFTER)]
    for number, ((amx, text, _, name, *_), of_group) in enumerate(groups):
        for row in of_group:
            minutes, _, losses, _ = zip(*row["curve"], strict=True)
            label = f"{name}, {text}, {_machine(amx)}" if row is of_group[0] else None
            axis.plot(minutes, losses, color=f"C{number % 10}", label=label, linewidth=1.2)
        axis.axhline(of_group[0]["unigram"], color="grey", linewidth=0.8, linestyle=":")
    axis.set_xlabel("minutes on two cores")
    axis.set_ylabel("loss at [MASK] of held-out text, nats")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _machine(amx: bool) -> str:
    return "AMX" if amx else "no AMX"


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def _reached(found: Sequence[tuple[float, float] | None]) -> str:
    there = [pair for pair in found if pair is not None]
    if len(there) < len(found):
        return f"{len(there)} of {len(found)}" if there else "never"
    minutes, tokens = (statistics.mean(pair[place] for pair in there) for place in (0, 1))
    return f"{minutes:.1f}, {tokens / 1e6:.2f} M"
