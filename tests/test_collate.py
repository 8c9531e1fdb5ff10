from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.corpus.batches.collate import PackedBatch, collate
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
def batch() -> PackedBatch:
    return collate(
        [
            example([2, 9, 3], [0, 0, 0], IGNORE_INDEX, {1: 7}, 50),
            example([2, 4, 3, 8, 3], [0, 0, 0, 1, 1], 1, {1: 6, 3: 5}, 60),
        ]
    )


def test_sequences_lie_end_to_end_with_the_longest_first(batch: PackedBatch) -> None:
    assert batch.input_ids_T.tolist() == [2, 4, 3, 8, 3, 2, 9, 3]
    assert batch.token_type_ids_T.tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 5, 8]
    assert batch.max_seqlen == 5


def test_positions_count_from_zero_in_every_sequence(batch: PackedBatch) -> None:
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]


def test_masked_positions_point_into_the_packed_tokens(batch: PackedBatch) -> None:
    assert batch.masked_positions_P.tolist() == [1, 3, 6]
    assert batch.masked_labels_P.tolist() == [6, 5, 7]


def test_labels_and_ids_follow_their_sequence(batch: PackedBatch) -> None:
    assert batch.pair_labels_N.tolist() == [1, IGNORE_INDEX]
    assert batch.example_ids.tolist() == [[0, 1, 60], [0, 1, 50]]


def test_counts_are_of_masked_tokens_and_of_labelled_pairs(batch: PackedBatch) -> None:
    assert batch.loss_counts == (3.0, 1.0)
    assert (batch.num_tokens, batch.num_sequences, batch.padded_tokens) == (8, 2, 10)


def test_dtypes_are_those_the_kernels_take(batch: PackedBatch) -> None:
    assert batch.cu_seqlens.dtype == torch.int32
    wide = (batch.input_ids_T, batch.token_type_ids_T, batch.position_ids_T, batch.masked_positions_P)
    assert {tensor.dtype for tensor in (*wide, batch.masked_labels_P, batch.pair_labels_N)} == {torch.int64}


def test_model_inputs_are_the_keyword_arguments_of_the_model(batch: PackedBatch) -> None:
    assert set(batch.model_inputs()) == {
        "input_ids_T",
        "token_type_ids_T",
        "position_ids_T",
        "cu_seqlens",
        "max_seqlen",
        "masked_positions_P",
        "masked_labels_P",
        "pair_labels_N",
    }


def test_a_batch_moves_to_a_device_whole(batch: PackedBatch) -> None:
    moved = batch.to("meta")
    assert {value.device.type for value in moved.model_inputs().values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert moved.loss_counts == (3.0, 1.0)


def test_a_pickled_batch_is_the_same_batch(batch: PackedBatch) -> None:
    again = pickle.loads(pickle.dumps(batch))
    assert again.input_ids_T.tolist() == batch.input_ids_T.tolist()
    assert again.cu_seqlens.dtype == torch.int32
    assert again.loss_counts == (3.0, 1.0)


def test_a_batch_from_a_worker_holds_no_file_descriptor(batch: PackedBatch) -> None:
    ForkingPickler.dumps(batch)
    assert not batch.input_ids_T.is_shared()
