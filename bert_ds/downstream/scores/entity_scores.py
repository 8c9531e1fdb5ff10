"""Entities in tag sequences, and their scores: an entity counts when span and type are exact.

What is an entity is read in two ways. Strictly, tags that their scheme does not allow at their place make none: the
same numbers as seqeval's strict mode, which is no longer kept and serves the tests as oracle. As conlleval reads them
(the script of the CoNLL-2000 shared task, whose figure most publications give), every run of tags of one type is one.
Correct tags are read alike by both, so that only a model's own mistakes make the difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from bert_ds.downstream.rows.tag_schemes import split_tag
from bert_ds.downstream.scores.metrics import class_figures

Reading = Literal["BIO", "BIOES", "conlleval"]
"""By the strict rules of a scheme, or by conlleval's."""
_PREFIXES: dict[Reading, str] = {"BIO": "BI", "BIOES": "BIES", "conlleval": "BIES"}


class Entity(NamedTuple):
    """Tokens start to stop - 1, and what they are."""

    start: int
    stop: int
    type: str


def entities(tags: Sequence[str], reading: Reading) -> list[Entity]:
    """Return the entities of one sentence, in order.

    Strictly, an I- without its B- (BIO) and a B- without its E- (BIOES) make no entity. conlleval begins an entity at a
    B-, at a tag after O, and where the type changes, and ends it before the next; also after an E-, as conlleval does,
    and at and after an S-, as its successors do.

    Args:
        tags: "O" or a prefix, "-" and a type, each.
        reading: "BIO" (IOB2), "BIOES" or "conlleval".

    Raises:
        ValueError: a tag is not one of the reading.
    """
    parts = [_split(tag, reading) for tag in (*tags, "O")]
    return _as_conlleval(parts) if reading == "conlleval" else _strictly(parts, is_bioes=reading == "BIOES")


def _strictly(parts: Sequence[tuple[str, str]], *, is_bioes: bool) -> list[Entity]:
    found: list[Entity] = []
    start, kind = 0, ""
    for index, (prefix, label) in enumerate(parts):
        if kind and prefix in ("I", "E") and label == kind:
            if prefix == "E":
                found.append(Entity(start, index + 1, kind))
                kind = ""
            continue
        if kind and not is_bioes:
            found.append(Entity(start, index, kind))
        kind = ""
        if prefix == "S":
            found.append(Entity(index, index + 1, label))
        elif prefix == "B":
            start, kind = index, label
    return found


def _as_conlleval(parts: Sequence[tuple[str, str]]) -> list[Entity]:
    found: list[Entity] = []
    start, before_prefix, before = 0, "O", ""
    for index, (prefix, label) in enumerate(parts):
        is_new = prefix in ("B", "S") or before_prefix in ("O", "E", "S") or label != before
        if before_prefix != "O" and is_new:
            found.append(Entity(start, index, before))
        if is_new:
            start = index
        before_prefix, before = prefix, label
    return found


def entity_scores(
    gold: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]], *, reading: Reading = "BIO"
) -> dict[str, float]:
    """Return "precision", "recall" and "f1" of all entities together (micro), and "f1_TYPE" of each type, 0 to 1.

    Args:
        gold: the tags of each sentence.
        predicted: as many tags for each of these sentences.
        reading: what is taken for an entity, on both sides.

    Raises:
        ValueError: a sentence has another number of tags on the other side, or a tag is not one of the reading.
    """
    right: Counter[str] = Counter()
    num_gold: Counter[str] = Counter()
    num_predicted: Counter[str] = Counter()
    for number, (wanted, given) in enumerate(zip(gold, predicted, strict=True)):
        if len(wanted) != len(given):
            raise ValueError(f"sentence {number} has {len(wanted)} gold tags and {len(given)} predicted ones")
        in_gold, in_predicted = set(entities(wanted, reading)), set(entities(given, reading))
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


def tag_figures(
    gold: Sequence[Sequence[str]], found: Sequence[Sequence[str]], labels: Sequence[str]
) -> dict[str, float]:
    """Return entity scores, strict and as conlleval counts, where tags mark entities, else those of classes of words.

    "f1", as task files have it, is "strict_f1". Types of entities are scored strictly alone.
    """
    flat = class_figures([tag for tags in gold for tag in tags], [tag for tags in found for tag in tags], labels)
    if not all(label == "O" or label[:2] in ("B-", "I-") for label in labels):
        return {name: value for name, value in flat.items() if name != "matthews"}
    strict, conlleval = (entity_scores(gold, found, reading=reading) for reading in ("BIO", "conlleval"))
    return {
        "f1": strict["f1"],
        **{f"strict_{name}": value for name, value in strict.items()},
        **{f"conlleval_{name}": conlleval[name] for name in ("precision", "recall", "f1")},
        "accuracy": flat["accuracy"],
    }


def _split(tag: str, reading: Reading) -> tuple[str, str]:
    parts = split_tag(tag, _PREFIXES[reading])
    if parts is None:
        wanted = ", ".join(f"{letter}-TYPE" for letter in _PREFIXES[reading])
        raise ValueError(f"tag {tag!r} is not of the scheme {reading}: wanted O, {wanted}")
    return parts


def _f1(num_right: int, num_predicted: int, num_gold: int) -> float:
    """Return the harmonic mean of precision and recall, 0 where nothing is right."""
    return 2 * num_right / (num_predicted + num_gold) if num_right else 0.0
