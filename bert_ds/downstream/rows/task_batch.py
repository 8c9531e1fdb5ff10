"""Micro-batches of a task without padding: the sequences end to end, as in pre-training, and the targets by name.

N sequences, T tokens of all sequences together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bert_ds.downstream.rows.features import Feature


@dataclass(frozen=True)
class TaskBatch:
    """One micro-batch: the sequences of its features end to end, the longest feature first."""

    input_ids_T: Tensor
    """int64; every sequence starts with [CLS] and ends with [SEP]."""
    token_type_ids_T: Tensor
    """int64, 0 or 1."""
    position_ids_T: Tensor
    """int64; counts from 0 in every sequence."""
    cu_seqlens: Tensor
    """int32 [N + 1]; sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1]."""
    max_seqlen: int
    """Length of the longest sequence."""
    targets: dict[str, Tensor]
    """By name: [T, ...] or [N, ...]; whole numbers are int64, others fp32."""
    places: tuple[int, ...]
    """Index of each part of the batch among the features that were packed."""
    sequences: tuple[int, ...]
    """Sequences of each feature, in the order of `places`: 1 except in multiple choice."""
    loss_counts: tuple[float, ...]
    """Targets per loss term."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, [CLS] and [SEP] included."""
        return self.input_ids_T.shape[0]

    @property
    def padded_tokens(self) -> int:
        """Tokens this micro-batch would hold if every sequence were padded to the longest."""
        return sum(self.sequences) * self.max_seqlen

    def to(self, device: torch.device | str) -> TaskBatch:
        """Copy of the batch on a device."""
        moved: dict[str, Any] = {
            name: tensor.to(device) for name, tensor in vars(self).items() if isinstance(tensor, Tensor)
        }
        return replace(self, **moved, targets={name: tensor.to(device) for name, tensor in self.targets.items()})

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward."""
        names = ("input_ids_T", "token_type_ids_T", "position_ids_T", "cu_seqlens", "max_seqlen", "targets")
        return {name: getattr(self, name) for name in names}


def pack(features: Sequence[Feature], *, loss_counts: tuple[float, ...]) -> TaskBatch:
    """Pack features into one micro-batch, the longest first.

    Args:
        features: at least one; all with the same targets.
        loss_counts: targets of all of them, per loss term.
    """
    assert features, "a micro-batch holds at least one sequence"
    places = sorted(range(len(features)), key=lambda index: -len(features[index].input_ids))
    ordered = [features[place] for place in places]
    lengths = np.array([length for feature in ordered for length in feature.sequence_lengths], dtype=np.int64)
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    return TaskBatch(
        input_ids_T=_join([feature.input_ids for feature in ordered]),
        token_type_ids_T=_join([feature.token_type_ids for feature in ordered]),
        position_ids_T=torch.from_numpy(np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        targets={name: _join([feature.targets[name] for feature in ordered]) for name in ordered[0].targets},
        places=tuple(places),
        sequences=tuple(len(feature.sequence_lengths) for feature in ordered),
        loss_counts=loss_counts,
    )


def _join(arrays: Sequence[np.ndarray]) -> Tensor:
    joined = np.concatenate(arrays)
    return torch.from_numpy(joined.astype(np.float32 if joined.dtype.kind == "f" else np.int64))
