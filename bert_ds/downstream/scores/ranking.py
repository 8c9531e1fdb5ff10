"""Texts that have to find others: exact places by cosine or by BM25, in blocks of bounded memory, and their figures.

Q queries, P passages, D the width of their vectors.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence

import numpy as np

from bert_ds.configuration.recipe.run_config import ConfigError

_SCORES_AT_ONCE = 1 << 25
"""128 MiB in fp32."""
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_]+")
"""A word, or a character of Chinese or Japanese."""

Ranks = list[tuple[int, ...]]
"""Of each query the places of what it has to find, from 1 on, the best first."""


def ranking_figures(ranks: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return the means over the queries.

    recall_k is the share of the wanted passages among the first k, mrr 1 / the place of the first of them, and
    ndcg_10 the sum of 1 / log2(1 + place) over those among the first ten, of the greatest such sum (Jaervelin and
    Kekaelaeinen 2002, doi 10.1145/582415.582418, with gains of 1).
    """
    figures = {
        "ndcg_10": np.mean([_gain([r for r in places if r <= 10]) / _best_gain(len(places)) for places in ranks])
    }
    figures["mrr"] = np.mean([1 / min(places) for places in ranks])
    for k in (1, 10, 100):
        figures[f"recall_{k}"] = np.mean([sum(place <= k for place in places) / len(places) for places in ranks])
    return {name: float(value) for name, value in figures.items()}


def cosine_ranks(queries_QD: np.ndarray, passages_PD: np.ndarray, wanted: Sequence[Sequence[int]]) -> Ranks:
    """Return the places that cosines give, in fp32; of equal ones the earlier passage comes first.

    Args:
        queries_QD, passages_PD: vectors.
        wanted: of each query the indices of the passages that it has to find, at least one.
    """
    return _ranks(_cosines(queries_QD, passages_PD), len(passages_PD), wanted)


def first_passages(queries_QD: np.ndarray, passages_PD: np.ndarray, depth: int) -> list[list[int]]:
    """Return the indices of the first passages of each query, in the order of `cosine_ranks`."""
    block, found = _cosines(queries_QD, passages_PD), list[list[int]]()
    at_once = max(1, _SCORES_AT_ONCE // len(passages_PD))
    for first in range(0, len(queries_QD), at_once):
        found += np.argsort(-block(first, first + at_once), axis=1, kind="stable")[:, :depth].tolist()
    return found


def bm25_ranks(queries: Sequence[str], passages: Sequence[str], wanted: Sequence[Sequence[int]]) -> Ranks:
    """Return the places that BM25 (Lucene's, k1 1.5, b 0.75) gives; as `cosine_ranks` in all else.

    Raises:
        ConfigError: the package bm25s is not installed.
    """
    require_bm25()
    import bm25s

    index = bm25s.BM25()
    index.index([_words(text) for text in passages], show_progress=False)
    words = [_words(text) for text in queries]
    known = [[word for word in one if word in index.vocab_dict] for one in words]
    none = np.zeros(len(passages), dtype=np.float32)

    def block(first: int, stop: int) -> np.ndarray:
        return np.stack([index.get_scores(one) if one else none for one in known[first:stop]])

    return _ranks(block, len(passages), wanted)


def require_bm25() -> None:
    """Raise ConfigError unless bm25s is installed."""
    if importlib.util.find_spec("bm25s") is None:
        raise ConfigError("bm25s not installed: what BM25 finds wants pip install bm25s")


def _cosines(queries_QD: np.ndarray, passages_PD: np.ndarray) -> Callable[[int, int], np.ndarray]:
    queries, passages = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries_QD, passages_PD))
    return lambda first, stop: queries[first:stop] @ passages.T


def _ranks(block: Callable[[int, int], np.ndarray], num_passages: int, wanted: Sequence[Sequence[int]]) -> Ranks:
    """Return places; block gives the scores of some queries, fp32 [q, P]."""
    at_once, found = max(1, _SCORES_AT_ONCE // num_passages), []
    for first in range(0, len(wanted), at_once):
        group = wanted[first : first + at_once]
        for scores_P, places in zip(block(first, first + len(group)), group, strict=True):
            own = [(scores_P[place], place) for place in places]
            ranks = [1 + (scores_P > score).sum() + (scores_P[:place] == score).sum() for score, place in own]
            found.append(tuple(sorted(map(int, ranks))))
    return found


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _gain(places: Sequence[int]) -> float:
    return float(sum(1 / np.log2(1 + place) for place in places))


def _best_gain(number: int) -> float:
    return _gain(range(1, min(number, 10) + 1))
