"""The figures of a run as PNG pictures. Needs matplotlib, which is imported when a figure is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.reporting.run_history import OVER_ALL, Band, RunHistory, section
from bert_ds.reporting.run_log import AT_MASK
from bert_ds.reporting.run_rows import number

BLUE, _ORANGE, _GREEN, RED, _GREY = "#3465a4", "#d9730d", "#3d8f4d", "#c0392b", "#888888"
_MAX_POINTS = 4_000
"""Of a line; a panel is some 500 pixels wide."""
_COLUMNS = 4
"""Panels side by side in the figures of the layer kinds."""


class Picture(NamedTuple):
    """One figure."""

    name: str
    """File name without its ending."""
    title: str
    caption: str
    png: bytes


def draw_figures(history: RunHistory) -> list[Picture]:
    """Return the figures that the run has figures for, in the order of reading.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ConfigError("the figures of a report need matplotlib: pip install matplotlib") from error
    with rc_context({"text.parse_math": False}):  # a name may hold a dollar sign
        return _pictures(history)


def _pictures(history: RunHistory) -> list[Picture]:
    pictures = [_losses(history), _rates(history), _speed(history)]
    if history.evaluations:
        pictures.insert(1, _evaluation(history))
    ratios, norms = history.trust("trust_ratio"), history.trust("update_norm")
    adapted = {kind: band for kind, band in ratios.items() if any(value != 1.0 for value in (*band.low, *band.high))}
    if adapted:
        rest = sorted(ratios.keys() - adapted.keys())
        note = f" Not shown, because it was 1 throughout: {', '.join(map(_short, rest))}." if rest else ""
        title, caption = "Trust ratios", f"Factor on the learning rate, by kind of layer: {_BAND}.{note}"
        pictures.append(Picture("trust_ratios", title, caption, _panels(history, adapted)))
    if norms:
        title, caption = "Update norms", f"|u| before trust ratio and learning rate, by kind of layer: {_BAND}."
        pictures.append(Picture("update_norms", title, caption, _panels(history, norms)))
    return pictures


_BAND = "the line is the median over the layers, the band reaches from the smallest to the largest"


def _losses(history: RunHistory) -> Picture:
    terms = history.names("loss_")
    others = [name for name in terms if name != OVER_ALL]
    first = OVER_ALL if OVER_ALL in terms else "loss"
    judged, label = _judged(history) if first == OVER_ALL else (first, "validation")

    def draw(axes: Sequence[Any]) -> None:
        _line(axes[0], history.numbers, history.series(first), color=BLUE, linewidth=1, label="training")
        axes[0].plot(*_evaluated(history, judged), "o-", color=RED, markersize=4, linewidth=1, label=label)
        if math.isfinite(history.unigram):
            axes[0].axhline(history.unigram, color=_GREY, linestyle="--", linewidth=1, label="piece frequencies alone")
        axes[0].set_ylabel(f"{_words(first)} (nats)")
        for name in others[: len(axes) - 1]:
            _line(axes[1], history.numbers, history.series(name), color=BLUE, linewidth=1, label="training")
            axes[1].plot(*_evaluated(history, name), "o-", color=RED, markersize=4, linewidth=1, label="validation")
            axes[1].set_ylabel(f"{_words(name)} (nats)")
        for axis in axes:
            axis.legend(fontsize=8)

    num_panels = 2 if others and first == OVER_ALL else 1
    picture = _figure(history, draw, num_panels=num_panels)
    caption = "Mean loss per target of each logged step, by the masks of the recipe, and of the held-out text."
    return Picture("loss", "Loss", caption, picture)


def _evaluation(history: RunHistory) -> Picture:
    names = sorted({name for row in history.evaluations for name in row if name.endswith(("_accuracy", "_found"))})

    def draw(axes: Sequence[Any]) -> None:
        for name in names:
            axes[0].plot(*_evaluated(history, name), "o-", markersize=4, linewidth=1, label=name.replace("_", " "))
        axes[0].set_ylabel("accuracy")
        if names:
            axes[0].legend(fontsize=8)
        judged, label = _judged(history)
        steps, losses = _evaluated(history, judged)
        perplexities = [math.exp(min(loss, 700.0)) for loss in losses]
        axes[1].plot(steps, perplexities, "o-", color=RED, markersize=4, linewidth=1)
        axes[1].set_ylabel(f"perplexity, {label}")
        _set_log_scale(axes[1], perplexities)

    return Picture("evaluation", "Evaluation", _evaluated_how(history), _figure(history, draw, num_panels=2))


def _evaluated_how(history: RunHistory) -> str:
    """Return what the evaluations of this run are of: an earlier version had one mean over all targets."""
    at_mask = [AT_MASK in row for row in history.evaluations]
    mean = "the mean over 80/10/10 of an earlier version, which copying the kept pieces flatters"
    if not any(OVER_ALL in row for row in history.evaluations):
        return "Held-out rows."
    if not any(at_mask):
        return f"Held-out text with fixed masks: {mean}. This run has no figure at [MASK]."
    rest = "" if all(at_mask) else f" Evaluations without it are {mean}."
    return f"Held-out text with fixed masks. What counts is the prediction at [MASK].{rest}"


def _rates(history: RunHistory) -> Picture:
    clip = number(section(history.recipe, "training").get("gradient_clipping"))

    def draw(axes: Sequence[Any]) -> None:
        _line(axes[0], history.numbers, history.series("lr"), color=BLUE, linewidth=1)
        axes[0].set_ylabel("learning rate")
        _line(axes[1], history.numbers, norms := history.series("grad_norm"), color=BLUE, linewidth=1)
        axes[1].set_ylabel("gradient norm before clipping")
        _set_log_scale(axes[1], norms)
        if clip > 0:
            axes[1].axhline(clip, color=_GREY, linestyle="--", linewidth=1, label=f"clipped to {clip:g}")
            axes[1].legend(fontsize=8)

    caption = "Learning rate and the global gradient norm."
    return Picture("rates", "Learning rate and gradient norm", caption, _figure(history, draw, num_panels=2))


def _speed(history: RunHistory) -> Picture:
    def draw(axes: Sequence[Any]) -> None:
        _line(axes[0], history.numbers, history.series("tokens_per_s"), color=BLUE, linewidth=1)
        axes[0].set(ylabel="non-pad tokens/s")
        axes[0].set_ylim(bottom=0)
        waits = history.series("data_wait_share")
        _line(axes[1], history.numbers, waits, color=_ORANGE, linewidth=1, label="data wait")
        if any(map(math.isfinite, mfu := history.series("mfu"))):
            _line(axes[1], history.numbers, mfu, color=_GREEN, linewidth=1, label="MFU")
        axes[1].set(ylabel="share")
        axes[1].set_ylim(bottom=0)
        axes[1].legend(fontsize=8)

    caption = "Evaluations and checkpoints are left out of the time."
    return Picture("speed", "Speed", caption, _figure(history, draw, num_panels=2))


def _panels(history: RunHistory, bands: Mapping[str, Band]) -> bytes:
    """Draw one small panel per kind of layer, all over the same steps."""

    def draw(axes: Sequence[Any]) -> None:
        for axis, (kind, band) in zip(axes, bands.items(), strict=True):
            axis.fill_between(history.trust_numbers, band.low, band.high, color=BLUE, alpha=0.25, linewidth=0)
            axis.plot(history.trust_numbers, band.median, color=BLUE, linewidth=1)
            axis.set_title(_short(kind), fontsize=7)
            _set_log_scale(axis, [*band.low, *band.high])
            axis.tick_params(labelsize=6, which="both")

    return _figure(history, draw, num_panels=len(bands), small=True)


def _figure(
    history: RunHistory, draw: Callable[[Sequence[Any]], None], *, num_panels: int = 1, small: bool = False
) -> bytes:
    """Lay out panels over the steps of the run, let `draw` fill them, mark the events, and return a PNG."""
    from matplotlib.figure import Figure

    columns = min(num_panels, _COLUMNS if small else 2)
    rows = -(-num_panels // columns)
    height = 1.9 * rows if small else 3.4
    figure = Figure(figsize=(11, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel().tolist()
    draw(axes[:num_panels])
    for axis in axes[:num_panels]:
        _mark_events(axis, history)
        axis.grid(alpha=0.25)
    for index, axis in enumerate(axes):
        axis.set_visible(index < num_panels)
        if index < num_panels <= index + columns:
            axis.set_xlabel("step", fontsize=7 if small else None)
            axis.tick_params(labelbottom=True)
    return png_of(figure)


def _line(axis: Any, steps: Sequence[int], values: Sequence[float], **style: Any) -> None:
    """Draw values over steps; of many, the smallest and the largest of every group, so that no spike is lost."""
    import numpy as np

    x, y = np.asarray(steps), np.asarray(values)
    if len(x) > _MAX_POINTS:
        group = -(-len(x) // (_MAX_POINTS // 2))
        starts = range(0, len(x), group)
        known = [part.start + np.flatnonzero(np.isfinite(y[part])) for part in (slice(s, s + group) for s in starts)]
        kept = [extreme for part in known if len(part) for extreme in (part[y[part].argmin()], part[y[part].argmax()])]
        x, y = x[sorted(kept)], y[sorted(kept)]
    axis.plot(x, y, **style)


def _set_log_scale(axis: Any, values: Sequence[float]) -> None:
    """Use a logarithmic scale with plain numbers, where there is something positive to show."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    known = [value for value in values if math.isfinite(value) and value > 0]
    if not known:
        return
    axis.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_major_formatter(plain)
    axis.yaxis.set_minor_formatter(plain if max(known) < 8 * min(known) else NullFormatter())


def png_of(figure: Any) -> bytes:
    """Return the picture with 64 colours: a third of the bytes, nothing lost that an eye sees."""
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    Image.open(drawn).convert("RGB").quantize(64).save(small, format="png", optimize=True)
    return small.getvalue()


def _mark_events(axis: Any, history: RunHistory) -> None:
    """Mark where an attempt began (dotted) and where a step was skipped (red)."""
    begins, skipped = ([row["step"] for row in rows] for rows in (history.attempts[1:], history.skipped))
    # One object for all of them: thousands of lines of their own would take minutes.
    for steps, style in (
        (begins, {"color": _GREY, "linestyles": ":", "linewidth": 1}),
        (skipped, {"color": RED, "linewidth": 0.8, "alpha": 0.6}),
    ):
        if steps:
            axis.vlines(steps, 0, 1, transform=axis.get_xaxis_transform(), **style)


def _judged(history: RunHistory) -> tuple[str, str]:
    """Return the validation loss of masked words that the run has, and how to call it."""
    if any(AT_MASK in row for row in history.evaluations):
        return AT_MASK, "validation at [MASK]"
    return OVER_ALL, "validation, mean over 80/10/10"


def _evaluated(history: RunHistory, name: str) -> tuple[list[int], list[float]]:
    known = [row for row in history.evaluations if row.get(name) is not None]
    return [row["step"] for row in known], [number(row[name]) for row in known]


def _words(name: str) -> str:
    """Return a field of the metrics as it is written below an axis: loss_mlm becomes mlm loss."""
    return f"{name[5:]} loss" if name.startswith("loss_") else name


def _short(kind: str) -> str:
    """Return the name of a layer kind without what all of them have."""
    for prefix in ("bert.encoder.layer.", "bert.encoder.", "bert."):
        kind = kind.removeprefix(prefix)
    return kind
