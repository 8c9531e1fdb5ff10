"""Spans of whole words to predict, as in SpanBERT (Joshi et al. 2020, arXiv 1907.10529, section 3.1).

A span starts at a random word that is not taken yet and goes on over so many words, a number drawn from a geometric
distribution with p = 0.2 that is cut off at 10 (mean 3.8); spans are drawn until the budget of pieces is spent. What a
span covers already counts for its length. Departures: starts are words, not pieces; a span ends in front of a word that
no longer fits the budget, which is not cut in two; and a span does not go across a special piece.
"""

from __future__ import annotations

import numpy as np

from bert_ds.corpus.batches.keyed_random import fraction

SPAN_P = 0.2
LONGEST_SPAN = 10
_SHARES = SPAN_P * (1 - SPAN_P) ** np.arange(LONGEST_SPAN)
_UP_TO = np.cumsum(_SHARES / _SHARES.sum())[:-1]


def span_lengths(bits: np.ndarray) -> np.ndarray:
    """Return the number of words of a span for each uint64 of random bits, int64, 1 to LONGEST_SPAN."""
    return 1 + np.searchsorted(_UP_TO, fraction(bits), side="right")


def choose_spans(
    sizes: np.ndarray, lengths: np.ndarray, bits: np.ndarray, *, follows: np.ndarray, budget: int
) -> np.ndarray:
    """Choose the words of one example.

    Args:
        sizes: int64 [words], pieces of each word.
        lengths: int64 [words], words of a span that starts there.
        bits: uint64 [words], random: the order in which words are starts.
        follows: bool [words], whether a word comes right after the one before it.
        budget: pieces to take at most.

    Returns:
        int64 [words], for each the word that its span starts at, -1 where it is not taken.
    """
    size_of, length_of, follows_of = sizes.tolist(), lengths.tolist(), [*follows.tolist(), False]
    start_of, left = [-1] * len(size_of), budget
    for start in np.argsort(bits, kind="stable").tolist():
        if not left:
            break
        if start_of[start] >= 0:
            continue
        for word in range(start, start + length_of[start]):
            if start_of[word] < 0:
                if size_of[word] > left:
                    break
                start_of[word] = start
                left -= size_of[word]
            if not follows_of[word + 1]:
                break
    return np.array(start_of, dtype=np.int64)
