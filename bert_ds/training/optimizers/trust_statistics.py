"""Trust ratios and update norms of the last step, by parameter name and by kind of layer.

They are kept on the device as the step left them; nothing is copied to the host until someone asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any, NamedTuple

from torch import Tensor


class TrustStatistics(NamedTuple):
    """What one tensor did in the last step."""

    trust_ratio: float
    """Factor on the learning rate, clamps included."""
    weight_norm: float
    """|w| before the step."""
    update_norm: float
    """|u|, the update before the trust ratio and the learning rate."""


class Spread(NamedTuple):
    """Smallest, middle and largest value of a kind of layer."""

    min: float
    median: float
    max: float


class RecordedRows(NamedTuple):
    """Device tensors of one shard's step; one row per name."""

    names: tuple[str, ...]
    ratios_R: Tensor
    sums_R2: Tensor


def read_statistics(records: Iterable[RecordedRows]) -> dict[str, TrustStatistics]:
    """Copy the records to the host and return them by parameter name (one host sync per record)."""
    statistics = {}
    for names, ratios_R, sums_R2 in records:
        norms = sums_R2[:, :2].sqrt().tolist()
        for name, ratio, (weight_norm, update_norm) in zip(names, ratios_R.tolist(), norms, strict=True):
            statistics[name] = TrustStatistics(ratio, weight_norm, update_norm)
    return statistics


def trust_row(optimizer: Any) -> dict[str, Any]:
    """Return what the row of a logged step says of an optimizer with trust ratios; nothing for any other.

    Every rank holds the complete numbers, so the one that writes the log asks alone. A host sync.
    """
    if not hasattr(optimizer, "trust_statistics"):
        return {}
    kinds = summarise(optimizer.trust_statistics())
    fields = ("trust_ratio", "update_norm")
    return {"trust": {kind: {field: spreads[field]._asdict() for field in fields} for kind, spreads in kinds.items()}}


def layer_kind(name: str) -> str:
    """Return a parameter's name without the layer number: layer.7.output.weight becomes layer.output.weight."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def summarise(statistics: Mapping[str, TrustStatistics]) -> dict[str, dict[str, Spread]]:
    """Return kind of layer -> trust_ratio, weight_norm and update_norm -> smallest, median and largest."""
    by_kind: dict[str, list[TrustStatistics]] = {}
    for name, one in statistics.items():
        by_kind.setdefault(layer_kind(name), []).append(one)
    return {
        kind: {
            field: Spread(min(values), median(values), max(values))
            for field, values in zip(TrustStatistics._fields, zip(*members, strict=True), strict=True)
        }
        for kind, members in by_kind.items()
    }
