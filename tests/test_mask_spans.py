"""SpanBERT's spans: their lengths, the budget, whole words, one replacement for all of a span, and a plain script."""

from __future__ import annotations

from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_loader import open_data
from test_mlm_masking import AFF, CLS, MASK, SEP, THE, UN, chinese_config, example, inside, mask, pieces, quick, text
from test_stages import OLD_FINGERPRINT, shards  # noqa: F401

from bert_ds.configuration.recipe.run_config import MaskingConfig, SequenceConfig
from bert_ds.corpus.batches.mask_spans import choose_spans, span_lengths

SPANS = MaskingConfig(whole_word_mask=True, span_mask=True, mask_token_fraction=1.0, random_token_fraction=0.0)


def test_lengths_are_geometric_and_cut_at_ten() -> None:
    lengths = span_lengths(np.random.default_rng(3).integers(0, 2**64, 200_000, dtype=np.uint64))
    whole = sum(0.2 * 0.8**before for before in range(10))
    for length in range(1, 11):
        assert inside(int((lengths == length).sum()), len(lengths), 0.2 * 0.8 ** (length - 1) / whole)
    assert (lengths.min(), lengths.max()) == (1, 10)
    assert lengths.mean() == pytest.approx(3.8, abs=0.02)  # the paper's figure


def by_hand(text: list[tuple[int, int, bool]], order: list[int], budget: int) -> set[tuple[int, int]]:
    """Words with the starts of their spans, one span after the other; a word is (pieces, span length, follows)."""
    covered: dict[int, int] = {}
    for anchor in order:
        if anchor in covered:
            continue
        place, words_left = anchor, text[anchor][1]
        while words_left and place < len(text) and (place == anchor or text[place][2]):
            spent = sum(text[word][0] for word in covered)
            if place not in covered and spent + text[place][0] > budget:
                break
            covered.setdefault(place, anchor)
            place, words_left = place + 1, words_left - 1
    return set(covered.items())


@quick
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 10), st.booleans()), min_size=1, max_size=25),
    st.integers(0, 20),
    st.randoms(use_true_random=False),
)
def test_spans_are_chosen_as_one_by_one(text: list[tuple[int, int, bool]], budget: int, random) -> None:
    order = list(range(len(text)))
    random.shuffle(order)
    bits = np.empty(len(text), dtype=np.uint64)
    bits[order] = np.arange(len(text), dtype=np.uint64)
    sizes, lengths, follows = (np.array(column) for column in zip(*text, strict=True))
    found = choose_spans(sizes, lengths, bits, follows=follows, budget=budget)
    assert {(word, start) for word, start in enumerate(found.tolist()) if start >= 0} == by_hand(text, order, budget)


def test_targets_stand_in_runs_and_are_as_many_as_without_spans() -> None:
    examples = [text(126, index) for index in range(300)]
    runs = []
    for one in mask(examples, SPANS):
        assert len(one.positions) == 19 and set(one.input_ids[one.positions].tolist()) == {MASK}
        gaps = np.diff(one.positions) == 1
        runs += [1 + sum(group) for is_run, group in groupby(gaps.tolist()) if is_run]
    assert len(runs) / len(examples) < 5 and np.mean(runs) > 3.5


def test_masks_of_spans_depend_on_seed_epoch_and_example_alone() -> None:
    examples = [text(40, index, epoch) for epoch in (0, 1) for index in range(6)]
    found = [tuple(one.positions.tolist()) for one in mask(examples, SPANS)]
    assert found == [tuple(mask([one], SPANS)[0].positions.tolist()) for one in examples]
    assert len(set(found)) == 12
    assert found != [tuple(one.positions.tolist()) for one in mask(examples, SPANS, seed=1)]


def test_spans_hold_whole_words_and_do_not_cross_a_special_piece() -> None:
    one = example([CLS, *[UN, AFF, THE] * 12, SEP, *[THE, UN, AFF] * 12, SEP])
    config = SPANS.model_copy(update={"mlm_probability": 0.3})
    for seed in range(60):
        (found,) = mask([one], config, tokenizer=pieces, seed=seed)
        taken = set(found.positions.tolist())
        assert 20 <= len(taken) <= 22 and not taken & {0, 37, 74}
        assert all((place + 1 in taken) == (place in taken) for place in np.flatnonzero(one.input_ids == UN).tolist())


def test_a_span_ends_at_a_special_piece() -> None:
    config = SPANS.model_copy(update={"mlm_probability": 0.1})
    ids = [CLS, *[word for pair in range(13) for word in (10 + pair, 30 + pair, SEP)]]
    in_a_run = 0
    for one in mask([example(ids, index) for index in range(200)], config):
        assert len(one.positions) == 4
        numbers = [place - place // 3 for place in one.positions.tolist()]  # of words, special pieces left out
        in_a_run += numbers[-1] == numbers[0] + 3
    assert in_a_run < 50  # by chance; half of all examples where spans go on


def test_a_span_is_replaced_as_one() -> None:
    config = SPANS.model_copy(update={"mlm_probability": 0.01, "mask_token_fraction": 0.5})
    alike, apart = set(), 0
    for one in mask([text(498, index) for index in range(200)], config):
        shown = (one.input_ids[one.positions] == MASK).tolist()
        for (here, there), (kind, next_kind) in zip(pairwise(one.positions.tolist()), pairwise(shown), strict=True):
            alike |= {kind} if there == here + 1 and kind == next_kind else set()
            apart += there == here + 1 and kind != next_kind
    assert alike == {True, False} and apart < 8  # five targets of 500 seldom are two spans side by side


def test_spans_of_chinese_are_of_words_of_the_list(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("北京\n天安门\n", encoding="utf-8")
    config = chinese_config("word_list", str(tmp_path / "words.txt")).model_copy(update={"span_mask": True})
    ids = [pieces.pieces.index(piece) for piece in "我爱北京天安门吗"]
    for seed in range(40):
        (found,) = mask([example([CLS, *ids, SEP])], config, tokenizer=pieces, seed=seed)
        taken = set(found.positions.tolist())
        assert ({3, 4} <= taken) or not ({3, 4} & taken)
        assert ({5, 6, 7} <= taken) or not ({5, 6, 7} & taken)


def test_spans_change_the_fingerprint_and_want_whole_words(shards: Path) -> None:  # noqa: F811
    plain = open_data(shards, sequences=SequenceConfig(max_seq_length=64)).fingerprint
    whole = open_data(shards, masking=MaskingConfig(whole_word_mask=True)).fingerprint
    spans = open_data(shards, masking=MaskingConfig(whole_word_mask=True, span_mask=True)).fingerprint
    assert plain == OLD_FINGERPRINT and len({plain, whole, spans}) == 3
    with pytest.raises(ValueError, match="span_mask takes whole words: wanted whole_word_mask true"):
        MaskingConfig(span_mask=True)
