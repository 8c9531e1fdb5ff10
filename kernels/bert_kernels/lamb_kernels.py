"""The Triton kernels of LAMB over one flat shard; the formulas are in `lamb`.

A shard is cut into chunks at the multiples of the block size, so that every chunk but a segment's first and last is
read in 16-byte vectors wherever its segment begins. Pass 1 takes a program per chunk, updates the moments and leaves
the chunk's |w|^2 and |u|^2, which a small launch adds up per row in a fixed order, in fp64; pass 2 computes u again.
Both passes take all tensors in one launch and together move 42 bytes per element with 16-bit gradients and copy.

The hyper-parameters are a vector of fp32 numbers on the device, the last of them a flag by which the whole step is
skipped. So a step waits for nothing that the host would have to read, and a CUDA graph may hold it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_kernels._launch import check_device, launch
from bert_kernels._numerics import as_operand, cpu_bf16
from bert_kernels._tiles import LAMB, LAMB_ROWS
from bert_kernels.flat_shard import FlatShard, LambScalars, SegmentTable, on_device

HYPER = ("beta1", "beta2", "beta3", "one_minus_beta2", "eps", "correction1", "correction2", "lr", "skip")
"""What the vector of hyper-parameters holds, in this order."""
# Partial sums of a row begin at a multiple of this, for 16-byte loads.
_SLOTS = 16


@triton.jit
def _direction(param, exp_avg, exp_avg_sq, decay, hyper_ptr, DECAY_IN_UPDATE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return u = (m / c1) / (sqrt(v / c2) + eps), plus decay w where that belongs here."""
    denominator = tl.sqrt(exp_avg_sq / tl.load(hyper_ptr + 6)) + tl.load(hyper_ptr + 4)
    update = (exp_avg / tl.load(hyper_ptr + 5)) / denominator
    if DECAY_IN_UPDATE:
        update += decay * param
    return update


@triton.jit
def _moments_of_chunk(  # type: ignore[no-untyped-def]
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, hyper_ptr, offs, mask, decay,
    DECAY_IN_UPDATE: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Update the moments of a chunk and return its |w|^2 and |u|^2; mask counts where HAS_MASK."""
    where = mask if HAS_MASK else None
    other = 0.0 if HAS_MASK else None
    param = tl.load(param_ptr + offs, mask=where, other=other)
    grad = tl.load(grad_ptr + offs, mask=where, other=other).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr + offs, mask=where, other=other)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=where, other=other)
    if not DECAY_IN_UPDATE:
        grad += decay * param
    exp_avg = tl.load(hyper_ptr) * exp_avg + tl.load(hyper_ptr + 2) * grad
    exp_avg_sq = tl.load(hyper_ptr + 1) * exp_avg_sq + tl.load(hyper_ptr + 3) * grad * grad
    tl.store(exp_avg_ptr + offs, exp_avg, mask=where)
    tl.store(exp_avg_sq_ptr + offs, exp_avg_sq, mask=where)
    update = _direction(param, exp_avg, exp_avg_sq, decay, hyper_ptr, DECAY_IN_UPDATE)
    if HAS_MASK:
        # With eps 0 an element that is not there would be 0 / 0.
        update = tl.where(mask, update, 0.0)
    return tl.sum(param * param), tl.sum(update * update)


@triton.jit
def _lamb_moments_kernel(  # type: ignore[no-untyped-def]
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, chunks_ptr, decays_ptr, hyper_ptr, partials_ptr, num_slots,
    BLOCK: tl.constexpr, DECAY_IN_UPDATE: tl.constexpr,
):  # fmt: skip
    if tl.load(hyper_ptr + 8) == 0.0:
        chunk = tl.program_id(0)
        number = tl.load(chunks_ptr + chunk * 5)
        first = tl.load(chunks_ptr + chunk * 5 + 1)
        last = tl.load(chunks_ptr + chunk * 5 + 2)
        slot = tl.load(chunks_ptr + chunk * 5 + 4)
        decay = tl.load(decays_ptr + chunk)
        inside = tl.arange(0, BLOCK)
        offs = number.to(tl.int64) * BLOCK + inside
        mask = (inside >= first) & (inside < last)
        if last - first == BLOCK:
            param_square, update_square = _moments_of_chunk(
                param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, hyper_ptr, offs, mask, decay, DECAY_IN_UPDATE, False
            )
        else:
            param_square, update_square = _moments_of_chunk(
                param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, hyper_ptr, offs, mask, decay, DECAY_IN_UPDATE, True
            )
        tl.store(partials_ptr + slot, param_square)
        tl.store(partials_ptr + num_slots + slot, update_square)


@triton.jit
def _lamb_rows_kernel(partials_ptr, row_slots_ptr, sums_ptr, num_slots, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add a row's partial sums to its two fp64 sums."""
    row = tl.program_id(0)
    first = tl.multiple_of(tl.load(row_slots_ptr + row), 16)
    last = tl.multiple_of(tl.load(row_slots_ptr + row + 1), 16)
    param_squares = tl.zeros([BLOCK], tl.float64)
    update_squares = tl.zeros([BLOCK], tl.float64)
    for slot in range(first, last, BLOCK):
        slots = tl.multiple_of(slot, 16) + tl.arange(0, BLOCK)
        param_squares += tl.load(partials_ptr + slots, mask=slots < last, other=0.0).to(tl.float64)
        update_squares += tl.load(partials_ptr + num_slots + slots, mask=slots < last, other=0.0).to(tl.float64)
    sums_ptr += row.to(tl.int64) * 2
    tl.store(sums_ptr, tl.load(sums_ptr) + tl.sum(param_squares))
    tl.store(sums_ptr + 1, tl.load(sums_ptr + 1) + tl.sum(update_squares))


@triton.jit
def _apply_to_chunk(  # type: ignore[no-untyped-def]
    param_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr, hyper_ptr, offs, mask, decay, size,
    DECAY_IN_UPDATE: tl.constexpr, HAS_COPY: tl.constexpr, CPU_BF16: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    where = mask if HAS_MASK else None
    other = 0.0 if HAS_MASK else None
    param = tl.load(param_ptr + offs, mask=where, other=other)
    exp_avg = tl.load(exp_avg_ptr + offs, mask=where, other=other)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=where, other=other)
    param -= size * _direction(param, exp_avg, exp_avg_sq, decay, hyper_ptr, DECAY_IN_UPDATE)
    tl.store(param_ptr + offs, param, mask=where)
    if HAS_COPY:
        tl.store(copy_ptr + offs, as_operand(param, copy_ptr.dtype.element_ty, CPU_BF16), mask=where)


@triton.jit
def _lamb_apply_kernel(  # type: ignore[no-untyped-def]
    param_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr, chunks_ptr, decays_ptr, hyper_ptr, ratios_ptr,
    BLOCK: tl.constexpr, DECAY_IN_UPDATE: tl.constexpr, HAS_COPY: tl.constexpr, CPU_BF16: tl.constexpr,
):  # fmt: skip
    if tl.load(hyper_ptr + 8) == 0.0:
        chunk = tl.program_id(0)
        number = tl.load(chunks_ptr + chunk * 5)
        first = tl.load(chunks_ptr + chunk * 5 + 1)
        last = tl.load(chunks_ptr + chunk * 5 + 2)
        size = tl.load(hyper_ptr + 7) * tl.load(ratios_ptr + tl.load(chunks_ptr + chunk * 5 + 3))
        decay = tl.load(decays_ptr + chunk)
        inside = tl.arange(0, BLOCK)
        offs = number.to(tl.int64) * BLOCK + inside
        mask = (inside >= first) & (inside < last)
        if last - first == BLOCK:
            _apply_to_chunk(
                param_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr, hyper_ptr, offs, mask, decay, size,
                DECAY_IN_UPDATE, HAS_COPY, CPU_BF16, False,
            )  # fmt: skip
        else:
            _apply_to_chunk(
                param_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr, hyper_ptr, offs, mask, decay, size,
                DECAY_IN_UPDATE, HAS_COPY, CPU_BF16, True,
            )  # fmt: skip


class ChunkTable(NamedTuple):
    """A segment table as the kernels read it."""

    chunks_C5: Tensor
    """int32: number of the block, first and last element inside it, row, slot of the partial sums."""
    decays_C: Tensor
    """fp32: weight decay."""
    row_slots_R1: Tensor
    """int32 (R + 1): first slot of each row, and the number of slots."""
    num_slots: int


@functools.lru_cache(maxsize=64)
def chunk_table(table: SegmentTable, device: torch.device) -> ChunkTable:
    """Return a segment table cut into chunks, ordered by row."""
    block = LAMB.block_n
    chunks: list[tuple[int, int, int, int, int]] = []
    decays: list[float] = []
    row_slots = [0]
    segments = sorted(table.segments, key=lambda segment: (segment.row, segment.begin))
    for row in range(table.num_rows):
        slot = row_slots[-1]
        while segments and segments[0].row == row:
            begin, length, _, decay = segments.pop(0)
            for number in range(begin // block, -(-(begin + length) // block)):
                bounds = (max(begin - number * block, 0), min(begin + length - number * block, block))
                chunks.append((number, *bounds, row, slot))
                decays.append(decay)
                slot += 1
        row_slots.append(-(-slot // _SLOTS) * _SLOTS)
    return ChunkTable(
        torch.tensor(chunks, dtype=torch.int32, device=device).view(-1, 5),
        torch.tensor(decays, dtype=torch.float32, device=device),
        torch.tensor(row_slots, dtype=torch.int32, device=device),
        row_slots[-1],
    )


def hyper_of_step(scalars: LambScalars, lr: float, *, device: torch.device, skip: Tensor | None = None) -> Tensor:
    """Return the hyper-parameters of a step that the host counts, fp32 on the device.

    Args:
        skip: one number on the device, not 0 where the step is to change nothing; None for a step that counts.
    """
    betas = [scalars.beta1, scalars.beta2, scalars.beta3, 1 - scalars.beta2]
    numbers = [*betas, scalars.eps, scalars.correction1, scalars.correction2, lr, 0.0]
    # At stage 0 every tensor asks, and all but the first are given what is on the device already.
    hyper = on_device(tuple(numbers), torch.float32, device)
    return hyper if skip is None else torch.cat((hyper[:-1], skip.reshape(1).float()))


@torch.library.custom_op("bert_kernels::lamb_moments", mutates_args=("exp_avg", "exp_avg_sq", "sums"))
def _lamb_moments(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    chunks: Tensor,
    decays: Tensor,
    row_slots: Tensor,
    hyper: Tensor,
    sums: Tensor,
    num_slots: int,
    decay_in_update: bool,
) -> None:
    partials = torch.zeros(2, num_slots, dtype=torch.float32, device=param.device)
    moments = {
        "param_ptr": param,
        "grad_ptr": grad,
        "exp_avg_ptr": exp_avg,
        "exp_avg_sq_ptr": exp_avg_sq,
        "chunks_ptr": chunks,
        "decays_ptr": decays,
        "hyper_ptr": hyper,
        "partials_ptr": partials,
        "num_slots": num_slots,
        "BLOCK": LAMB.block_n,
        "DECAY_IN_UPDATE": decay_in_update,
    }
    launch(_lamb_moments_kernel, (len(chunks),), LAMB, moments)
    rows = {"partials_ptr": partials, "row_slots_ptr": row_slots, "sums_ptr": sums, "num_slots": num_slots}
    launch(_lamb_rows_kernel, (len(sums),), LAMB_ROWS, rows | {"BLOCK": LAMB_ROWS.block_n})


@torch.library.custom_op("bert_kernels::lamb_apply", mutates_args=("param", "copy"))
def _lamb_apply(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    chunks: Tensor,
    decays: Tensor,
    hyper: Tensor,
    ratios: Tensor,
    decay_in_update: bool,
) -> None:
    arguments = {
        "param_ptr": param,
        "exp_avg_ptr": exp_avg,
        "exp_avg_sq_ptr": exp_avg_sq,
        # Not written without a copy, but a pointer all the same.
        "copy_ptr": param if copy is None else copy,
        "chunks_ptr": chunks,
        "decays_ptr": decays,
        "hyper_ptr": hyper,
        "ratios_ptr": ratios,
        "BLOCK": LAMB.block_n,
        "DECAY_IN_UPDATE": decay_in_update,
        "HAS_COPY": copy is not None,
        "CPU_BF16": copy is not None and cpu_bf16(copy.dtype),
    }
    launch(_lamb_apply_kernel, (len(chunks),), LAMB, arguments)


def lamb_moments_triton(shard: FlatShard, hyper: Tensor, *, sums_R2: Tensor, decay_in_update: bool = True) -> None:
    """Pass 1 of LAMB as `lamb_moments_reference` does, by the Triton kernels.

    Args:
        shard: weights and gradient (fp32, bf16 or fp16) are read, moments are updated; nothing where hyper says skip.
        hyper: fp32 [9], from hyper_of_step.
        sums_R2: fp64 [R, 2], |w|^2 and |u|^2 of every segment are added to its row.
        decay_in_update: whether decay is part of u, or of the gradient.

    Raises:
        ValueError: an argument is outside what the kernels can do.
    """
    table = chunk_table(shard.table, shard.param_E.device)
    _check_shard(shard, hyper)
    _check_rows("sums_R2", sums_R2, (shard.table.num_rows, 2), torch.float64)
    buffers = (shard.param_E, shard.grad_E, shard.exp_avg_E, shard.exp_avg_sq_E)
    _lamb_moments(
        *buffers, table.chunks_C5, table.decays_C, table.row_slots_R1, hyper, sums_R2, table.num_slots, decay_in_update
    )


def lamb_apply_triton(
    shard: FlatShard, hyper: Tensor, *, ratios_R: Tensor, copy_E: Tensor | None = None, decay_in_update: bool = True
) -> None:
    """Pass 2 of LAMB as `lamb_apply_reference` does, by the Triton kernels.

    Args:
        shard: as pass 1 left it; the weights are updated, or nothing where hyper says skip.
        hyper: as in pass 1.
        ratios_R: fp32 [R], trust ratio of every row.
        copy_E: bf16 or fp16, where the rounded weights are written to; None for nowhere.
        decay_in_update: as in pass 1.

    Raises:
        ValueError: an argument is outside what the kernels can do.
    """
    table = chunk_table(shard.table, shard.param_E.device)
    _check_shard(shard, hyper)
    _check_rows("ratios_R", ratios_R, (shard.table.num_rows,), torch.float32)
    if copy_E is not None and (copy_E.shape != shard.param_E.shape or not copy_E.is_contiguous()):
        raise ValueError(f"lamb: copy_E must be contiguous {list(shard.param_E.shape)}, got {list(copy_E.shape)}")
    if copy_E is not None:
        check_device("lamb", param_E=shard.param_E, copy_E=copy_E)
        if copy_E.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"lamb: copy_E must be torch.bfloat16 or torch.float16, got {copy_E.dtype}")
    moments = (shard.exp_avg_E, shard.exp_avg_sq_E)
    _lamb_apply(shard.param_E, *moments, copy_E, table.chunks_C5, table.decays_C, hyper, ratios_R, decay_in_update)


def _check_shard(shard: FlatShard, hyper: Tensor) -> None:
    names = ("param_E", "grad_E", "exp_avg_E", "exp_avg_sq_E")
    buffers = dict(zip(names, shard[:4], strict=True))
    check_device("lamb", **buffers, hyper=hyper)
    _check_rows("hyper", hyper, (len(HYPER),), torch.float32)
    for name, buffer in buffers.items():
        if buffer.shape != (shard.table.num_elements,) or not buffer.is_contiguous():
            wanted = f"contiguous [{shard.table.num_elements}], as long as the segment table says"
            raise ValueError(f"lamb: {name} must be {wanted}, got {list(buffer.shape)}")
        allowed = (torch.float32, torch.bfloat16, torch.float16) if name == "grad_E" else (torch.float32,)
        if buffer.dtype not in allowed:
            raise ValueError(f"lamb: {name} must be {' or '.join(map(str, allowed))}, got {buffer.dtype}")


def _check_rows(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        found = f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"lamb: {name} must be contiguous {dtype} {list(shape)}, got {found}")
