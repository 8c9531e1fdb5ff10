"""Training and validation rows of which none is, contains or is part of a row of the other side.

Rows are compared as sequences of words (of characters, for Chinese) after lower-casing, so that a phrase is part of the
sentence it was cut from. Everything here is a function of the rows alone: no seed, no order.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_UNIT = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W_]+|[^\w\s]|_")


class Split(NamedTuple):
    """Indices of the rows of both sides."""

    train: list[int]
    validation: list[int]


def hold_out(rows: Sequence[str], fraction: float) -> Split:
    """Hold out a share of the rows: those with the lowest hash among the rows that are part of no other row.

    Equal rows stay together. Training rows are all others; `drop_overlap` takes away those that still overlap.

    Args:
        rows: the text of every row.
        fraction: of the rows that are part of no other.
    """
    units = [_units(row) for row in rows]
    inside = set(_contained(units, units, strictly=True))
    whole: dict[str, list[int]] = defaultdict(list)
    for index, unit in enumerate(units):
        if index not in inside:
            whole[unit].append(index)
    wanted = max(1, round(fraction * sum(map(len, whole.values()))))
    held: list[int] = []
    for unit in sorted(whole, key=_digest):
        if len(held) >= wanted:
            break
        held += whole[unit]
    chosen = set(held)
    return Split([index for index in range(len(rows)) if index not in chosen], sorted(held))


def drop_overlap(train: Sequence[str], validation: Sequence[str]) -> Split:
    """Return which rows remain when none may be part of a row of the other side.

    A validation row that is part of a training row is dropped first, then training rows that are part of a validation
    row: so nothing held out has been seen, and a short validation row does not cost the many sentences it is in.
    """
    train_units, validation_units = [_units(row) for row in train], [_units(row) for row in validation]
    seen = set(_contained(validation_units, train_units))
    kept = [index for index in range(len(validation)) if index not in seen]
    leaked = set(_contained(train_units, [validation_units[index] for index in kept]))
    return Split([index for index in range(len(train)) if index not in leaked], kept)


def scored_parts(side: str, num_rows: int, overlapping: Sequence[int] | None) -> dict[str, list[int]]:
    """Return what of a side is scored, by name: all its rows, and of an official side two parts as well.

    Args:
        side: its name; the parts are SIDE_overlapping, rows that are part of a training row, and SIDE_others.
        num_rows: of the side.
        overlapping: indices of the rows that are part of a training row; None where the side is not official.
    """
    parts = {side: list(range(num_rows))}
    if overlapping is not None:
        seen = set(overlapping)
        parts[f"{side}_overlapping"] = sorted(seen)
        parts[f"{side}_others"] = [index for index in range(num_rows) if index not in seen]
    return parts


def first_by_hash(rows: Sequence[str], limit: int | None) -> list[int]:
    """Return the indices of at most `limit` rows, those with the lowest hash, in the order of the file."""
    if limit is None or limit >= len(rows):
        return list(range(len(rows)))
    order = sorted(range(len(rows)), key=lambda index: (_digest(rows[index]), index))
    return sorted(order[:limit])


def _units(row: str) -> str:
    """Return the words of a row, each with a space before and after it."""
    return f" {' '.join(_UNIT.findall(row.lower()))} "


def _contained(parts: Sequence[str], wholes: Sequence[str], *, strictly: bool = False) -> Iterator[int]:
    """Yield the index of every part that is in some whole; strictly: in a longer one."""
    places: dict[str, list[int]] = defaultdict(list)
    for index, whole in enumerate(wholes):
        for unit in set(whole.split()):
            places[unit].append(index)
    answers: dict[str, bool] = {}
    for index, part in enumerate(parts):
        if part not in answers:
            # Only the rows with the rarest of its words can hold the part.
            candidates = min((places.get(unit, []) for unit in part.split()), key=len, default=[])
            answers[part] = any(
                part in wholes[place] and not (strictly and len(wholes[place]) == len(part)) for place in candidates
            )
        if answers[part]:
            yield index


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
