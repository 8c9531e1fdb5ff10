from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from corpus_fixtures import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX, ConfigError, MaskingConfig
from bert_ds.corpus.batches.examples import Example
from bert_ds.corpus.batches.mlm_masking import MaskedExample, Masker, choose_words
from bert_ds.corpus.tokenizer.word_segments import WordJoiner, longest_match
from bert_ds.corpus.tokenizer.wordpiece import SPECIAL_PIECES, TextRules, WordPieceTokenizer

CLS, SEP, MASK = 2, 3, 4
words = tiny_tokenizer()
pieces = WordPieceTokenizer([*SPECIAL_PIECES, "un", "##aff", "##able", "the", *"我爱北京天安门吗"], TextRules())
UN, AFF, ABLE, THE = 5, 6, 7, 8
quick = settings(max_examples=100, deadline=None)


def example(ids: list[int], index: int = 0, epoch: int = 0) -> Example:
    types = np.zeros(len(ids), dtype=np.int8)
    return Example(np.array(ids, dtype=np.int32), types, IGNORE_INDEX, (0, epoch, index))


def text(num_words: int, index: int = 0, epoch: int = 0) -> Example:
    return example([CLS, *range(10, 10 + num_words), SEP], index, epoch)


def mask(examples: list[Example], config: MaskingConfig, *, tokenizer: WordPieceTokenizer = words, seed: int = 0):
    return Masker(tokenizer, config, seed=seed).mask(examples)


def inside(count: int, trials: int, probability: float) -> bool:
    """Whether a binomial count is within 4.5 standard deviations: outside once in 150,000."""
    return abs(count - trials * probability) < 4.5 * (trials * probability * (1 - probability)) ** 0.5


@pytest.mark.parametrize(
    ("num_words", "probability", "bound", "expected"),
    [
        (98, 0.15, None, 15),
        (126, 0.15, None, 19),
        (126, 0.15, 20, 19),
        (510, 0.15, 20, 20),
        (1, 0.15, None, 1),
        (18, 0.4, None, 8),
        (3, 0.9, None, 3),
        (8, 0.25, None, 2),
    ],
)
def test_the_number_of_targets_is_the_rounded_share_of_the_length(
    num_words: int, probability: float, bound: int | None, expected: int
) -> None:
    config = MaskingConfig(mlm_probability=probability, max_predictions_per_seq=bound)
    assert len(mask([text(num_words)], config)[0].positions) == expected


def test_labels_are_what_stood_there_and_the_rest_is_untouched() -> None:
    original = text(100)
    (masked,) = mask([original], MaskingConfig())
    restored = masked.input_ids.copy()
    restored[masked.positions] = masked.labels
    assert restored.tolist() == original.input_ids.tolist()
    assert (np.diff(masked.positions) > 0).all()


def test_the_example_that_was_given_is_not_changed() -> None:
    original = text(100)
    mask([original], MaskingConfig())
    assert original.input_ids.tolist() == [CLS, *range(10, 110), SEP]


def test_targets_become_mask_random_or_stay_in_the_published_shares() -> None:
    masked = mask([text(100, index) for index in range(500)], MaskingConfig())
    seen = np.concatenate([one.input_ids[one.positions] for one in masked])
    labels = np.concatenate([one.labels for one in masked])
    assert len(labels) == 500 * 15
    # A random piece is the piece itself once in 995 draws: far inside the bound.
    assert inside((seen == MASK).sum(), len(labels), 0.8)
    assert inside((seen == labels).sum(), len(labels), 0.1)


def test_every_position_is_equally_likely() -> None:
    masked = mask([text(20, index) for index in range(6000)], MaskingConfig())
    counts = np.bincount(np.concatenate([one.positions for one in masked]), minlength=22)
    assert counts[0] == counts[21] == 0
    assert all(inside(count, 6000, 3 / 20) for count in counts[1:21])


def test_random_pieces_are_never_special_and_cover_the_vocabulary() -> None:
    config = MaskingConfig(mask_token_fraction=0.0, random_token_fraction=1.0)
    masked = mask([text(400, index) for index in range(300)], config)
    drawn = {piece for one in masked for piece in one.input_ids[one.positions].tolist()}
    assert drawn == set(range(5, 1000))


@quick
@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=40), min_size=1, max_size=4), st.booleans())
def test_special_pieces_are_never_targets(texts: list[list[int]], whole: bool) -> None:
    examples = [example([CLS, *ids, SEP], index) for index, ids in enumerate(texts)]
    for masked, ids in zip(mask(examples, MaskingConfig(whole_word_mask=whole)), texts, strict=True):
        assert all(label > MASK for label in masked.labels.tolist())
        candidates = sum(piece > MASK for piece in ids)
        assert len(masked.labels) == min(candidates, max(1, round(0.15 * (len(ids) + 2))))


@quick
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.booleans())
def test_masks_do_not_depend_on_the_other_examples(sizes: list[int], whole: bool) -> None:
    config = MaskingConfig(whole_word_mask=whole)
    together = mask([text(size, index) for index, size in enumerate(sizes)], config)
    for index, size in enumerate(sizes):
        (alone,) = mask([text(size, index)], config)
        assert alone.input_ids.tolist() == together[index].input_ids.tolist()
        assert alone.positions.tolist() == together[index].positions.tolist()


def test_sources_epochs_examples_and_seeds_have_masks_of_their_own() -> None:
    config = MaskingConfig()
    variants = [mask([text(100)], config), mask([text(100, epoch=1)], config), mask([text(100, index=1)], config)]
    variants += [mask([text(100)], config, seed=1), mask([text(100)._replace(key=(1, 0, 0))], config)]
    assert len({tuple(one[0].positions.tolist()) for one in variants}) == 5


@quick
@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=20), min_size=1, max_size=4),
    st.lists(st.integers(1, 15), min_size=4, max_size=4),
    st.randoms(use_true_random=False),
)
def test_words_are_chosen_as_one_by_one(sizes: list[list[int]], budgets: list[int], random) -> None:
    rows = [row for row, own in enumerate(sizes) for _ in own]
    flat = [size for own in sizes for size in own]
    bits = random.sample(range(2**40), len(flat))
    expected, left = [False] * len(flat), list(budgets)
    for word in sorted(range(len(flat)), key=lambda word: bits[word]):
        if flat[word] <= left[rows[word]]:
            expected[word] = True
            left[rows[word]] -= flat[word]
    arrays = np.array(rows), np.array(flat), np.array(bits, dtype=np.uint64)
    assert choose_words(*arrays, budgets=np.array(budgets)).tolist() == expected


def test_whole_words_are_masked_whole_or_not_at_all() -> None:
    config = MaskingConfig(whole_word_mask=True, mlm_probability=0.4)
    ids = [CLS, UN, AFF, ABLE, THE, THE, UN, ABLE, THE, THE, SEP]
    groups = [{1, 2, 3}, {4}, {5}, {6, 7}, {8}, {9}]
    chosen = [
        set(one.positions.tolist()) for one in mask([example(ids, i) for i in range(200)], config, tokenizer=pieces)
    ]
    assert all(group <= found or not group & found for group in groups for found in chosen)
    assert {len(found) for found in chosen} == {4}
    assert all(any(group <= found for found in chosen) for group in groups)


def test_without_whole_words_pieces_of_one_word_part() -> None:
    ids = [CLS, UN, AFF, ABLE, THE, THE, UN, ABLE, THE, THE, SEP]
    masked = mask([example(ids, i) for i in range(50)], MaskingConfig(mlm_probability=0.4), tokenizer=pieces)
    assert any(1 in one.positions and 2 not in one.positions for one in masked)


def test_a_word_that_is_too_long_for_the_budget_is_left_alone() -> None:
    (masked,) = mask([example([CLS, UN, AFF, ABLE, SEP])], MaskingConfig(whole_word_mask=True), tokenizer=pieces)
    assert len(masked.positions) == 0


def test_a_continuation_after_a_special_piece_is_a_word_of_its_own() -> None:
    config = MaskingConfig(whole_word_mask=True, mlm_probability=0.2)
    chosen = [
        one.positions.tolist()
        for one in mask([example([CLS, THE, SEP, ABLE, SEP], i) for i in range(30)], config, tokenizer=pieces)
    ]
    assert {tuple(found) for found in chosen} == {(1,), (3,)}


def test_an_example_without_text_has_no_targets() -> None:
    (masked,) = mask([example([CLS, 1, SEP])], MaskingConfig())
    assert isinstance(masked, MaskedExample) and len(masked.positions) == 0


def test_an_id_beyond_the_vocabulary_is_named_with_its_example() -> None:
    with pytest.raises(DataError, match=r"example 3 of source 0 holds the id 1000, .* 999: the shards are damaged"):
        mask([text(5), example([CLS, 1000, SEP], index=3)], MaskingConfig())


def test_chinese_words_of_a_list_are_masked_together(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("北京\n天安门\n北京天\n", encoding="utf-8")
    joiner = WordJoiner(pieces, chinese_config("word_list", str(tmp_path / "words.txt")))
    ids = np.array([CLS, *(pieces.pieces.index(piece) for piece in "我爱北京天安门"), UN, ABLE, SEP])
    # 北京天 is the longest match at 北, which leaves 安 and 门 alone.
    assert joiner.continues(ids).tolist() == [False] * 4 + [True, True] + [False] * 3 + [True, False]


def test_the_longest_word_of_a_list_matches() -> None:
    assert longest_match({"天安门", "天安", "北京"})("我爱北京天安门天安") == [1, 1, 2, 3, 2]


def test_jieba_words_are_masked_together() -> None:
    pytest.importorskip("jieba", reason="the extra zh is not installed")
    joiner = WordJoiner(pieces, chinese_config("jieba"))
    ids = np.array([CLS, *(pieces.pieces.index(piece) for piece in "我爱北京天安门"), SEP])
    assert joiner.continues(ids).tolist() == [False, False, False, False, True, False, True, True, False]


def test_a_missing_jieba_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ConfigError, match='extra "zh"'):
        WordJoiner(pieces, chinese_config("jieba"))


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"only english\n", "我\n爱\n".encode()])
def test_an_unusable_word_list_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"masking\.word_list .*words\.txt"):
        WordJoiner(pieces, chinese_config("word_list", str(path)))


def test_a_tokenizer_that_keeps_chinese_words_whole_is_refused() -> None:
    unsplit = WordPieceTokenizer(pieces.pieces, TextRules(tokenize_chinese_chars=False))
    with pytest.raises(ConfigError, match="does not split"):
        WordJoiner(unsplit, chinese_config("jieba"))


def chinese_config(segmenter: str, word_list: str | None = None) -> MaskingConfig:
    return MaskingConfig(whole_word_mask=True, word_segmenter=segmenter, word_list=word_list)


def test_random_pieces_come_from_the_whole_vocabulary() -> None:
    config = MaskingConfig(mlm_probability=0.5, mask_token_fraction=0.4, random_token_fraction=0.3)
    masked = mask([text(500, index) for index in range(8)], config)
    shown = np.concatenate([one.input_ids[one.positions] for one in masked])
    others = shown[(shown != MASK) & (shown != np.concatenate([one.labels for one in masked]))]
    assert len(others) > 400
    assert np.percentile(others, [10, 50, 90]) == pytest.approx([105, 500, 900], abs=60)
