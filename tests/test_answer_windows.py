from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_ds.corpus.tokenizer.wordpiece import SPECIAL_PIECES, TextRules, WordPieceTokenizer
from bert_ds.downstream.rows.answer_windows import (
    Candidate,
    answer_characters,
    answer_pieces,
    best_candidates,
    cut_windows,
    merge_candidates,
    target_tokens,
)

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
PIECES = [*SPECIAL_PIECES, *LETTERS, *(f"##{letter}" for letter in LETTERS), *"0123456789.,()-中国北京", "##1"]
TOKENIZER = WordPieceTokenizer(PIECES, TextRules())


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def test_windows_overlap_by_the_stride_and_hold_question_and_context() -> None:
    windows = cut_windows(ids(10, 11), ids(*range(20, 27)), tokenizer=TOKENIZER, max_seq_length=9, stride=2)
    assert [window.input_ids.tolist() for window in windows] == [
        [2, 10, 11, 3, 20, 21, 22, 23, 3],
        [2, 10, 11, 3, 22, 23, 24, 25, 3],
        [2, 10, 11, 3, 24, 25, 26, 3],
    ]
    assert windows[2].token_type_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [window[2:] for window in windows] == [(4, 0, 4), (4, 2, 4), (4, 4, 3)]


def test_a_long_question_leaves_no_gap_between_windows_and_a_longer_one_is_refused() -> None:
    windows = cut_windows(ids(*range(10, 16)), ids(20, 21, 22), tokenizer=TOKENIZER, max_seq_length=10, stride=128)
    assert [window.input_ids[8:-1].tolist() for window in windows] == [[20], [21], [22]]
    with pytest.raises(ValueError, match="the question has 7 pieces, wanted at most 6 for max_seq_length 10"):
        cut_windows(ids(*range(10, 17)), ids(20), tokenizer=TOKENIZER, max_seq_length=10, stride=128)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 5), st.integers(9, 20), st.integers(1, 30))
def test_every_piece_is_in_a_window(num_context: int, num_question: int, length: int, stride: int) -> None:
    context = np.arange(100, 100 + num_context)
    windows = cut_windows(np.arange(num_question), context, tokenizer=TOKENIZER, max_seq_length=length, stride=stride)
    held = {piece for w in windows for piece in w.input_ids[w.first_token : w.first_token + w.num_pieces].tolist()}
    assert held == set(context.tolist())
    assert all(len(window.input_ids) <= length for window in windows)


@pytest.mark.parametrize(
    ("context", "answer"),
    [
        ("He saw the Café-Bar, there.", "Café"),
        ("He saw the Cafe\u0301-Bar.", "Cafe\u0301"),
        ("He saw the cafe\u0301", "cafe\u0301"),
        ("中国的首都是北京。", "北京"),
        ("In  (1998\u20131999)  there", "(1998\u20131999)"),
        ("um Straße\u00ad und ÖL", "ÖL"),
        ("a \u200dword\u200d b", "word\u200d"),
        ("[SEP] and [MASK] stay text", "[MASK]"),
    ],
)
def test_an_answer_comes_back_as_it_stands_in_the_context(context: str, answer: str) -> None:
    encoded = TOKENIZER.encode_with_offsets(context)
    assert encoded.ids.tobytes() == np.frombuffer(TOKENIZER.encode(context), "<u2").astype(np.int32).tobytes()
    start = context.index(answer)
    pieces = answer_pieces(encoded, start, start + len(answer))
    assert pieces is not None
    found = answer_characters(context, encoded, *pieces)
    assert context[slice(*found)] == answer


def test_an_answer_of_characters_that_are_no_piece_has_none() -> None:
    encoded = TOKENIZER.encode_with_offsets("a \u200d b")
    assert answer_pieces(encoded, 2, 3) is None


def test_the_target_of_a_window_that_does_not_hold_the_whole_answer_is_cls() -> None:
    first, second = cut_windows(ids(10), ids(20, 21, 22, 23, 24), tokenizer=TOKENIZER, max_seq_length=7, stride=2)
    assert target_tokens(first, (1, 2)) == (4, 5)
    assert target_tokens(second, (1, 2)) == (0, 0)
    assert target_tokens(second, (4, 4)) == (5, 5)
    assert target_tokens(first, None) == (0, 0)


def test_the_best_candidates_are_spans_of_the_context_of_bounded_length() -> None:
    window = cut_windows(ids(10), ids(20, 21, 22), tokenizer=TOKENIZER, max_seq_length=10, stride=2)[0]
    start = np.array([9.0, 9.0, 9.0, 1.0, 0.0, 3.0, 9.0])
    end = np.array([9.0, 9.0, 9.0, 2.0, 0.0, 5.0, 9.0])
    found = best_candidates(window, start, end, max_answer_pieces=2, num_best=3)
    assert found == [(8.0, 2, 2), (5.0, 1, 2), (3.0, 0, 0)]
    assert best_candidates(window, start, end, max_answer_pieces=3, num_best=2) == [(8.0, 2, 2), (6.0, 0, 2)]


def test_a_span_that_two_windows_find_counts_once_with_its_better_score() -> None:
    found = merge_candidates([Candidate(1.0, 3, 5), Candidate(2.0, 0, 1), Candidate(4.0, 3, 5)], 5)
    assert found == [Candidate(4.0, 3, 5), Candidate(2.0, 0, 1)]
