from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval import metrics
from seqeval.scheme import IOB2, IOBES

from bert_ds.downstream.kinds.kind import Prediction
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.rows.examples import Example
from bert_ds.downstream.scores.entity_scores import Entity, entities, entity_scores, tag_figures

BIO_TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
BIOES_TAGS = [*BIO_TAGS, "E-PER", "S-PER", "E-LOC", "S-LOC"]


@pytest.mark.parametrize(
    ("reading", "tags", "wanted"),
    [
        ("BIO", "B-PER I-PER O B-LOC B-LOC", [Entity(0, 2, "PER"), Entity(3, 4, "LOC"), Entity(4, 5, "LOC")]),
        ("BIO", "I-PER I-PER O", []),
        ("BIO", "B-PER I-LOC I-PER", [Entity(0, 1, "PER")]),
        ("conlleval", "I-PER I-PER B-PER O I-LOC", [Entity(0, 2, "PER"), Entity(2, 3, "PER"), Entity(4, 5, "LOC")]),
        ("conlleval", "I-PER I-LOC", [Entity(0, 1, "PER"), Entity(1, 2, "LOC")]),
        ("conlleval", "B-PER I-LOC I-PER", [Entity(0, 1, "PER"), Entity(1, 2, "LOC"), Entity(2, 3, "PER")]),
        ("conlleval", "O E-PER I-PER O", [Entity(1, 2, "PER"), Entity(2, 3, "PER")]),
        (
            "conlleval",
            "B-PER E-PER E-PER S-PER I-PER",
            [Entity(*span, "PER") for span in ((0, 2), (2, 3), (3, 4), (4, 5))],
        ),
        (
            "conlleval",
            "B-PER.NAM B-PER.NAM I-PER.NOM",
            [Entity(0, 1, "PER.NAM"), Entity(1, 2, "PER.NAM"), Entity(2, 3, "PER.NOM")],
        ),
        ("BIOES", "B-PER I-PER E-PER S-LOC O", [Entity(0, 3, "PER"), Entity(3, 4, "LOC")]),
        ("BIOES", "B-PER I-PER O E-LOC", []),
        ("BIO", "", []),
    ],
)
def test_entities_of_hand_written_tags(reading: str, tags: str, wanted: list[Entity]) -> None:
    assert entities(tags.split(), reading) == wanted


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


def test_a_forgotten_b_and_a_change_of_type_cost_the_strict_score_alone() -> None:
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["B-ORG", "I-ORG"]]
    found = [["I-PER", "I-PER", "O", "B-LOC"], ["B-ORG", "I-LOC"]]
    assert {name: value for name, value in entity_scores(gold, found).items() if len(name) > 5} == {
        "precision": 1 / 2,
        "recall": 1 / 3,
        "f1_LOC": 1.0,
        "f1_ORG": 0.0,
        "f1_PER": 0.0,
    }
    assert entity_scores(gold, found, reading="conlleval") == {
        "precision": 2 / 4,
        "recall": 2 / 3,
        "f1": 4 / 7,
        "f1_LOC": 2 / 3,
        "f1_ORG": 0.0,
        "f1_PER": 1.0,
    }


@pytest.mark.parametrize(
    ("reading", "tags", "rules"),
    [
        ("BIO", BIO_TAGS, {"mode": "strict", "scheme": IOB2}),
        ("BIOES", BIOES_TAGS, {"mode": "strict", "scheme": IOBES}),
        ("conlleval", BIOES_TAGS, {}),
    ],
)
def test_scores_are_those_of_seqeval(reading: str, tags: list[str], rules: dict[str, Any]) -> None:
    @settings(max_examples=150, deadline=None)
    @given(tag_pairs(tags))
    def compare(sentences: list[tuple[list[str], list[str]]]) -> None:
        gold, found = ([pair[side] for pair in sentences] for side in (0, 1))
        ours = entity_scores(gold, found, reading=reading)
        for key in ("precision", "recall", "f1"):
            theirs: Callable[..., float] = getattr(metrics, f"{key}_score")
            assert ours[key] == pytest.approx(theirs(gold, found, zero_division=0, **rules))

    compare()


def test_rows_without_any_entity_have_every_figure() -> None:
    found = tag_figures([("O", "O"), ("O",)], [("O", "O"), ("O",)], ("O",))
    assert (found["f1"], found["conlleval_f1"], found["accuracy"]) == (0.0, 0.0, 1.0)


def test_a_sentence_is_exact_where_intent_and_every_tag_are_right() -> None:
    gold = ("play", ("O", "B-ART"))
    found = [gold, ("play", ("O", "O")), ("book", gold[1]), ("book", ("O", "O")), ("play", ("B-ART", "B-ART"))]
    examples = [Example("f:1", "1", ("the", "film"), gold) for _ in found]
    labels = {"intent": ("book", "play"), "tag": ("B-ART", "O")}
    figures = KINDS["intent_slot"].measure(examples, [Prediction(one) for one in found], labels)
    assert (figures["exact"], figures["intent_accuracy"]) == (1 / 5, 3 / 5)
