"""LAMB and LANS on a flat shard that holds pieces of many tensors (`flat_shard`).

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

import torch
from torch import Tensor

from bert_kernels.flat_shard import FlatShard, LambScalars, Piece, Segment, check_shard, on_device
from bert_kernels.lamb_kernels import hyper_of_step, lamb_apply_triton, lamb_moments_triton


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
        sums_RC.index_add_(0, on_device(tuple(rows), torch.int64, sums_RC.device), added)


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
