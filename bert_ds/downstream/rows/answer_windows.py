"""Question and context as sequences that fit the model, and from their scores back to characters of the context.

A window is [CLS] question [SEP] part of the context [SEP]; the parts overlap. Every context piece knows the characters
it was made of, so an answer is cut out of the context as it stands there: case, accents and spaces included.
"""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

import numpy as np

from bert_ds.corpus.tokenizer.text_tokenizer import EncodedText, TextTokenizer


class Window(NamedTuple):
    """One sequence of a question, of n tokens."""

    input_ids: np.ndarray
    """int32 [n]."""
    token_type_ids: np.ndarray
    """int8 [n]; 1 on the context and its [SEP]."""
    first_token: int
    """Place in the window of its first context piece."""
    first_piece: int
    """Place in the whole context of that piece."""
    num_pieces: int
    """Context pieces in the window."""


class Candidate(NamedTuple):
    """A possible answer: its score and the characters start to stop - 1 of the context."""

    score: float
    start: int
    stop: int


def cut_windows(
    question_ids: np.ndarray, context_ids: np.ndarray, *, tokenizer: TextTokenizer, max_seq_length: int, stride: int
) -> list[Window]:
    """Return the windows of a question, in order; together they hold every context piece.

    Args:
        question_ids: integers, without special pieces.
        context_ids: integers, without special pieces; an empty context gives one window.
        tokenizer: gives the special pieces.
        max_seq_length: tokens of a window at most.
        stride: context pieces from the beginning of a window to that of the next, at least 1. Where a long question
            leaves less room than that, windows follow each other without a gap.

    Raises:
        ValueError: the question leaves no room for the context.
    """
    special, between = tokenizer.special_ids, tokenizer.between
    num_marks = 2 + len(between)
    room = max_seq_length - len(question_ids) - num_marks
    if room < 1:
        raise ValueError(
            f"the question has {len(question_ids)} pieces, wanted at most {max_seq_length - num_marks - 1} "
            f"for max_seq_length {max_seq_length}"
        )
    head = np.concatenate(([special.cls], question_ids, between)).astype(np.int32)
    windows = []
    first = 0
    while True:
        part = context_ids[first : first + room].astype(np.int32)
        types = np.repeat([0, 1], [len(head), len(part) + 1]).astype(np.int8)
        ids = np.concatenate((head, part, [special.sep])).astype(np.int32)
        windows.append(Window(ids, types, len(head), first, len(part)))
        if first + room >= len(context_ids):
            return windows
        first += min(stride, room)


def answer_pieces(context: EncodedText, start: int, stop: int) -> tuple[int, int] | None:
    """Return the first and the last piece that hold any of the characters start to stop - 1, None if none does."""
    first = int(np.searchsorted(context.stops, start, side="right"))
    last = int(np.searchsorted(context.starts, stop, side="left")) - 1
    return (first, last) if first <= last else None


def target_tokens(window: Window, pieces: tuple[int, int] | None) -> tuple[int, int]:
    """Return the tokens of a window where an answer of these pieces begins and ends; (0, 0) if it is not all there."""
    if pieces is None:
        return 0, 0
    first, last = (piece - window.first_piece for piece in pieces)
    if first < 0 or last >= window.num_pieces:
        return 0, 0
    return window.first_token + first, window.first_token + last


def best_candidates(
    window: Window, start_scores: np.ndarray, end_scores: np.ndarray, *, max_answer_pieces: int, num_best: int
) -> list[tuple[float, int, int]]:
    """Return the best (score, first piece of the context, last piece) of a window, the best first.

    A score is that of the begin plus that of the end; the end is not before the begin, and an answer has at most
    `max_answer_pieces`.

    Args:
        window: of n tokens.
        start_scores, end_scores: floats [n].
    """
    inside = slice(window.first_token, window.first_token + window.num_pieces)
    scores = start_scores[inside, None].astype(np.float64) + end_scores[None, inside]
    firsts, lasts = np.nonzero(_allowed(window.num_pieces, max_answer_pieces))
    values = scores[firsts, lasts]
    order = np.argsort(-values, kind="stable")[:num_best]
    offset = window.first_piece
    return [(float(values[k]), int(firsts[k]) + offset, int(lasts[k]) + offset) for k in order]


def answer_characters(text: str, context: EncodedText, first: int, last: int) -> tuple[int, int]:
    """Return start and stop of the characters of the pieces first to last.

    What BERT's normaliser drops belongs to no piece; a combining accent or a joiner behind the last piece belongs to
    the answer all the same.
    """
    start, stop = int(context.starts[first]), int(context.stops[last])
    following = int(context.starts[last + 1]) if last + 1 < len(context.starts) else len(text)
    while stop < following and unicodedata.category(text[stop]) in ("Mn", "Me", "Cf"):
        stop += 1
    return start, stop


def merge_candidates(candidates: list[Candidate], num_best: int) -> list[Candidate]:
    """Return the best candidates of all windows of a question, each span once with its best score."""
    best: dict[tuple[int, int], Candidate] = {}
    for candidate in candidates:
        span = (candidate.start, candidate.stop)
        if span not in best or candidate.score > best[span].score:
            best[span] = candidate
    return sorted(best.values(), key=lambda one: (-one.score, one.start, one.stop))[:num_best]


def _allowed(num_pieces: int, max_answer_pieces: int) -> np.ndarray:
    """bool [num_pieces, num_pieces]: the end is not before the begin and at most max_answer_pieces - 1 behind it."""
    pieces = np.arange(num_pieces)
    distance = pieces[None, :] - pieces[:, None]
    return (distance >= 0) & (distance < max_answer_pieces)
