"""No row of one side of a split is, contains or is part of a row of the other side."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from bert_ds.downstream.rows.splits import drop_overlap, first_by_hash, hold_out

SENTENCES = [
    "a gripping and moving film",
    "moving film",
    "gripping",
    "the plot is thin",
    "plot",
    "thin soup",
    "Moving Film",
    "it works",
]


def test_only_rows_that_are_part_of_no_other_row_are_held_out() -> None:
    split = hold_out(SENTENCES, 0.9)
    assert {SENTENCES[i] for i in split.validation} <= {SENTENCES[0], SENTENCES[3], SENTENCES[5], SENTENCES[7]}
    assert sorted(split.train + split.validation) == list(range(8))


def test_phrases_of_a_held_out_sentence_leave_the_training_rows() -> None:
    train = ["moving film", "MOVING  film", "moving", "a moving story", "the film moving"]
    split = drop_overlap(train, ["a gripping and moving film"])
    assert [train[i] for i in split.train] == ["a moving story", "the film moving"]


def test_a_short_held_out_row_goes_instead_of_the_sentences_it_is_in() -> None:
    split = drop_overlap(["no , thanks", "no way"], ["no", "quite so"])
    assert (split.train, split.validation) == ([0, 1], [1])


def test_chinese_rows_are_compared_by_character() -> None:
    assert drop_overlap(["电影很好", "很坏"], ["这部电影很好看"]).train == [1]


def test_equal_rows_are_held_out_together() -> None:
    rows = ["one two", "three four", "one two", "five six"]
    split = hold_out(rows, 0.25)
    held = {rows[i] for i in split.validation}
    assert not held & {rows[i] for i in split.train}


def test_the_same_rows_are_chosen_whatever_their_order() -> None:
    rows = [f"row {index}" for index in range(50)]
    chosen = {rows[i] for i in first_by_hash(rows, 10)}
    backwards = rows[::-1]
    assert {backwards[i] for i in first_by_hash(backwards, 10)} == chosen


WORDS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=6).map(" ".join)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(train=st.lists(WORDS, max_size=12), validation=st.lists(WORDS, max_size=12))
def test_what_remains_never_overlaps(train: list[str], validation: list[str]) -> None:
    split = drop_overlap(train, validation)
    for i in split.train:
        for j in split.validation:
            assert f" {train[i]} " not in f" {validation[j]} "
            assert f" {validation[j]} " not in f" {train[i]} "
