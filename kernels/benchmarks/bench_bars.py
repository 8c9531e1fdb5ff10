"""The bars that the kernels are to reach on an H200, and what the records say about each.

A bar is read from the rows of one GPU, one pair of versions and one commit: those of the newest row. TFLOP/s count the
useful FLOPs of a row (4 S^2 K per head and sequence forward, 2.5 times that backward), percent are of the roofline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

Record = list[dict[str, str]]
CIRCUMSTANCES = ("gpu", "torch", "triton", "commit")


@dataclass(frozen=True)
class Bar:
    """One line of the list."""

    name: str
    unit: str
    wanted: float
    found: Callable[[Record, Record], float | None]
    """Of the rows of operators and of steps; None where nothing is measured."""
    at_most: bool = False

    def verdict(self, value: float | None) -> str:
        """Return "holds", "missed" or "not measured"."""
        if value is None:
            return "not measured"
        return "holds" if (value <= self.wanted if self.at_most else value >= self.wanted) else "missed"


def newest(rows: Record) -> Record:
    """Return the rows of the circumstances of the newest row."""
    if not rows:
        return []
    last = max(rows, key=lambda row: row["time"])
    return [row for row in rows if all(row[name] == last[name] for name in CIRCUMSTANCES)]


def bars() -> list[Bar]:
    """Return all bars."""
    return [*_attention_bars(), *_bandwidth_bars(), *_whole_bars()]


def _attention_bars() -> Iterator[Bar]:
    for dropout_p, mode, wanted in ((0.0, "forward", 330.0), (0.1, "forward", 270.0), (0.1, "both", 230.0)):
        shape = f"N=64 S=512 H=12 K=64 p={dropout_p}"
        yield Bar(f"attention {shape} {mode}", "TFLOP/s", wanted, _flops("attention", shape, mode))
    for mode, wanted in (("forward", 80.0), ("backward", 70.0)):
        shape = "N=256 S=128 H=12 K=64 p=0.1"
        yield Bar(f"attention {shape} {mode}", "%", wanted, _percent("attention", shape, mode))


def _bandwidth_bars() -> Iterator[Bar]:
    for shape in ("plain T=32768 D=1024", "dropout_add p=0.1 T=32768 D=1024"):
        for mode, wanted in (("forward", 85.0), ("backward", 75.0)):
            yield Bar(f"layer_norm {shape} {mode}", "%", wanted, _percent("layer_norm", shape, mode))
    for mode in ("forward", "backward"):
        yield Bar(f"bias_gelu T=32768 F=4096 {mode}", "%", 88.0, _percent("bias_gelu", "none T=32768 F=4096", mode))
    yield Bar("lamb BERT-large step", "% of 42 bytes per parameter", 85.0, _percent("lamb", "BERT-large", "step"))


def _whole_bars() -> Iterator[Bar]:
    yield Bar(
        "mlm_cross_entropy P=4915 D=1024, time of its GEMMs", "x", 1.1,
        _ratio_of_times("mlm_cross_entropy", "P=4915 ", "both", "gemms alone"), at_most=True,
    )  # fmt: skip
    yield Bar("BERT-large step, S=512, mean 256", "tokens/s", 232_000.0, lambda _ops, steps: _tokens(steps, "ours"))
    yield Bar("BERT-large step, against compiled transformers", "x", 1.5, _speed_up)


def _ours(ops: Record, op: str, shape: str, mode: str, provider: str = "ours") -> dict[str, str] | None:
    """Return the row of a shape's beginning."""
    wanted = {"op": op, "mode": mode, "provider": provider}
    matches = (row for row in ops if all(row[name] == value for name, value in wanted.items()))
    return next((row for row in matches if row["shape"].startswith(shape)), None)


def _flops(op: str, shape: str, mode: str) -> Callable[[Record, Record], float | None]:
    def found(ops: Record, _steps: Record) -> float | None:
        row = _ours(ops, op, shape, mode)
        return None if row is None else float(row["flops"]) / float(row["p50_us"]) * 1e-6

    return found


def _percent(op: str, shape: str, mode: str) -> Callable[[Record, Record], float | None]:
    def found(ops: Record, _steps: Record) -> float | None:
        row = _ours(ops, op, shape, mode)
        return None if row is None else float(row["roofline_percent"])

    return found


def _ratio_of_times(op: str, shape: str, mode: str, other: str) -> Callable[[Record, Record], float | None]:
    def found(ops: Record, _steps: Record) -> float | None:
        row, peer = _ours(ops, op, shape, mode), _ours(ops, op, shape, mode, other)
        return None if row is None or peer is None else float(row["p50_us"]) / float(peer["p50_us"])

    return found


def _tokens(steps: Record, provider: str) -> float | None:
    wanted = {"model": "large", "batch": "half_full_512", "provider": provider}
    rows = [row for row in steps if all(row[name] == value for name, value in wanted.items())]
    return float(rows[-1]["tokens_per_s"]) if rows else None


def _speed_up(_ops: Record, steps: Record) -> float | None:
    ours, theirs = _tokens(steps, "ours"), _tokens(steps, "transformers compiled")
    return None if ours is None or theirs is None else ours / theirs


def bars_table(ops: Record, steps: Record) -> list[str]:
    """Return a Markdown table of all bars."""
    lines = ["| bar | wanted | found | |", "|---|---|---|---|"]
    ops, steps = newest(ops), newest(steps)
    for bar in bars():
        value = bar.found(ops, steps)
        number = "" if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
        limit = f"{'at most' if bar.at_most else 'at least'} {bar.wanted:,g} {bar.unit}"
        lines.append(f"| {bar.name} | {limit} | {number} | {bar.verdict(value)} |")
    return lines
