"""Loads, stores and casts that round alike on a GPU and in Triton's interpreter.

The interpreter holds bf16 as its 16 bits, computes nonsense with them and truncates where a GPU rounds to nearest. With
CPU_BF16 the kernels hold bf16 values in fp32, rounded to nearest at the same places, so that a test on the CPU sees
the rounding of the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bert_kernels._launch import INTERPRETING


def cpu_bf16(dtype: torch.dtype) -> bool:
    """Return the CPU_BF16 switch of kernels on tensors of this dtype."""
    return INTERPRETING and dtype == torch.bfloat16


@triton.jit
def load_operand(ptrs, mask, CPU_BF16: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load in the tensor's dtype, masked elements as 0."""
    x = tl.load(ptrs, mask=mask, other=0.0)
    if CPU_BF16:
        x = x.to(tl.float32)
    return x


@triton.jit
def as_operand(x, DTYPE: tl.constexpr, CPU_BF16: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round fp32 to DTYPE, for a matrix product or a store."""
    if CPU_BF16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    else:
        x = x.to(DTYPE)
    return x
