"""The second pass of gradients that sum over all rows: partial sums of programs, added up in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_kernels._launch import cdiv, launch
from bert_kernels._numerics import as_operand, cpu_bf16
from bert_kernels._tiles import COLUMN_SUMS


@triton.jit(do_not_specialize=["num_partials"])
def _column_sums_kernel(  # type: ignore[no-untyped-def]
    partials_ptr, sums_ptr, num_partials, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CPU_BF16: tl.constexpr
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for m in range(0, num_partials, BLOCK_M):
        rows = (m + offs_m).to(tl.int64)
        mask = (rows < num_partials)[:, None] & (offs_n < width)[None, :]
        acc += tl.load(partials_ptr + rows[:, None] * width + offs_n[None, :], mask=mask, other=0.0)
    sums = as_operand(tl.sum(acc, 0), sums_ptr.dtype.element_ty, CPU_BF16)
    tl.store(sums_ptr + offs_n, sums, mask=offs_n < width)


def column_sums(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over the first dimension of contiguous fp32 partials (programs, ...), rounded once to dtype."""
    sums = torch.empty(partials.shape[1:], dtype=dtype, device=partials.device)
    arguments = {
        "partials_ptr": partials,
        "sums_ptr": sums,
        "num_partials": partials.shape[0],
        "width": sums.numel(),
        "BLOCK_M": COLUMN_SUMS.block_m,
        "BLOCK_N": COLUMN_SUMS.block_n,
        "CPU_BF16": cpu_bf16(dtype),
    }
    launch(_column_sums_kernel, (cdiv(sums.numel(), COLUMN_SUMS.block_n),), COLUMN_SUMS, arguments)
    return sums
