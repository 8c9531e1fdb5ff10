"""Rows of a reduction: one per tensor, or one per part of a tensor that holds several weights side by side.

A projection that computes query, key and value at once is three weights in the published models, and LAMB gives each
its own trust ratio. Such a tensor is declared to consist of equal contiguous parts, and each part is a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor

from bert_kernels.flat_shard import Segment

EqualParts = Mapping[str, Sequence[str]]
"""`fnmatch` pattern over parameter names -> names of the equal parts that such a parameter consists of."""


class OwnedParameter(NamedTuple):
    """A parameter of the user's model that was trainable when it was given to the optimizer's constructor."""

    name: str
    param: Tensor
    decay: float
    lr_scale: float = 1.0
    """Factor of the learning rate."""
    parts: tuple[str, ...] = ()
    """Names of its equal contiguous parts; empty where it is one row."""


class RowTable(NamedTuple):
    """The rows of a group of tensors, the same on all ranks."""

    names: tuple[str, ...]
    decays: tuple[float, ...]
    lr_scales: tuple[float, ...]
    """Factor of the learning rate of each row."""
    first: tuple[int, ...]
    """First row of each tensor."""


def number_rows(entries: Sequence[OwnedParameter]) -> RowTable:
    """Number the rows of these tensors in their order."""
    names: list[str] = []
    decays: list[float] = []
    lr_scales: list[float] = []
    first = []
    for entry in entries:
        first.append(len(names))
        names += [f"{entry.name}.{part}" for part in entry.parts] or [entry.name]
        decays += [entry.decay] * max(1, len(entry.parts))
        lr_scales += [entry.lr_scale] * max(1, len(entry.parts))
    return RowTable(tuple(names), tuple(decays), tuple(lr_scales), tuple(first))


def cut_segments(entry: OwnedParameter, first_row: int, *, begin: int, end: int, at: int) -> list[Segment]:
    """Return the segments of elements [begin, end) of a tensor that lie at position `at` of a shard."""
    length = full_numel(entry.param) // max(1, len(entry.parts))
    segments = []
    while begin < end:
        part = begin // length
        stop = min(end, (part + 1) * length)
        segments.append(Segment(at, stop - begin, first_row + part, entry.decay))
        begin, at = stop, at + stop - begin
    return segments


def with_parts(
    entries: Sequence[OwnedParameter], equal_parts: EqualParts, *, frozen: Sequence[str] = ()
) -> list[OwnedParameter]:
    """Return the parameters with the parts that the patterns declare.

    Args:
        entries: the trainable parameters.
        equal_parts: pattern over names -> names of the parts.
        frozen: names that a pattern may match without effect.

    Raises:
        ValueError: a pattern matches nothing at all, a parameter matches two, or it cannot be cut into equal parts.
    """
    found = []
    unused = {pattern for pattern in equal_parts if not any(fnmatchcase(name, pattern) for name in frozen)}
    for entry in entries:
        patterns = [pattern for pattern in equal_parts if fnmatchcase(entry.name, pattern)]
        if len(patterns) > 1:
            raise ValueError(f"{entry.name} matches the part patterns {patterns}, wanted one at most")
        unused -= set(patterns)
        parts = tuple(equal_parts[patterns[0]]) if patterns else ()
        if parts and full_numel(entry.param) % len(parts):
            raise ValueError(f"{entry.name} has {full_numel(entry.param)} elements, not {len(parts)} equal parts")
        found.append(entry._replace(parts=parts))
    if unused:
        raise ValueError(f"no parameter matches the part pattern {min(unused)!r}")
    return found


def with_rates(entries: Sequence[OwnedParameter], lr_scale_of: Callable[[str], float]) -> list[OwnedParameter]:
    """Return the parameters with a factor of the learning rate each, by name.

    Raises:
        ValueError: a factor is negative or not finite.
    """
    found = [entry._replace(lr_scale=float(lr_scale_of(entry.name))) for entry in entries]
    for entry in found:
        if not 0.0 <= entry.lr_scale < math.inf:
            raise ValueError(f"learning rate factor of {entry.name} is {entry.lr_scale}, must be at least 0 and finite")
    return found


def full_numel(param: Tensor) -> int:
    """Return the elements of the whole tensor, under ZeRO-3 too."""
    return int(getattr(param, "ds_numel", param.numel()))
