"""Figures of rankings, worked out by hand; places by cosine and by BM25."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bert_ds.downstream.scores import ranking
from bert_ds.downstream.scores.ranking import bm25_ranks, cosine_ranks, first_passages, ranking_figures


def test_the_figures_are_those_worked_out_by_hand() -> None:
    figures = ranking_figures([(1,), (2, 3), (11, 200)])
    assert figures["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 11) / 3)
    assert [figures[f"recall_{k}"] for k in (1, 10, 100)] == pytest.approx([1 / 3, 2 / 3, 2.5 / 3])
    second = (1 / math.log2(3) + 1 / math.log2(4)) / (1 + 1 / math.log2(3))  # 0.693
    assert figures["ndcg_10"] == pytest.approx((1 + second + 0) / 3)


def test_the_greatest_gain_is_that_of_ten_passages_where_more_are_wanted() -> None:
    assert ranking_figures([tuple(range(1, 13))])["ndcg_10"] == pytest.approx(1.0)


@pytest.mark.parametrize("at_once", [1 << 25, 7])
def test_places_are_counted_exactly_in_blocks_of_any_size(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_SCORES_AT_ONCE", at_once)
    passages = np.array([[1, 0], [2, 2], [0, 5], [-1, 0], [3, 0]], dtype=np.float32)  # the last is the first, longer
    queries = np.array([[4, 0], [0, 1], [1, 1]], dtype=np.float32)
    assert cosine_ranks(queries, passages, [[0, 4], [3], [2, 1]]) == [(1, 2), (4,), (1, 3)]
    drawn = np.random.default_rng(0)
    queries, passages = (drawn.standard_normal((number, 8)).astype(np.float32) for number in (9, 30))
    cosines = [[q @ p / np.linalg.norm(q) / np.linalg.norm(p) for p in passages] for q in queries]
    wanted = [(1 + sorted(row, reverse=True).index(row[3]),) for row in cosines]
    assert cosine_ranks(queries, passages, [[3]] * 9) == wanted


def test_the_first_passages_are_those_of_the_best_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_SCORES_AT_ONCE", 7)
    passages = np.array([[1, 0], [2, 2], [0, 5], [-1, 0], [3, 0]], dtype=np.float32)
    queries = np.array([[4, 0], [0, 1], [1, 1]], dtype=np.float32)
    assert first_passages(queries, passages, 3) == [[0, 4, 1], [2, 1, 0], [1, 0, 2]]


def test_bm25_finds_the_passage_with_the_rare_words() -> None:
    passages = ["the film is dull", "the play in paris", "the book", "巴黎 的 电影"]
    found = bm25_ranks(["a play in the park?", "the Paris film", "看电影"], passages, [[1], [0, 1], [3]])
    assert [places[0] for places in found] == [1, 1, 1]
    assert found[1] == (1, 2)


def test_a_query_of_unknown_words_finds_passages_in_their_order() -> None:
    assert bm25_ranks(["xyz", ""], ["the film", "a play", "it"], [[2], [0]]) == [(3,), (1,)]
