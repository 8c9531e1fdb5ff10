from __future__ import annotations

import pickle
from dataclasses import fields
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.corpus.batches.collate import collate
from bert_ds.corpus.batches.mlm_masking import MaskedExample


def example(ids: list[int], types: list[int], label: int, masked: dict[int, int], key: int) -> MaskedExample:
    return MaskedExample(
        input_ids=np.array(ids, np.int32),
        token_type_ids=np.array(types, np.int8),
        pair_label=label,
        positions=np.array(list(masked), np.int32),
        labels=np.array(list(masked.values()), np.int32),
        key=(0, 1, key),
    )


@pytest.fixture
def batch() -> MicroBatch:
    return collate(
        [
            example([2, 9, 3], [0, 0, 0], IGNORE_INDEX, {1: 7}, 50),
            example([2, 4, 3, 8, 3], [0, 0, 0, 1, 1], 1, {1: 6, 3: 5}, 60),
        ]
    )


def test_sequences_lie_end_to_end_with_the_longest_first(batch: MicroBatch) -> None:
    assert batch.input_ids_T.tolist() == [2, 4, 3, 8, 3, 2, 9, 3]
    assert batch.token_type_ids_T.tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 5, 8]
    assert batch.max_seqlen == 5


def test_positions_count_from_zero_in_every_sequence(batch: MicroBatch) -> None:
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]


def test_masked_positions_point_into_the_packed_tokens(batch: MicroBatch) -> None:
    assert batch.targets["masked_positions"].tolist() == [1, 3, 6]
    assert batch.targets["masked_labels"].tolist() == [6, 5, 7]


def test_labels_and_ids_follow_their_sequence(batch: MicroBatch) -> None:
    assert batch.targets["pair_labels"].tolist() == [1, IGNORE_INDEX]
    assert batch.example_ids.tolist() == [[0, 1, 60], [0, 1, 50]]


def test_counts_are_of_masked_tokens_and_of_labelled_pairs(batch: MicroBatch) -> None:
    assert batch.counts == {"masked_words": 3.0, "sentence_pair": 1.0, "tokens": 8.0}
    assert (batch.num_tokens, batch.num_sequences, batch.padded_tokens) == (8, 2, 10)


def test_dtypes_are_those_the_kernels_take(batch: MicroBatch) -> None:
    assert batch.cu_seqlens.dtype == torch.int32
    wide = (batch.input_ids_T, batch.token_type_ids_T, batch.position_ids_T, *batch.targets.values())
    assert {tensor.dtype for tensor in wide} == {torch.int64}


def test_model_inputs_are_the_keyword_arguments_of_the_model(batch: MicroBatch) -> None:
    assert set(batch.model_inputs()) == {
        "input_ids_T",
        "token_type_ids_T",
        "position_ids_T",
        "cu_seqlens",
        "max_seqlen",
        "targets",
    }
    assert set(batch.targets) == {"masked_positions", "masked_labels", "pair_labels"}


def test_a_batch_moves_to_a_device_whole(batch: MicroBatch) -> None:
    moved = batch.to("meta")
    values = [*vars(moved).values(), *moved.targets.values()]
    found = [value.device.type for value in values if isinstance(value, torch.Tensor)]
    assert found == ["meta"] * 8
    assert moved.counts == batch.counts


def test_a_pickled_batch_is_the_same_batch(batch: MicroBatch) -> None:
    again = pickle.loads(pickle.dumps(batch))
    assert again.cu_seqlens.dtype == torch.int32
    for one in fields(MicroBatch):
        torch.testing.assert_close(getattr(again, one.name), getattr(batch, one.name), rtol=0.0, atol=0.0)


def test_a_batch_from_a_worker_holds_no_file_descriptor(batch: MicroBatch) -> None:
    ForkingPickler.dumps(batch)
    assert not any(tensor.is_shared() for tensor in (batch.input_ids_T, batch.example_ids, *batch.targets.values()))
