"""The casts of the kernels round as torch does, in the interpreter too."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from bert_kernels._numerics import as_operand, cpu_bf16, load_operand

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _double_kernel(x_ptr, y_ptr, CPU_BF16: tl.constexpr):
    offs = tl.arange(0, 1024)
    x = load_operand(x_ptr + offs, offs < 1000, CPU_BF16)
    tl.store(y_ptr + offs, as_operand(x.to(tl.float32) * 1.7, y_ptr.dtype.element_ty, CPU_BF16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_loads_and_stores_round_to_the_nearest_as_torch_does(dtype: torch.dtype) -> None:
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    x[:3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    y = torch.empty_like(x)
    _double_kernel[(1,)](x, y, cpu_bf16(dtype))
    expected = (x.float() * 1.7).to(dtype)
    expected[1000:] = 0.0
    torch.testing.assert_close(y, expected, rtol=0.0, atol=0.0, equal_nan=True)
