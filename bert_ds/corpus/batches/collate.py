"""Micro-batches without padding: all sequences of a micro-batch end to end, with their boundaries.

N sequences, T tokens of all sequences together, P masked positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.corpus.batches.mlm_masking import MaskedExample


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: sequences end to end, the longest first, and the targets of both objectives."""

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
    masked_positions_P: Tensor
    """int64, indices into T, ascending; in an evaluation ascending within each kind."""
    masked_labels_P: Tensor
    """int64 pieces to predict there."""
    pair_labels_N: Tensor
    """int64: 0, 1, or IGNORE_INDEX where there is no pair objective."""
    example_ids: Tensor
    """int64 [N, 3]: (source, epoch, example)."""
    loss_counts: tuple[float, ...]
    """Targets per loss term: masked tokens, labelled pairs. Counted when packed, so that reading it never waits for
    a device."""
    kind_counts: tuple[int, ...] = ()
    """In an evaluation: how many targets, from the first on, show [MASK], then another piece, then the piece itself."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, [CLS] and [SEP] included."""
        return self.input_ids_T.shape[0]

    @property
    def num_sequences(self) -> int:
        """Sequences in the micro-batch."""
        return self.pair_labels_N.shape[0]

    @property
    def padded_tokens(self) -> int:
        """Tokens this micro-batch would hold if every sequence were padded to the longest."""
        return self.num_sequences * self.max_seqlen

    def to(self, device: torch.device | str) -> PackedBatch:
        """Copy of the batch on a device; asynchronous from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """Copy of the batch in page-locked memory; torch's DataLoader calls this where there is a GPU."""
        return self._map(lambda tensor: tensor.pin_memory())

    def model_inputs(self) -> dict[str, Tensor | int]:
        """Keyword arguments of the model's forward."""
        left_out = ("example_ids", "loss_counts", *(() if self.kind_counts else ("kind_counts",)))
        names = (field.name for field in fields(self) if field.name not in left_out)
        return {name: getattr(self, name) for name in names}

    def _map(self, function: Callable[[Tensor], Tensor]) -> PackedBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def __reduce__(self) -> tuple[Callable[..., PackedBatch], tuple]:
        """Pickle as arrays: torch would send each tensor as a file descriptor, and a step of many micro-batches that
        waits in the loader's queue would reach the limit of open files."""
        values = (getattr(self, field.name) for field in fields(self))
        return _unpickle, tuple(value.numpy() if isinstance(value, Tensor) else value for value in values)


def collate(examples: Sequence[MaskedExample]) -> PackedBatch:
    """Pack examples into one micro-batch, the longest first.

    The order lets an attention that pads inside itself cut off work as sequences end; it changes no result.

    Args:
        examples: at least one masked example.

    Returns:
        The batch on the CPU.
    """
    assert examples, "a micro-batch holds at least one example"
    ordered = sorted(examples, key=lambda example: -len(example.input_ids))
    lengths = np.array([len(example.input_ids) for example in ordered], dtype=np.int64)
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    num_masked = np.array([len(example.positions) for example in ordered], dtype=np.int64)
    pair_labels = np.array([example.pair_label for example in ordered], dtype=np.int64)
    position_ids = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    masked_positions = _join([example.positions for example in ordered]) + np.repeat(cu_seqlens[:-1], num_masked)
    return PackedBatch(
        input_ids_T=torch.from_numpy(_join([example.input_ids for example in ordered])),
        token_type_ids_T=torch.from_numpy(_join([example.token_type_ids for example in ordered])),
        position_ids_T=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(lengths[0]),
        masked_positions_P=torch.from_numpy(masked_positions),
        masked_labels_P=torch.from_numpy(_join([example.labels for example in ordered])),
        pair_labels_N=torch.from_numpy(pair_labels),
        example_ids=torch.from_numpy(np.array([example.key for example in ordered], dtype=np.int64)),
        loss_counts=(float(num_masked.sum()), float((pair_labels != IGNORE_INDEX).sum())),
    )


def grouped_by_kind(batch: PackedBatch, *, mask_id: int) -> PackedBatch:
    """Return the batch with its targets grouped by what the model sees there, and `kind_counts`."""
    shown_P = batch.input_ids_T[batch.masked_positions_P]
    is_kept_P = shown_P == batch.masked_labels_P
    kinds_P = torch.where(shown_P == mask_id, 0, 1 + is_kept_P.long())
    order_P = kinds_P.argsort(stable=True)
    return replace(
        batch,
        masked_positions_P=batch.masked_positions_P[order_P],
        masked_labels_P=batch.masked_labels_P[order_P],
        kind_counts=tuple(kinds_P.bincount(minlength=3).tolist()),
    )


def with_teacher_counts(batch: PackedBatch, *, hidden: bool) -> PackedBatch:
    """Return the batch with the counts of a student's two further loss terms.

    Args:
        batch: with the counts of masked tokens and pairs.
        hidden: whether hidden states are compared, at all tokens; soft targets are at the masked ones.
    """
    return replace(batch, loss_counts=(*batch.loss_counts, batch.loss_counts[0], batch.num_tokens * float(hidden)))


def _join(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays).astype(np.int64)


def _unpickle(*values: np.ndarray | int | tuple[float, ...]) -> PackedBatch:
    return PackedBatch(*(torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in values))  # type: ignore[arg-type]
