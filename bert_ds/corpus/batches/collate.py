"""Micro-batches without padding: all sequences of a micro-batch end to end, with their boundaries.

N sequences, T tokens of all sequences together, P masked positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.corpus.batches.mlm_masking import MaskedExample

KINDS_OF_TARGETS = ("masked", "random", "kept")


def collate(examples: Sequence[MaskedExample]) -> MicroBatch:
    """Pack examples into one micro-batch, the longest first.

    The order lets an attention that pads inside itself cut off work as sequences end; it changes no result.

    Args:
        examples: at least one masked example.

    Returns:
        The batch on the CPU, with the targets

            masked_positions: int64 [P], indices into T, ascending; in an evaluation ascending within each kind.
            masked_labels: int64 [P], the pieces to predict there.
            pair_labels: int64 [N]: 0, 1, 2 of three kinds, or IGNORE_INDEX where there is no pair objective.

        and the counts of masked words, of labelled pairs ("sentence_pair") and of tokens.
    """
    assert examples, "a micro-batch holds at least one example"
    ordered = sorted(examples, key=lambda example: -len(example.input_ids))
    lengths = np.array([len(example.input_ids) for example in ordered], dtype=np.int64)
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    num_masked = np.array([len(example.positions) for example in ordered], dtype=np.int64)
    pair_labels = np.array([example.pair_label for example in ordered], dtype=np.int64)
    position_ids = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    masked_positions = _join([example.positions for example in ordered]) + np.repeat(cu_seqlens[:-1], num_masked)
    return MicroBatch(
        input_ids_T=torch.from_numpy(_join([example.input_ids for example in ordered])),
        token_type_ids_T=torch.from_numpy(_join([example.token_type_ids for example in ordered])),
        position_ids_T=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(lengths[0]),
        targets={
            "masked_positions": torch.from_numpy(masked_positions),
            "masked_labels": torch.from_numpy(_join([example.labels for example in ordered])),
            "pair_labels": torch.from_numpy(pair_labels),
        },
        counts={
            "masked_words": float(num_masked.sum()),
            "sentence_pair": float((pair_labels != IGNORE_INDEX).sum()),
            "tokens": float(cu_seqlens[-1]),
        },
        example_ids=torch.from_numpy(np.array([example.key for example in ordered], dtype=np.int64)),
    )


def grouped_by_kind(batch: MicroBatch, *, mask_id: int) -> MicroBatch:
    """Return the batch with its masked words grouped by what the model sees there, and `kind_counts`.

    That is [MASK] ("masked"), another piece ("random"), or the piece itself ("kept").
    """
    positions_P, labels_P = batch.targets["masked_positions"], batch.targets["masked_labels"]
    shown_P = batch.input_ids_T[positions_P]
    kinds_P = torch.where(shown_P == mask_id, 0, 1 + (shown_P == labels_P).long())
    order_P = kinds_P.argsort(stable=True)
    grouped = {"masked_positions": positions_P[order_P], "masked_labels": labels_P[order_P]}
    counts = dict(zip(KINDS_OF_TARGETS, kinds_P.bincount(minlength=3).tolist(), strict=True))
    return replace(batch, targets={**batch.targets, **grouped}, kind_counts=counts)


def _join(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays).astype(np.int64)
