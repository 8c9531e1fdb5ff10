"""A flat optimizer shard that holds pieces of many tensors, and what lies where in it.

An optimizer shard is one flat fp32 buffer; a segment table says which stretch of it belongs to which tensor (its row)
and with which weight decay. Elements outside every segment are padding: they are never read and never written, because
DeepSpeed leaves uninitialised memory there.

Letters: E elements of a shard, R rows (tensors) of the reductions over it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CPU_PIECE = 1 << 18
"""Elements handled together on the CPU: small enough for the cache, large enough to hide the call overhead."""


class Segment(NamedTuple):
    """A stretch of one tensor inside a flat shard."""

    begin: int
    """First element in the shard."""
    length: int
    """Number of elements."""
    row: int
    """Row of the tensor in the reduction buffers."""
    decay: float
    """Weight decay of the tensor."""


@dataclass(frozen=True)
class SegmentTable:
    """Where tensors lie in a flat shard of `num_elements` elements."""

    segments: tuple[Segment, ...]
    """Ascending and disjoint; a row may be absent (the tensor lies on other ranks)."""
    num_elements: int
    """Length of the shard, padding included."""
    num_rows: int
    """Rows of the reduction buffers, the same on all ranks."""

    def __post_init__(self) -> None:
        end = 0
        for segment in self.segments:
            assert segment.begin >= end and segment.length > 0 and 0 <= segment.row < self.num_rows, segment
            end = segment.begin + segment.length
        assert end <= self.num_elements < 2**31, (end, self.num_elements)


class LambScalars(NamedTuple):
    """Constants of one step of one shard."""

    beta1: float
    """b1: decay of the first moment."""
    beta2: float
    """b2: decay of the second moment."""
    beta3: float
    """b3: weight of the gradient in the first moment, 1 - b1 or 1."""
    eps: float
    """Added to the root of the second moment."""
    correction1: float
    """c1 = 1 - b1^t, or 1 without bias correction."""
    correction2: float
    """c2 = 1 - b2^t, or 1 without bias correction."""
    decay_in_update: bool
    """Decay is part of u (True) or of the gradient (False)."""


class Piece(NamedTuple):
    """A stretch of one tensor: views of the four buffers, fp32 [E] each."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class FlatShard(NamedTuple):
    """The flat buffers of one optimizer shard, fp32 [E] each, and what lies where in them."""

    param_E: Tensor
    """Weights."""
    grad_E: Tensor
    """Gradient; never written."""
    exp_avg_E: Tensor
    """First moment."""
    exp_avg_sq_E: Tensor
    """Second moment."""
    table: SegmentTable

    def cut(self, segment: Segment) -> Piece:
        """Return the views of one segment."""
        stretch = slice(segment.begin, segment.begin + segment.length)
        return Piece(self.param_E[stretch], self.grad_E[stretch], self.exp_avg_E[stretch], self.exp_avg_sq_E[stretch])

    def pieces(self) -> Iterator[tuple[Segment, Piece]]:
        """Yield every segment cut into pieces that are worked on together."""
        for segment in self.table.segments:
            end = segment.begin + segment.length
            size = CPU_PIECE if self.param_E.device.type == "cpu" else segment.length
            for begin in range(segment.begin, end, size):
                stretch = slice(begin, min(begin + size, end))
                yield segment, Piece(*(buffer[stretch] for buffer in self[:4]))


@functools.lru_cache(maxsize=256)
def on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a vector on a device, for reading only: equal ones are the same tensor.

    A card gets them from page-locked memory, so that the host does not wait for it.
    """
    vector = torch.tensor(numbers, dtype=dtype)
    return vector.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else vector.to(device)


def check_shard(shard: FlatShard) -> None:
    """Raise ValueError unless all buffers are flat, fp32, contiguous, on one device and as long as the table says."""
    wanted, device = shard.table.num_elements, shard.param_E.device
    for name, x in zip(("param", "grad", "exp_avg", "exp_avg_sq"), shard[:4], strict=True):
        if x.dim() != 1 or x.numel() != wanted:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, the segment table is for ({wanted},)")
        if x.dtype != torch.float32 or not x.is_contiguous() or x.device != device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, contiguous {x.is_contiguous()}; wanted contiguous fp32 on {device}"
            )
