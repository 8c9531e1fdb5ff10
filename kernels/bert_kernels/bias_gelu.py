"""GELU of a biased input, the activation of BERT's feed-forward layer.

    y = gelu(u), u = x + bias;  "none": gelu(u) = u * Phi(u), the published erf form
    "tanh": gelu(u) = u * sigmoid(2 v), v = sqrt(2 / pi) * (u + 0.044715 u^3)     (Hendrycks and Gimpel 2016)

Letters: T tokens, F intermediate. Inputs and outputs bf16, fp16 or fp32; the maths is fp32. Saved for backward: x and
bias, from which u and the derivative are computed again; the output is not needed. dbias is the sum of dx over the
rows: fp32 partial sums by program, added in a fixed order.

For 16-bit tensors Phi comes from formula 7.1.26 of Abramowitz and Stegun, whose exponential the derivative uses too:
its absolute error of 7.5e-8 is far below their rounding. fp32 tensors use erf itself.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bert_kernels._column_sums import column_sums
from bert_kernels._launch import cdiv, check_device, launch, pick_tile
from bert_kernels._numerics import as_operand, cpu_bf16
from bert_kernels._operator import operator
from bert_kernels._tiles import BIAS_GELU, BIAS_GELU_PROGRAMS

Approximate = Literal["none", "tanh"]

_LOG2_E = tl.constexpr(math.log2(math.e))
_INV_SQRT_2 = tl.constexpr(0.5**0.5)
_INV_SQRT_2_PI = tl.constexpr((2 * math.pi) ** -0.5)
_TANH_SCALE = tl.constexpr((2 / math.pi) ** 0.5)


def bias_gelu_reference(x_TF: Tensor, bias_F: Tensor, *, approximate: Approximate = "none") -> Tensor:
    """Return gelu(x_TF + bias_F) of shape (T, F), in x_TF's dtype."""
    return F.gelu(x_TF + bias_F, approximate=approximate)


@triton.jit
def gelu_and_slope(u, TANH: tl.constexpr, EXACT_ERF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return gelu(u) and its derivative; what the caller does not use is not computed.

    A constexpr stands on the right of a tensor: on the left the interpreter of Triton 3.7 takes it for something else.
    """
    if TANH:
        twice_v = (u + 0.044715 * u * u * u) * (2.0 * _TANH_SCALE)
        # Bounded, so that share * odds, which is 1 - share without its cancellation, is never 0 * inf.
        odds = tl.exp2(tl.minimum(-twice_v * _LOG2_E, 126.0))
        # The square of rsqrt is a cheaper reciprocal: no care for infinities and denormals, which are not here.
        root = tl.rsqrt(1.0 + odds)
        share = root * root
        slope = share + u * (share * odds) * share * ((1.0 + 3.0 * 0.044715 * u * u) * (2.0 * _TANH_SCALE))
    else:
        density = tl.exp2(u * (-0.5 * _LOG2_E) * u)
        if EXACT_ERF:
            share = 0.5 * (1.0 + tl.math.erf(u * _INV_SQRT_2))
        else:
            root = tl.rsqrt(1.0 + tl.abs(u) * (0.3275911 * _INV_SQRT_2))
            t = root * root
            tail = t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))
            tail = 0.5 * density * t * (0.254829592 + t * (-0.284496736 + tail))
            share = tl.where(u < 0.0, tail, 1.0 - tail)
        slope = share + u * density * _INV_SQRT_2_PI
    return u * share, slope


@triton.jit(do_not_specialize=["num_rows"])
def _bias_gelu_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, bias_ptr, y_ptr, num_rows, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TANH: tl.constexpr, EXACT_ERF: tl.constexpr, CPU_BF16: tl.constexpr,
):  # fmt: skip
    num_columns = tl.cdiv(width, BLOCK_N)
    first_row = (tl.program_id(0) // num_columns).to(tl.int64) * BLOCK_M
    offs_n = tl.program_id(0) % num_columns * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (first_row + tl.arange(0, BLOCK_M) < num_rows)[:, None] & (offs_n < width)[None, :]
    offs = first_row * width + (tl.arange(0, BLOCK_M)[:, None] * width + offs_n[None, :])
    bias = tl.load(bias_ptr + offs_n, mask=offs_n < width, other=0.0).to(tl.float32)
    u = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    y, _slope = gelu_and_slope(u, TANH, EXACT_ERF)
    tl.store(y_ptr + offs, as_operand(y, y_ptr.dtype.element_ty, CPU_BF16), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_programs"])
def _bias_gelu_bwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, bias_ptr, dy_ptr, dx_ptr, partials_ptr, num_rows, num_programs, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TANH: tl.constexpr, EXACT_ERF: tl.constexpr, CPU_BF16: tl.constexpr,
):  # fmt: skip
    num_columns = tl.cdiv(width, BLOCK_N)
    program = tl.program_id(0) // num_columns
    offs_n = tl.program_id(0) % num_columns * BLOCK_N + tl.arange(0, BLOCK_N)
    bias = tl.load(bias_ptr + offs_n, mask=offs_n < width, other=0.0).to(tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(program, tl.cdiv(num_rows, BLOCK_M), num_programs):
        first_row = tl.cast(block, tl.int64) * BLOCK_M
        mask = (first_row + tl.arange(0, BLOCK_M) < num_rows)[:, None] & (offs_n < width)[None, :]
        offs = first_row * width + (tl.arange(0, BLOCK_M)[:, None] * width + offs_n[None, :])
        u = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        _y, slope = gelu_and_slope(u, TANH, EXACT_ERF)
        dx = dy * slope
        dbias += dx
        tl.store(dx_ptr + offs, as_operand(dx, dx_ptr.dtype.element_ty, CPU_BF16), mask=mask)
    partials_ptr += program.to(tl.int64) * width
    tl.store(partials_ptr + offs_n, tl.sum(dbias, 0), mask=offs_n < width)


def bias_gelu_forward(x_TF: Tensor, bias_F: Tensor, approximate: str) -> Tensor:
    """Return y (T, F)."""
    y = torch.empty_like(x_TF)
    arguments, tile = _arguments(x_TF, bias_F, approximate)
    programs = cdiv(x_TF.shape[0], tile.block_m) * cdiv(x_TF.shape[1], tile.block_n)
    launch(_bias_gelu_fwd_kernel, (programs,), tile, arguments | {"y_ptr": y})
    return y


def bias_gelu_backward(x_TF: Tensor, bias_F: Tensor, dy: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """Return dx (T, F) and dbias (F)."""
    dx = torch.empty_like(x_TF)
    arguments, tile = _arguments(x_TF, bias_F, approximate)
    programs = min(BIAS_GELU_PROGRAMS, cdiv(x_TF.shape[0], tile.block_m))
    partials = torch.empty(programs, x_TF.shape[1], dtype=torch.float32, device=x_TF.device)
    own = {"dy_ptr": dy.contiguous(), "dx_ptr": dx, "partials_ptr": partials, "num_programs": programs}
    launch(_bias_gelu_bwd_kernel, (programs * cdiv(x_TF.shape[1], tile.block_n),), tile, arguments | own)
    return dx, column_sums(partials, bias_F.dtype)


def _arguments(x_TF: Tensor, bias_F: Tensor, approximate: str) -> tuple[dict[str, Any], Any]:
    tile = pick_tile(BIAS_GELU, x_TF.device, x_TF.shape[1])
    arguments = {
        "x_ptr": x_TF,
        "bias_ptr": bias_F,
        "num_rows": x_TF.shape[0],
        "width": x_TF.shape[1],
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "TANH": approximate == "tanh",
        "EXACT_ERF": x_TF.dtype == torch.float32,
        "CPU_BF16": cpu_bf16(x_TF.dtype),
    }
    return arguments, tile


@operator("bert_kernels::bias_gelu")
def _bias_gelu(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return bias_gelu_forward(x, bias, approximate)


@_bias_gelu.register_fake
def _(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return torch.empty_like(x)


@operator("bert_kernels::bias_gelu_backward")
def _bias_gelu_backward(x: Tensor, bias: Tensor, dy: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    return bias_gelu_backward(x, bias, dy, approximate)


@_bias_gelu_backward.register_fake
def _(x: Tensor, bias: Tensor, dy: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(bias)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, dy: Tensor) -> tuple:
    return (*_bias_gelu_backward(*ctx.saved_tensors, dy, ctx.approximate), None)


_bias_gelu.register_autograd(_backward, setup_context=_setup_context)


def bias_gelu(x_TF: Tensor, bias_F: Tensor, *, approximate: Approximate = "none") -> Tensor:
    """Return gelu(x_TF + bias_F) as bias_gelu_reference does, by the Triton kernels.

    Raises:
        ValueError: an argument is outside what the kernels can do.
    """
    check_device("bias_gelu", x_TF=x_TF, bias_F=bias_F)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"bias_gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    if x_TF.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"bias_gelu: x_TF must be bfloat16, float16 or float32, got {x_TF.dtype}")
    if x_TF.dim() != 2 or bias_F.shape != x_TF.shape[1:]:
        found = f"{list(x_TF.shape)} and {list(bias_F.shape)}"
        raise ValueError(f"bias_gelu: x_TF and bias_F must have shapes (T, F) and (F,), got {found}")
    if bias_F.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"bias_gelu: bias_F must be bfloat16, float16 or float32, got {bias_F.dtype}")
    return _bias_gelu(x_TF.contiguous(), bias_F.contiguous(), approximate)
