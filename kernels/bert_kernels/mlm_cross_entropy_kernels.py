"""The Triton kernel of the masked-LM loss and what surrounds it; formulas and letters are in `mlm_cross_entropy`.

Rows are taken in parts whose logits fit a bounded buffer. For each part: decoder GEMM (cuBLAS), one kernel that turns
the logits into their gradient in place and gives the row's loss, two GEMMs and a column sum for the gradients. So no
logit is kept and none is computed twice; what is saved for backward are the gradients themselves, in fp32, still to be
multiplied by the incoming factor and rounded once. Against recomputing the logits in backward this saves one GEMM of
four and costs 4 V D bytes between the two passes of the head, which follow each other.

The kernel takes a row per program. A row that fits its block is read once; a longer one is read twice, the second time
from the L2 cache. Columns from vocab_size on are masked after the load, not by it: a load mask that does not end at a
multiple of 8 would make every load a scalar one. No program writes what another reads: results are deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bert_kernels._launch import cdiv, launch, pick_tile
from bert_kernels._numerics import as_operand, cpu_bf16
from bert_kernels._tiles import MLM_CROSS_ENTROPY

IGNORED_LABEL = -100
# Logits of a part: 256 MiB in bf16, the masked rows of 29,000 tokens at BERT's vocabulary. Each further part reads and
# writes the fp32 weight gradient once more.
MAX_LOGITS = 1 << 27
_ROWS_MULTIPLE = 128
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


class Wanted(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class LossAndGradients(NamedTuple):
    """fp32 scalars, and fp32 gradients of the loss sum; (0,) where not wanted."""

    loss: Tensor
    num_correct: Tensor
    dhidden_PD: Tensor
    dweight_VD: Tensor
    dbias_V: Tensor


@triton.jit
def _load_others(row_ptr, offs_v, label, vocab_size, num_columns):  # type: ignore[no-untyped-def]
    """Return the logits of a row but for the label's and those of the padding, which are -inf."""
    x = tl.load(row_ptr + offs_v, mask=offs_v < num_columns, other=0.0).to(tl.float32)
    return tl.where((offs_v < vocab_size) & (offs_v != label), x, float("-inf"))


@triton.jit(do_not_specialize=["num_rows", "vocab_size"])
def _mlm_cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, labels_ptr, sums_ptr, num_rows, stride_p, vocab_size, num_columns,
    BLOCK_V: tl.constexpr, ONE_BLOCK: tl.constexpr, HAS_GRADIENT: tl.constexpr, CPU_BF16: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride_p
    # 32 bits are enough for a label, and half the comparisons.
    label = tl.load(labels_ptr + row).to(tl.int32)
    counted = label != -100
    offs_v = tl.arange(0, BLOCK_V)
    # Read before the reductions below, whose barriers keep it ahead of the stores over it.
    valid = (label >= 0) & (label < vocab_size)
    label_logit = tl.load(row_ptr + label, mask=valid, other=0.0).to(tl.float32)
    label_logit = tl.where(valid, label_logit, float("-inf"))
    # Finite starts: a row without any other token gives 0 and not NaN.
    other = -1e30
    total = 0.0
    if ONE_BLOCK:
        x = _load_others(row_ptr, offs_v, label, vocab_size, num_columns)
        other = tl.maximum(other, tl.max(x))
        top = tl.maximum(other, label_logit)
        exp_x = tl.exp2((x - top) * _LOG2_E)
        total = tl.sum(exp_x)
    else:
        for v in range(0, num_columns, BLOCK_V):
            x = _load_others(row_ptr, v + offs_v, label, vocab_size, num_columns)
            higher = tl.maximum(other, tl.max(x))
            total = total * tl.exp2((other - higher) * _LOG2_E) + tl.sum(tl.exp2((x - higher) * _LOG2_E))
            other = higher
        top = tl.maximum(other, label_logit)
        total = total * tl.exp2((other - top) * _LOG2_E)
    others = total
    total += tl.exp2((label_logit - top) * _LOG2_E)
    tl.store(sums_ptr + row, tl.where(counted, top + tl.log(total) - label_logit, 0.0))
    tl.store(sums_ptr + num_rows + row, tl.where(counted & (label_logit > other), 1.0, 0.0))
    if HAS_GRADIENT:
        scale = tl.where(counted, 1.0 / total, 0.0)
        # The label's p - 1 is minus what the others have: nothing cancels where p is nearly 1.
        label_gradient = as_operand(-others * scale, logits_ptr.dtype.element_ty, CPU_BF16)
        if ONE_BLOCK:
            gradient = as_operand(exp_x * scale, logits_ptr.dtype.element_ty, CPU_BF16)
            tl.store(row_ptr + offs_v, gradient, mask=offs_v < num_columns)
        else:
            for v in range(0, num_columns, BLOCK_V):
                x = _load_others(row_ptr, v + offs_v, label, vocab_size, num_columns)
                gradient = tl.exp2((x - top) * _LOG2_E) * scale
                gradient = as_operand(gradient, logits_ptr.dtype.element_ty, CPU_BF16)
                tl.store(row_ptr + v + offs_v, gradient, mask=v + offs_v < num_columns)
        # The label got 0 above, perhaps from another thread.
        tl.debug_barrier()
        tl.store(row_ptr + label, label_gradient, mask=valid)


def replace_by_gradient(logits_PV: Tensor, labels_P: Tensor, vocab_size: int, *, gradient: bool) -> Tensor:
    """Return each row's loss and whether it is right (2, P), and where wanted write the gradient over the logits."""
    num_rows, num_columns = logits_PV.shape
    sums_2P = torch.empty(2, num_rows, dtype=torch.float32, device=logits_PV.device)
    tile = pick_tile(MLM_CROSS_ENTROPY, logits_PV.device, num_columns * logits_PV.element_size() // 2)
    arguments = {
        "logits_ptr": logits_PV,
        "labels_ptr": labels_P,
        "sums_ptr": sums_2P,
        "num_rows": num_rows,
        "stride_p": logits_PV.stride(0),
        "vocab_size": vocab_size,
        "num_columns": num_columns,
        "BLOCK_V": tile.block_n,
        "ONE_BLOCK": num_columns <= tile.block_n,
        "HAS_GRADIENT": gradient,
        "CPU_BF16": cpu_bf16(logits_PV.dtype),
    }
    launch(_mlm_cross_entropy_kernel, (num_rows,), tile, arguments)
    return sums_2P


def mlm_cross_entropy_forward(
    hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_P: Tensor, vocab_size: int, wanted: Wanted
) -> LossAndGradients:
    """Return the loss sum, the number of right rows and the wanted gradients."""
    dhidden_PD, dweight_VD, dbias_V = empty_gradients(hidden_PD, weight_VD, wanted)
    totals_2 = torch.zeros(2, dtype=torch.float32, device=hidden_PD.device)
    for rows in _parts(hidden_PD.shape[0], weight_VD.shape[0]):
        logits_PV = F.linear(hidden_PD[rows], weight_VD, bias_V)
        totals_2 += replace_by_gradient(logits_PV, labels_P[rows], vocab_size, gradient=any(wanted)).sum(1)
        first = rows.start == 0
        if wanted.hidden:
            dhidden_PD[rows] = _product(logits_PV, weight_VD)
        if wanted.weight:
            part = _product(logits_PV.T, hidden_PD[rows])
            dweight_VD = part if first else dweight_VD.add_(part)
        if wanted.bias:
            part = logits_PV.sum(0, dtype=torch.float32)
            dbias_V = part if first else dbias_V.add_(part)
    return LossAndGradients(totals_2[0].clone(), totals_2[1].clone(), dhidden_PD, dweight_VD, dbias_V)


def empty_gradients(hidden_PD: Tensor, weight_VD: Tensor, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """Return fp32 tensors of the shapes of the gradients; (0,) where not wanted, zeros where no row contributes."""
    make = torch.zeros if hidden_PD.shape[0] == 0 else torch.empty
    shapes = (hidden_PD.shape, weight_VD.shape, weight_VD.shape[:1])
    dhidden, dweight, dbias = (
        make(shape if is_wanted else (0,), dtype=torch.float32, device=hidden_PD.device)
        for shape, is_wanted in zip(shapes, wanted, strict=True)
    )
    return dhidden, dweight, dbias


def _parts(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Yield parts of nearly equal size, so that no GEMM has only a few rows."""
    num_parts = cdiv(num_rows * num_columns, MAX_LOGITS)
    rows = cdiv(cdiv(num_rows, max(1, num_parts)), _ROWS_MULTIPLE) * _ROWS_MULTIPLE
    for start in range(0, num_rows, max(1, rows)):
        yield slice(start, min(start + rows, num_rows))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b as the fp32 that the GEMM accumulates in."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cpu":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)
