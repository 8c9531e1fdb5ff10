"""Micro-batches of a task without padding: the sequences end to end, as in pre-training, and the targets by name.

Targets are [T, ...] or [N, ...]; N sequences, T tokens of all sequences together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.downstream.rows.features import Feature


def pack(features: Sequence[Feature], *, counts: dict[str, float]) -> MicroBatch:
    """Pack features into one micro-batch, the longest first.

    Args:
        features: at least one; all with the same targets.
        counts: targets of all of them, see `MicroBatch.counts`.
    """
    assert features, "a micro-batch holds at least one sequence"
    places = sorted(range(len(features)), key=lambda index: -len(features[index].input_ids))
    ordered = [features[place] for place in places]
    lengths = np.array([length for feature in ordered for length in feature.sequence_lengths], dtype=np.int64)
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    return MicroBatch(
        input_ids_T=_join([feature.input_ids for feature in ordered]),
        token_type_ids_T=_join([feature.token_type_ids for feature in ordered]),
        position_ids_T=torch.from_numpy(np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        targets={name: _join([feature.targets[name] for feature in ordered]) for name in ordered[0].targets},
        counts=counts,
        places=tuple(places),
        sequences=tuple(len(feature.sequence_lengths) for feature in ordered),
    )


def scores_of_features(batch: MicroBatch, scores: dict[str, Tensor]) -> list[dict[str, np.ndarray]]:
    """Cut the scores of a batch, [N, ...] or [T, ...], into those of its features, in the batch's own order."""
    bounds = list(accumulate(batch.sequences, initial=0))
    token_bounds = batch.cu_seqlens[bounds].tolist()
    arrays = {
        name: tensor.float().cpu().numpy() for name, tensor in scores.items()
    }  # host sync: scores are wanted here
    return [
        {name: array[slice(*(token if name.startswith("token_") else rows))] for name, array in arrays.items()}
        for rows, token in zip(pairwise(bounds), pairwise(token_bounds), strict=True)
    ]


def _join(arrays: Sequence[np.ndarray]) -> Tensor:
    joined = np.concatenate(arrays)
    return torch.from_numpy(joined.astype(np.float32 if joined.dtype.kind == "f" else np.int64))
