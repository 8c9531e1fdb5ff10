"""What an evaluation predicts and shows: the same for every recipe."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_fixtures import counting_documents, tiny_tokenizer, write_shards

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX, MaskingConfig, SequenceConfig
from bert_ds.corpus.batches.batch_stages import DataSettings
from bert_ds.corpus.batches.collate import collate, grouped_by_kind
from bert_ds.corpus.batches.evaluation_masks import KEYED_PIECES, EvaluationMasker, split_key, text_key
from bert_ds.corpus.batches.examples import Example
from bert_ds.corpus.batches.loader import PretrainingData, Source
from bert_ds.corpus.batches.mlm_masking import MaskedExample
from bert_ds.corpus.shards.shard_folder import open_shards

UNK, CLS, SEP, MASK = 1, 2, 3, 4
HELD_OUT = counting_documents([[3, 20, 7], [40], [1, 1, 9], [30, 12], [25, 25, 25], [8, 8, 8, 8]] * 4)
"""Every piece occurs once, so that its id says where it stands: place + 5."""
RECIPES: list[tuple[dict[str, Any], dict[str, Any], int]] = [
    ({"max_seq_length": 64, "sentence_pair": "none"}, {}, 0),
    ({"max_seq_length": 16, "sentence_pair": "none"}, {"mlm_probability": 0.4, "max_predictions_per_seq": 1}, 1),
    ({"max_seq_length": 64, "sentence_pair": "nsp"}, {"whole_word_mask": True}, 0),
    ({"max_seq_length": 32, "sentence_pair": "sop"}, {"mask_token_fraction": 1.0, "random_token_fraction": 0.0}, 2),
    ({"max_seq_length": 128, "sentence_pair": "none", "cross_documents": True}, {"mlm_probability": 0.3}, 3),
]


def masker(vocab_size: int = 1000) -> EvaluationMasker:
    return EvaluationMasker(vocab_size=vocab_size, special_ids=range(5), mask_id=MASK)


def masked_text(ids: np.ndarray, *, key: int, first_place: int = 0) -> MaskedExample:
    """One sequence without marks."""
    example = Example(ids.astype(np.int32), np.zeros(len(ids), np.int8), IGNORE_INDEX, (0, 0, 0))
    places = np.arange(first_place, first_place + len(ids))
    return masker().mask([example], [places], keys=np.array([key], dtype=np.uint64))[0]


def fates(batches: list[MicroBatch]) -> tuple[dict[int, int], set[int]]:
    """What is shown at each target, and all pieces that were come by."""
    shown: dict[int, int] = {}
    seen: set[int] = set()
    for batch in batches:
        ids = batch.input_ids_T.clone()
        places, labels = batch.targets["masked_positions"], batch.targets["masked_labels"]
        shown |= dict(zip(labels.tolist(), ids[places].tolist(), strict=True))
        ids[places] = labels
        seen |= {one for one in ids.tolist() if one > MASK}
    return shown, seen


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("held_out"), HELD_OUT[:9], HELD_OUT, tokenizer=tiny_tokenizer(1600))


def held_out(folder: Path, recipe: tuple[dict[str, Any], dict[str, Any], int], **world: int) -> list[MicroBatch]:
    sequences, masking, seed = recipe
    settings = DataSettings(SequenceConfig(**sequences), MaskingConfig(**masking), seed, 8)
    data = PretrainingData([Source(folder, "text")], folder / "tokenizer", settings=settings)
    return list(data.evaluation_batches(10**6, batch_size=8, **{"rank": 0, "world_size": 1, **world}))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_fate_of_a_piece_is_the_same_whatever_the_recipe(shards: Path, recipe: Any) -> None:
    wanted, everything = fates(held_out(shards, RECIPES[0]))
    assert len(everything) == sum(len(sentence) for document in HELD_OUT for sentence in document)
    found, seen = fates(held_out(shards, recipe))
    assert len(seen) > 0.8 * len(everything)
    assert found == {piece: shown for piece, shown in wanted.items() if piece in seen}


def test_the_shares_are_fifteen_per_cent_and_eighty_ten_ten() -> None:
    ids = np.random.default_rng(0).integers(5, 1000, 400_000)
    found = masked_text(ids, key=7)
    shown = found.input_ids[found.positions]
    is_mask, is_kept = shown == MASK, shown == found.labels
    assert len(shown) / len(ids) == pytest.approx(0.15, abs=0.003)
    assert [is_mask.mean(), is_kept.mean()] == pytest.approx([0.8, 0.1], abs=0.006)
    others = shown[~is_mask & ~is_kept]
    assert (others.min(), others.max()) == (5, 999)
    assert np.bincount(others, minlength=1000)[5:].max() < 30, "drawn evenly: 6 in the mean"


def test_special_pieces_are_no_targets_and_never_shown() -> None:
    ids = np.tile([CLS, UNK, 17, SEP], 20_000)
    found = masked_text(ids, key=7)
    assert set(found.labels.tolist()) == {17}
    assert set(found.input_ids[found.positions].tolist()) & set(range(5)) == {MASK}


def test_a_mark_has_no_fate_and_another_text_has_other_targets() -> None:
    ids = np.arange(5, 905)
    example = Example(ids.astype(np.int32), np.zeros(900, np.int8), IGNORE_INDEX, (0, 0, 0))
    (marks,) = masker().mask([example], [np.full(900, -1)], keys=np.array([7], dtype=np.uint64))
    assert len(marks.positions) == 0
    one, other = (set(masked_text(ids, key=key).labels.tolist()) for key in (7, 8))
    assert 5 < len(one & other) < 60, "two draws of 15 % meet by chance"
    later = masked_text(ids[100:], key=7, first_place=100)
    assert set(later.labels.tolist()) == {label for label in one if label >= 105}


def test_the_key_is_of_the_pieces_and_not_of_how_they_are_cut_into_shards(tmp_path: Path) -> None:
    keys = [
        split_key(open_shards(write_shards(tmp_path / str(per_shard), HELD_OUT, documents_per_shard=per_shard)))
        for per_shard in (1, 5)
    ]
    ids = np.concatenate([sentence for document in HELD_OUT for sentence in document])
    assert keys == [text_key(ids, len(ids))] * 2
    changed = ids.copy()
    changed[70] += 1
    assert len({keys[0], text_key(changed, len(ids)), text_key(ids, len(ids) + 1)}) == 3
    long = np.zeros(KEYED_PIECES + 5)
    assert text_key(long, 10**9) == text_key(long[:KEYED_PIECES], 10**9)


def test_each_source_has_the_targets_of_its_own_text(shards: Path, tmp_path: Path) -> None:
    pieces = [[[piece + 1000 for piece in sentence] for sentence in document] for document in HELD_OUT[:9]]
    other = write_shards(tmp_path / "other", pieces, pieces, tokenizer=tiny_tokenizer(1600))
    alone = [fates(held_out(folder, RECIPES[0]))[0] for folder in (shards, other)]
    settings = DataSettings(SequenceConfig(**RECIPES[0][0]), MaskingConfig(), 0, 8)
    sources = [Source(shards, "one"), Source(other, "two")]
    data = PretrainingData(sources, shards / "tokenizer", settings=settings)
    together = fates(list(data.evaluation_batches(10**6, batch_size=8, rank=0, world_size=1)))[0]
    assert together == alone[0] | alone[1]


def test_the_targets_of_a_batch_lie_kind_by_kind(shards: Path) -> None:
    counts: Counter[str] = Counter()
    for batch in held_out(shards, RECIPES[0]):
        shown, labels = batch.input_ids_T[batch.targets["masked_positions"]], batch.targets["masked_labels"]
        masked, random, kept = (batch.kind_counts[kind] for kind in ("masked", "random", "kept"))
        assert (shown[:masked] == MASK).all()
        assert (shown[masked:] != MASK).all()
        assert (shown[: masked + random] != labels[: masked + random]).all()
        assert (shown[masked + random :] == labels[masked + random :]).all()
        assert masked + random + kept == len(labels) == batch.counts["masked_words"]
        counts.update(batch.kind_counts)
    assert min(counts.values()) > 5


def test_a_training_batch_has_no_kinds_and_gives_the_model_none() -> None:
    plain = collate([masked_text(np.arange(5, 105), key=7)])
    assert plain.kind_counts == {} and "kind_counts" not in plain.model_inputs()
    grouped = grouped_by_kind(plain, mask_id=MASK)
    assert grouped.model_inputs()["kind_counts"] == tuple(grouped.kind_counts.values()) != ()


def test_the_ranks_together_have_the_targets_of_one_and_the_floor_is_of_all(shards: Path) -> None:
    alone = fates(held_out(shards, RECIPES[2]))
    together = [batch for rank in (0, 1) for batch in held_out(shards, RECIPES[2], rank=rank, world_size=2)]
    assert fates(together) == alone
    sequences = SequenceConfig(max_seq_length=64, sentence_pair="none")
    data = PretrainingData(
        [Source(shards, "text")], shards / "tokenizer", settings=DataSettings(sequences, MaskingConfig(), 0, 8)
    )
    floors = [data.unigram_cross_entropy(10**6, batch_size=8, world_size=world_size) for world_size in (1, 2, 3)]
    trained = {piece for document in HELD_OUT[:9] for sentence in document for piece in sentence}
    at_mask = [piece for piece, shown in fates(held_out(shards, RECIPES[0]))[0].items() if shown == MASK]
    wanted = np.mean([np.log((len(trained) + 1605) / (2 if piece in trained else 1)) for piece in at_mask])
    assert floors == pytest.approx([wanted] * 3)


def test_an_id_beyond_the_vocabulary_is_named() -> None:
    with pytest.raises(DataError, match="holds the id 1000, the vocabulary has 1000"):
        masked_text(np.array([7, 1000]), key=7)
