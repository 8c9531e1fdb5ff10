"""Entities in tag sequences, and their scores by the strict rule: an entity counts when span and type are exact.

The same numbers as seqeval's strict mode, which is no longer kept and serves the tests as oracle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

Scheme = Literal["BIO", "IOB1", "BIOES"]
_PREFIXES: dict[Scheme, str] = {"BIO": "BI", "IOB1": "BI", "BIOES": "BIES"}


class Entity(NamedTuple):
    """Tokens start to stop - 1, and what they are."""

    start: int
    stop: int
    type: str


def entities(tags: Sequence[str], scheme: Scheme) -> list[Entity]:
    """Return the entities of one sentence, in order.

    What the scheme does not allow makes no entity: an I- without its B- (BIO), a B- without its E- (BIOES). In IOB1 an
    I- begins an entity wherever none of its type goes on, and B- separates.

    Args:
        tags: "O" or a prefix, "-" and a type, each.
        scheme: "BIO" (IOB2), "IOB1" or "BIOES".

    Raises:
        ValueError: a tag is not of the scheme.
    """
    found: list[Entity] = []
    start, kind = 0, ""
    for index, tag in enumerate([*tags, "O"]):
        prefix, label = _split(tag, scheme)
        if kind and prefix in ("I", "E") and label == kind:
            if prefix == "E":
                found.append(Entity(start, index + 1, kind))
                kind = ""
            continue
        if kind and scheme != "BIOES":
            found.append(Entity(start, index, kind))
        kind = ""
        if prefix == "S":
            found.append(Entity(index, index + 1, label))
        elif prefix == "B" or (prefix == "I" and scheme == "IOB1"):
            start, kind = index, label
    return found


def entity_scores(
    gold: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]], *, scheme: Scheme = "BIO"
) -> dict[str, float]:
    """Return "precision", "recall" and "f1" of all entities together (micro), and "f1_TYPE" of each type, 0 to 1.

    Args:
        gold: the tags of each sentence.
        predicted: as many tags for each of these sentences.
        scheme: of both.

    Raises:
        ValueError: a sentence has another number of tags on the other side, or a tag is not of the scheme.
    """
    right: Counter[str] = Counter()
    num_gold: Counter[str] = Counter()
    num_predicted: Counter[str] = Counter()
    for number, (wanted, given) in enumerate(zip(gold, predicted, strict=True)):
        if len(wanted) != len(given):
            raise ValueError(f"sentence {number} has {len(wanted)} gold tags and {len(given)} predicted ones")
        in_gold, in_predicted = set(entities(wanted, scheme)), set(entities(given, scheme))
        num_gold.update(entity.type for entity in in_gold)
        num_predicted.update(entity.type for entity in in_predicted)
        right.update(entity.type for entity in in_gold & in_predicted)
    num_right = right.total()
    return {
        "precision": num_right / num_predicted.total() if num_right else 0.0,
        "recall": num_right / num_gold.total() if num_right else 0.0,
        "f1": _f1(num_right, num_predicted.total(), num_gold.total()),
    } | {
        f"f1_{kind}": _f1(right[kind], num_predicted[kind], num_gold[kind]) for kind in sorted(num_gold | num_predicted)
    }


def _split(tag: str, scheme: Scheme) -> tuple[str, str]:
    if tag == "O":
        return "O", ""
    prefix, dash, label = tag.partition("-")
    if not dash or not label or prefix not in tuple(_PREFIXES[scheme]):
        wanted = ", ".join(f"{letter}-TYPE" for letter in _PREFIXES[scheme])
        raise ValueError(f"tag {tag!r} is not of the scheme {scheme}: wanted O, {wanted}")
    return prefix, label


def _f1(num_right: int, num_predicted: int, num_gold: int) -> float:
    """Return the harmonic mean of precision and recall, 0 where nothing is right."""
    return 2 * num_right / (num_predicted + num_gold) if num_right else 0.0
