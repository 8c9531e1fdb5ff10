"""Tags of entities in the schemes in which files come, mended and turned into BIO.

BIO (IOB2): B- begins every entity, I- goes on. IOB1: I- also begins, B- only where an entity of the same type has just
ended. BIOES: E- ends an entity of several words, S- is an entity of one word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.reading.config_problems import describe

Scheme = Literal["bio", "iob1", "bioes"]

_PREFIXES = {"bio": "BI", "iob1": "BI", "bioes": "BIES"}


def to_bio(tags: Sequence[str], scheme: Scheme, *, where: str) -> tuple[tuple[str, ...], int]:
    """Return the tags in BIO, and how many of them their own scheme does not allow at their place.

    An I- or E- that continues nothing begins an entity; a B- or I- of BIOES that is not followed by its I- or E- ends
    one. In IOB1 every I- is allowed, and a B- that separates nothing counts as mended.

    Raises:
        DataError: a tag is neither "O" nor a prefix of the scheme, "-" and a type.
    """
    parts = [_parts(tag, scheme, where=where) for tag in tags]
    result, num_mended = [], 0
    before_prefix, before = "O", ""
    for prefix, label in parts:
        goes_on = label == before and before_prefix in ("B", "I") and prefix in ("I", "E")
        if prefix == "O":
            result.append("O")
        else:
            result.append(f"I-{label}" if goes_on else f"B-{label}")
        num_mended += _is_wrong(prefix, label, (before_prefix, before), scheme=scheme, goes_on=goes_on)
        before_prefix, before = prefix, label
    if scheme == "bioes":
        num_mended += before_prefix in ("B", "I")
    return tuple(result), num_mended


def _is_wrong(prefix: str, label: str, previous: tuple[str, str], *, scheme: Scheme, goes_on: bool) -> bool:
    if scheme == "iob1":
        return prefix == "B" and label != previous[1]
    if scheme == "bioes" and previous[0] in ("B", "I"):
        return not goes_on
    return prefix in ("I", "E") and not goes_on


def _parts(tag: str, scheme: Scheme, *, where: str) -> tuple[str, str]:
    parts = split_tag(tag, _PREFIXES[scheme])
    if parts is None:
        wanted = ", ".join(f"{letter}-TYPE" for letter in _PREFIXES[scheme])
        raise DataError(f"{where}: found the tag {describe(tag)}, wanted O, {wanted} ({scheme})")
    return parts


def split_tag(tag: str, prefixes: Sequence[str]) -> tuple[str, str] | None:
    """Return prefix and type of a tag, ("O", "") for "O"; None where it has none of the prefixes, or no type."""
    if tag == "O":
        return "O", ""
    prefix, dash, label = tag.partition("-")
    return (prefix, label) if dash and label and prefix in tuple(prefixes) else None
