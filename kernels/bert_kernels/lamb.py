"""LAMB and LANS on a flat shard that holds pieces of many tensors.

An optimizer shard is one flat fp32 buffer; a segment table says which stretch of it belongs to which tensor (its row)
and with which weight decay. Elements outside every segment are padding: they are never read and never written, because
DeepSpeed leaves uninitialised memory there.

One step is two passes with one all-reduce between them, so that a tensor that is spread over ranks gets one ratio:

    pass 1  m = b1 m + b3 g;  v = b2 v + (1 - b2) g^2;  u = (m / c1) / (sqrt(v / c2) + eps) + decay w
            sums[row] += (|w|^2, |u|^2)
    reduce  sums over the ranks, ratio = |w| / |u| per row
    pass 2  w -= lr ratio[row] u

The update u is computed again in pass 2 from (m, v, w): the traffic equals that of storing and reloading it, no scratch
buffer is needed, and the gradient stays as it was.

LANS (arXiv 2006.13484) first divides each tensor's gradient by its norm, which costs one more reduction, and has two
directions with a norm each: the momentum's and the gradient's.

Letters: E elements of a shard, R rows (tensors) of the reduction. Dtypes: fp32 buffers, fp64 sums. CPU passes run over
pieces that stay in cache; a CPU norm in fp32 would lose 1e-3 on an embedding, so squares are summed in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bert_kernels.lamb_kernels import hyper_of_step, lamb_apply_triton, lamb_moments_triton

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


def squared_norm(x_E: Tensor) -> Tensor:
    """Return the sum of squares of a fp32 vector as a fp64 scalar tensor, accumulated in fp64."""
    x_E = x_E.double()
    return torch.dot(x_E, x_E)


def lamb_moments(shard: FlatShard, scalars: LambScalars, *, sums_R2: Tensor, kernels: str = "auto") -> None:
    """Pass 1 of LAMB: update the moments in place and add |w|^2 and |u|^2 of every segment to its row of sums_R2.

    Args:
        shard: weights and gradient are read, moments are updated.
        scalars: constants of the step.
        sums_R2: fp64 [R, 2], added to.
        kernels: "auto" for Triton on CUDA and torch elsewhere, "triton", "torch".

    Raises:
        ValueError: a buffer has the wrong shape, dtype or device.
    """
    check_shard(shard)
    if _by_triton(shard, kernels):
        hyper = hyper_of_step(scalars, 0.0, device=shard.param_E.device)
        lamb_moments_triton(shard, hyper, sums_R2=sums_R2, decay_in_update=scalars.decay_in_update)
    else:
        lamb_moments_reference(shard, scalars, sums_R2=sums_R2)


def lamb_apply(shard: FlatShard, scalars: LambScalars, *, ratios_R: Tensor, lr: float, kernels: str = "auto") -> None:
    """Pass 2 of LAMB: w -= lr ratio[row] u, in place.

    Args:
        shard: as pass 1 left it; the weights are updated.
        scalars: constants of the step, as in pass 1.
        ratios_R: fp32 [R], trust ratio of every row.
        lr: learning rate.
        kernels: as in pass 1.
    """
    if _by_triton(shard, kernels):
        hyper = hyper_of_step(scalars, lr, device=shard.param_E.device)
        lamb_apply_triton(shard, hyper, ratios_R=ratios_R, decay_in_update=scalars.decay_in_update)
    else:
        lamb_apply_reference(shard, scalars, ratios_R=ratios_R, lr=lr)


def _by_triton(shard: FlatShard, kernels: str) -> bool:
    if kernels not in ("auto", "triton", "torch"):
        raise ValueError(f'kernels is "{kernels}", wanted "auto", "triton" or "torch"')
    return kernels == "triton" or (kernels == "auto" and shard.param_E.is_cuda)


def lamb_moments_reference(shard: FlatShard, scalars: LambScalars, *, sums_R2: Tensor) -> None:
    """`lamb_moments` in plain torch, on any device."""
    rows, squares = [], []
    for segment, piece in shard.pieces():
        grad = piece.grad
        if segment.decay and not scalars.decay_in_update:
            grad = grad.add(piece.param, alpha=segment.decay)
        update_moments(piece, grad, scalars)
        rows.append(segment.row)
        squares += [squared_norm(piece.param), squared_norm(_lamb_update(piece, segment, scalars))]
    add_rows(sums_R2, rows, squares)


def lamb_apply_reference(shard: FlatShard, scalars: LambScalars, *, ratios_R: Tensor, lr: float) -> None:
    """`lamb_apply` in plain torch, on any device."""
    for segment, piece in shard.pieces():
        update = _lamb_update(piece, segment, scalars)
        piece.param.sub_(update.mul_(ratios_R[segment.row]), alpha=lr)


def add_rows(sums_RC: Tensor, rows: list[int], values: list[Tensor]) -> None:
    """Add C scalar tensors per entry of `rows` to that row of sums_RC."""
    if rows:
        added = torch.stack(values).view(len(rows), sums_RC.shape[1])
        sums_RC.index_add_(0, torch.tensor(rows, device=sums_RC.device), added)


def update_moments(piece: Piece, grad: Tensor, scalars: LambScalars) -> None:
    """m = b1 m + b3 g; v = b2 v + (1 - b2) g^2, in place."""
    piece.exp_avg.mul_(scalars.beta1).add_(grad, alpha=scalars.beta3)
    piece.exp_avg_sq.mul_(scalars.beta2).addcmul_(grad, grad, value=1 - scalars.beta2)


def adam_denominator(piece: Piece, scalars: LambScalars) -> Tensor:
    """sqrt(v / c2) + eps."""
    return piece.exp_avg_sq.div(scalars.correction2).sqrt_().add_(scalars.eps)


def _lamb_update(piece: Piece, segment: Segment, scalars: LambScalars) -> Tensor:
    update = piece.exp_avg.div(scalars.correction1).div_(adam_denominator(piece, scalars))
    if segment.decay and scalars.decay_in_update:
        update.add_(piece.param, alpha=segment.decay)
    return update


def gradient_squares(shard: FlatShard, *, sums_R1: Tensor) -> None:
    """Pass 0 of LANS: add |g|^2 of every segment to its row of sums_R1 (fp64 [R, 1])."""
    check_shard(shard)
    pieces = list(shard.pieces())
    add_rows(sums_R1, [segment.row for segment, _ in pieces], [squared_norm(piece.grad) for _, piece in pieces])


def lans_moments(shard: FlatShard, scalars: LambScalars, *, grad_scales_R: Tensor, sums_R3: Tensor) -> None:
    """Pass 1 of LANS: moments of g s[row], then |w|^2, |a|^2 and |b|^2 of every segment into sums_R3 (fp64 [R, 3]).

    a = (m / c1) / d + decay w and b = g s[row] / d + decay w, with d = sqrt(v / c2) + eps; s is grad_scales_R, fp32.
    """
    rows, squares = [], []
    for segment, piece in shard.pieces():
        grad = piece.grad * grad_scales_R[segment.row]
        update_moments(piece, grad, scalars)
        rows.append(segment.row)
        squares += [squared_norm(x) for x in (piece.param, *_lans_directions(piece, grad, segment, scalars))]
    add_rows(sums_R3, rows, squares)


def lans_apply(shard: FlatShard, scalars: LambScalars, *, grad_scales_R: Tensor, sizes_R2: Tensor) -> None:
    """Pass 2 of LANS: w -= sizes[row, 0] a + sizes[row, 1] b, in place; sizes_R2 (fp32) holds lr, beta and ratio."""
    for segment, piece in shard.pieces():
        grad = piece.grad * grad_scales_R[segment.row]
        by_momentum, by_gradient = _lans_directions(piece, grad, segment, scalars)
        sizes = sizes_R2[segment.row]
        piece.param.sub_(by_momentum.mul_(sizes[0]).add_(by_gradient.mul_(sizes[1])))


def _lans_directions(piece: Piece, grad: Tensor, segment: Segment, scalars: LambScalars) -> tuple[Tensor, Tensor]:
    denominator = adam_denominator(piece, scalars)
    by_momentum = piece.exp_avg.div(scalars.correction1).div_(denominator)
    by_gradient = grad.div(denominator)
    if segment.decay:
        by_momentum.add_(piece.param, alpha=segment.decay)
        by_gradient.add_(piece.param, alpha=segment.decay)
    return by_momentum, by_gradient
