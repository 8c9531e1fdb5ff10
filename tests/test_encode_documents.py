from __future__ import annotations

import os

import pytest

from bert_ds.basics.ranks import DataError
from bert_ds.corpus.shards.encode_documents import Batch, Encoder, encode_in_order, split_of
from bert_ds.corpus.text.text_input import Position
from bert_ds.corpus.tokenizer.wordpiece import SPECIAL_PIECES, TextRules, WordPieceTokenizer

TOKENIZER = WordPieceTokenizer([*SPECIAL_PIECES, "a", "b", "."], TextRules())
TEXTS = [" ".join(["a" if number >> bit & 1 else "b" for bit in range(12)]) + " ." for number in range(2000)]


class DyingEncoder(Encoder):
    """An encoder in whose process something goes fatally wrong."""

    def __call__(self, texts: list[str]) -> dict:
        os._exit(9)


def test_the_split_depends_on_the_words_alone() -> None:
    chosen = [split_of(each, 0.1) for each in TEXTS]
    assert [split_of(f" {each.replace(' ', chr(10))}\n", 0.1) for each in TEXTS] == chosen
    assert 150 < chosen.count("validation") < 250
    assert {split_of(each, 0.0) for each in TEXTS} == {"train"}


def test_a_larger_fraction_keeps_what_a_smaller_one_held_out() -> None:
    for number in range(500):
        if split_of(TEXTS[number], 0.05) == "validation":
            assert split_of(TEXTS[number], 0.2) == "validation"


def test_counts_follow_the_documents_and_what_is_empty_vanishes() -> None:
    parts = Encoder(TOKENIZER, 0.0)(["a b.\nA\na", "\u200b", "x"])
    assert list(parts) == ["train"]
    assert list(memoryview(parts["train"].tokens).cast("H")) == [5, 6, 7, 5, 5, 1]
    assert list(memoryview(parts["train"].sentences).cast("I")) == [3, 1, 1, 1]
    assert list(memoryview(parts["train"].documents).cast("I")) == [3, 1]
    assert parts["train"].num_unknown == 1


def test_a_dying_worker_ends_the_build_with_a_reason() -> None:
    batches = iter([Batch(Position(0, 1), 1, ["a"])])
    with pytest.raises(DataError, match="a worker process was killed"):
        list(encode_in_order(batches, DyingEncoder(TOKENIZER, 0.0), workers=2))
