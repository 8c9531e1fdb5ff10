"""What a model is given at a time: sequences end to end without padding, and their targets.

N sequences, T tokens of all sequences together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Fillings(NamedTuple):
    """What lies at the end of a micro-batch to make its shape one of few; no loss sees it, and no count has it."""

    tokens: int = 0
    sequences: int = 0
    words: int = 0
    """To predict, as it were: their label is IGNORE_INDEX."""


NO_FILLINGS = Fillings()


class BranchDraws(NamedTuple):
    """What decides which blocks of layers add nothing to a sequence, however the examples are dealt to ranks."""

    seed: Tensor
    """int64 [1], of the step."""
    example_ids_N3: Tensor
    """See `MicroBatch.example_ids`."""


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch, of pre-training or of a task: its sequences end to end, the longest first."""

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
    """By name; whole numbers are int64, others fp32."""
    counts: dict[str, float]
    """How many targets there are, by the name that a `LossTerm` knows them by. Counted when packed, so that reading it
    never waits for a device."""
    kind_counts: dict[str, int] = field(default_factory=dict)
    """In an evaluation: how many words to predict, from the first on, are of each kind."""
    example_ids: Tensor | None = None
    """Of pre-training, int64 [N, 3]: (source, epoch, example)."""
    places: tuple[int, ...] = ()
    """Of a task: index of each part of the batch among the features that were packed."""
    sequences: tuple[int, ...] = ()
    """Of a task: sequences of each feature, in the order of `places`."""
    fillings: Fillings = NO_FILLINGS
    """Of pre-training: what the tensors hold beside this micro-batch, at their ends."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, [CLS] and [SEP] included."""
        return self.input_ids_T.shape[0] - self.fillings.tokens

    @property
    def num_sequences(self) -> int:
        """Sequences in the micro-batch."""
        return self.cu_seqlens.shape[0] - 1 - self.fillings.sequences

    @property
    def padded_tokens(self) -> int:
        """Tokens this micro-batch would hold if every sequence were padded to the longest."""
        return self.num_sequences * self.max_seqlen

    def to(self, device: torch.device | str) -> MicroBatch:
        """Copy of the batch on a device, which for a card goes through pinned memory and is not waited for."""
        if torch.device(device).type != "cuda":
            return self._map(lambda tensor: tensor.to(device))
        return self._map(
            lambda tensor: (tensor if tensor.is_cuda else tensor.pin_memory()).to(device, non_blocking=True)
        )

    def pin_memory(self) -> MicroBatch:
        """Copy of the batch in page-locked memory; torch's DataLoader calls this where there is a GPU."""
        return self._map(lambda tensor: tensor.pin_memory())

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward, without the dropout seed."""
        names = ("input_ids_T", "token_type_ids_T", "position_ids_T", "cu_seqlens", "max_seqlen", "targets")
        inputs = {name: getattr(self, name) for name in names}
        if self.kind_counts:
            inputs["kind_counts"] = tuple(self.kind_counts.values())
        return inputs | {"fillings": self.fillings} if any(self.fillings) else inputs

    def _map(self, function: Callable[[Tensor], Tensor]) -> MicroBatch:
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        moved: dict[str, Any] = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved, targets={name: function(target) for name, target in self.targets.items()})

    def __reduce__(self) -> tuple[Callable[..., MicroBatch], tuple]:
        """Pickle as arrays: torch would send each tensor as a file descriptor, and a step of many micro-batches that
        waits in the loader's queue would reach the limit of open files."""
        values = (getattr(self, one.name) for one in fields(self))
        return _unpickle, tuple(_converted(value, Tensor, Tensor.numpy) for value in values)


def _unpickle(*values: Any) -> MicroBatch:
    return MicroBatch(*(_converted(value, np.ndarray, torch.from_numpy) for value in values))


def _converted(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {name: _converted(one, kind, function) for name, one in value.items()}
    return function(value) if isinstance(value, kind) else value
