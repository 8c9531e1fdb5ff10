from __future__ import annotations

import pytest

from bert_ds.downstream.scores.qa_scores import answer_scores, best_threshold, cmrc_units, squad_normalised


def one(rules: str, gold: list[str], predicted: str) -> tuple[float, float]:
    """Exact match and F1 of one question."""
    scores = answer_scores({"q": gold}, {"q": predicted}, rules=rules)
    return scores["exact_match"], round(scores["f1"], 4)


def test_squad_normalisation_drops_case_ascii_punctuation_articles_and_spaces() -> None:
    assert squad_normalised("The  U.S.'s (an)\tapple, a-b") == "uss apple ab"
    assert squad_normalised("Athena theatre “quoted”") == "athena theatre “quoted”"


@pytest.mark.parametrize("rules", ["squad1", "squad2"])
@pytest.mark.parametrize(
    ("gold", "predicted", "exact", "f1"),
    [
        (["the Eiffel Tower"], "Eiffel tower.", 100.0, 100.0),
        (["Eiffel Tower in Paris"], "Eiffel Tower", 0.0, 66.6667),
        (["10th century", "in the 10th century"], "the 10th century", 100.0, 100.0),
        (["a b b"], "b b b", 0.0, 80.0),
        (["Paris"], "London", 0.0, 0.0),
        (["Paris"], "", 0.0, 0.0),
    ],
)
def test_squad_scores_of_hand_computed_answers(
    rules: str, gold: list[str], predicted: str, exact: float, f1: float
) -> None:
    assert one(rules, gold, predicted) == (exact, f1)


def test_an_empty_gold_counts_in_squad_2_and_normalises_to_nothing_in_squad_1() -> None:
    assert one("squad2", [], "") == (100.0, 100.0)
    assert one("squad2", [], "Paris") == (0.0, 0.0)
    assert one("squad2", ["the", "Paris"], "a") == (0.0, 0.0)
    assert one("squad2", ["the"], "a") == (100.0, 100.0)
    assert one("squad1", ["the"], "a") == (100.0, 0.0)


@pytest.mark.parametrize(
    ("gold", "predicted", "exact", "f1"),
    [
        (["锣鼓点"], "锣鼓点。", 100.0, 100.0),
        (["中国大陆传统器乐"], "传统器乐", 0.0, 66.6667),
        (["一二三四"], "一二四三", 0.0, 50.0),
        (["1990年IBM公司"], "ibm公司", 0.0, 75.0),
        (["4分钟", "5分钟"], "5分钟", 100.0, 100.0),
        (["踢爆"], "", 0.0, 0.0),
    ],
)
def test_cmrc_scores_of_hand_computed_answers(gold: list[str], predicted: str, exact: float, f1: float) -> None:
    assert one("cmrc", gold, predicted) == (exact, f1)


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("《Bee Gees》乐队，1,000.5万", ["bee", "gees", "乐", "队", "1,000.5", "万"]),
        ('他说"I don\'t know."', ["他", "说", "``", "i", "do", "n't", "know", ".", "''"]),
        ("H.G. Wells' (1898–1901)...", ["h.g.", "wells", "'", "(", "1898", "–", "1901", ")", "..."]),
        ("a-b_c", ["abc"]),
    ],
)
def test_cmrc_units_are_chinese_characters_and_words_as_nltk_cuts_them(text: str, units: list[str]) -> None:
    assert cmrc_units(text) == units


GOLD = {"a": ["x"], "b": [], "c": ["y"], "d": []}
FOUND = {"a": "x", "b": "z", "c": "wrong", "d": "z"}
NO_ANSWER = {"a": -2.0, "b": 1.0, "c": 3.0, "d": 5.0}


def test_a_threshold_decides_which_questions_of_squad_2_are_answered() -> None:
    scores = answer_scores(GOLD, FOUND, rules="squad2", no_answer_scores=NO_ANSWER, threshold=2.0)
    assert scores == {
        "exact_match": 50.0,
        "f1": 50.0,
        "has_answer_exact_match": 50.0,
        "has_answer_f1": 50.0,
        "no_answer_exact_match": 50.0,
        "no_answer_f1": 50.0,
        "best_exact_match": 75.0,
        "best_exact_match_threshold": -2.0,
        "best_f1": 75.0,
        "best_f1_threshold": -2.0,
    }


def test_the_best_threshold_leaves_all_unanswered_where_every_answer_hurts() -> None:
    best = best_threshold(GOLD, FOUND, dict.fromkeys(GOLD, 0.0), no_answer_scores=NO_ANSWER)
    assert best == (50.0, 0.0)


def test_a_missing_prediction_and_an_impossible_question_without_rules_for_it_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 questions have no prediction, the first is 'b'"):
        answer_scores({"a": ["x"], "b": ["y"]}, {"a": "x"}, rules="squad1")
    with pytest.raises(ValueError, match="question 'b' has no gold answer, which only the rules squad2 know"):
        answer_scores(GOLD, FOUND, rules="cmrc")
