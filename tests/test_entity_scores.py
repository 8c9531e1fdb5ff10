from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval import metrics
from seqeval.scheme import IOB2, IOBES

from bert_ds.downstream.entity_scores import Entity, entities, entity_scores

BIO_TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
BIOES_TAGS = [*BIO_TAGS, "E-PER", "S-PER", "E-LOC", "S-LOC"]


@pytest.mark.parametrize(
    ("scheme", "tags", "wanted"),
    [
        ("BIO", "B-PER I-PER O B-LOC B-LOC", [Entity(0, 2, "PER"), Entity(3, 4, "LOC"), Entity(4, 5, "LOC")]),
        ("BIO", "I-PER I-PER O", []),
        ("BIO", "B-PER I-LOC I-PER", [Entity(0, 1, "PER")]),
        ("IOB1", "I-PER I-PER B-PER O I-LOC", [Entity(0, 2, "PER"), Entity(2, 3, "PER"), Entity(4, 5, "LOC")]),
        ("IOB1", "I-PER I-LOC", [Entity(0, 1, "PER"), Entity(1, 2, "LOC")]),
        ("BIOES", "B-PER I-PER E-PER S-LOC O", [Entity(0, 3, "PER"), Entity(3, 4, "LOC")]),
        ("BIOES", "B-PER I-PER O E-LOC", []),
        ("BIO", "", []),
    ],
)
def test_entities_of_hand_written_tags(scheme: str, tags: str, wanted: list[Entity]) -> None:
    assert entities(tags.split(), scheme) == wanted


def test_scores_of_a_hand_computed_case() -> None:
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "O"], ["O"]]
    found = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "B-PER"], ["O"]]
    assert entity_scores(gold, found) == {
        "precision": 2 / 4,
        "recall": 2 / 3,
        "f1": 4 / 7,
        "f1_LOC": 1.0,
        "f1_PER": 0.0,
    }


def test_nothing_found_and_nothing_there_are_zero_and_not_an_error() -> None:
    assert entity_scores([["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_tags_of_another_scheme_or_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tag 'S-PER' is not of the scheme BIO: wanted O, B-TYPE, I-TYPE"):
        entities(["S-PER"], "BIO")
    with pytest.raises(ValueError, match="sentence 0 has 2 gold tags and 1 predicted ones"):
        entity_scores([["O", "O"]], [["O"]])


def tag_pairs(tags: list[str]) -> st.SearchStrategy[list[tuple[list[str], list[str]]]]:
    """Sentences with gold and predicted tags, of any order whatever."""
    tag = st.sampled_from(tags)
    sentence = st.lists(st.tuples(tag, tag), min_size=1, max_size=8)
    return st.lists(sentence.map(lambda pairs: tuple(map(list, zip(*pairs, strict=True)))), min_size=1, max_size=4)  # type: ignore[return-value]


@pytest.mark.parametrize(("scheme", "tags", "rules"), [("BIO", BIO_TAGS, IOB2), ("BIOES", BIOES_TAGS, IOBES)])
def test_scores_are_those_of_seqeval_in_strict_mode(scheme: str, tags: list[str], rules: Any) -> None:
    @settings(max_examples=150, deadline=None)
    @given(tag_pairs(tags))
    def compare(sentences: list[tuple[list[str], list[str]]]) -> None:
        gold, found = ([pair[side] for pair in sentences] for side in (0, 1))
        ours = entity_scores(gold, found, scheme=scheme)
        for key in ("precision", "recall", "f1"):
            theirs: Callable[..., float] = getattr(metrics, f"{key}_score")
            assert ours[key] == pytest.approx(theirs(gold, found, mode="strict", scheme=rules, zero_division=0))

    compare()
