"""GELU-gated linear unit of an optional bias, the activation of modern encoders' feed-forward layers.

    y = gelu(a) * b,   (a, b) = the two halves of x + bias     (Shazeer 2020, arXiv 2002.05202; halves as in ModernBERT)

Letters: T tokens, F intermediate, G = 2 F. Inputs and outputs bf16, fp16 or fp32; the maths is fp32, GELU as in
`bias_gelu`. Saved for backward: x and bias. dbias is the sum of dx over the rows, as in `bias_gelu`.

    da = dy * b * gelu'(a)      db = dy * gelu(a)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bert_kernels._column_sums import column_sums
from bert_kernels._launch import cdiv, check_device, launch, pick_tile
from bert_kernels._numerics import as_operand, cpu_bf16
from bert_kernels._operator import operator
from bert_kernels._tiles import BIAS_GELU_PROGRAMS, GEGLU
from bert_kernels.bias_gelu import Approximate, gelu_and_slope


def geglu_reference(x_TG: Tensor, bias_G: Tensor | None = None, *, approximate: Approximate = "none") -> Tensor:
    """Return gelu(a) * b of shape (T, F), a and b the first and second half of x_TG + bias_G, in x_TG's dtype."""
    a_TF, b_TF = (x_TG if bias_G is None else x_TG + bias_G).chunk(2, dim=-1)
    return F.gelu(a_TF, approximate=approximate) * b_TF


@triton.jit
def _load_halves(x_ptr, bias_ptr, offs, mask, offs_n, width, HAS_BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a and b in fp32."""
    a = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + width + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        a += tl.load(bias_ptr + offs_n, mask=offs_n < width, other=0.0).to(tl.float32)[None, :]
        b += tl.load(bias_ptr + width + offs_n, mask=offs_n < width, other=0.0).to(tl.float32)[None, :]
    return a, b


@triton.jit(do_not_specialize=["num_rows"])
def _geglu_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, bias_ptr, y_ptr, num_rows, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, TANH: tl.constexpr, EXACT_ERF: tl.constexpr, CPU_BF16: tl.constexpr,
):  # fmt: skip
    num_columns = tl.cdiv(width, BLOCK_N)
    first_row = (tl.program_id(0) // num_columns).to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)[:, None]
    offs_n = tl.program_id(0) % num_columns * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (first_row + offs_m < num_rows) & (offs_n < width)[None, :]
    offs = first_row * (2 * width) + (offs_m * (2 * width) + offs_n[None, :])
    a, b = _load_halves(x_ptr, bias_ptr, offs, mask, offs_n, width, HAS_BIAS)
    y, _slope = gelu_and_slope(a, TANH, EXACT_ERF)
    offs = first_row * width + (offs_m * width + offs_n[None, :])
    tl.store(y_ptr + offs, as_operand(y * b, y_ptr.dtype.element_ty, CPU_BF16), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_programs"])
def _geglu_bwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, bias_ptr, dy_ptr, dx_ptr, partials_ptr, num_rows, num_programs, width, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, TANH: tl.constexpr, EXACT_ERF: tl.constexpr, CPU_BF16: tl.constexpr,
):  # fmt: skip
    num_columns = tl.cdiv(width, BLOCK_N)
    program = tl.program_id(0) // num_columns
    offs_m = tl.arange(0, BLOCK_M)[:, None]
    offs_n = tl.program_id(0) % num_columns * BLOCK_N + tl.arange(0, BLOCK_N)
    dbias_a = tl.zeros([BLOCK_N], tl.float32)
    dbias_b = tl.zeros([BLOCK_N], tl.float32)
    for block in range(program, tl.cdiv(num_rows, BLOCK_M), num_programs):
        first_row = tl.cast(block, tl.int64) * BLOCK_M
        mask = (first_row + offs_m < num_rows) & (offs_n < width)[None, :]
        offs = first_row * (2 * width) + (offs_m * (2 * width) + offs_n[None, :])
        a, b = _load_halves(x_ptr, bias_ptr, offs, mask, offs_n, width, HAS_BIAS)
        offs_y = first_row * width + (offs_m * width + offs_n[None, :])
        dy = tl.load(dy_ptr + offs_y, mask=mask, other=0.0).to(tl.float32)
        y, slope = gelu_and_slope(a, TANH, EXACT_ERF)
        da = dy * b * slope
        db = dy * y
        tl.store(dx_ptr + offs, as_operand(da, dx_ptr.dtype.element_ty, CPU_BF16), mask=mask)
        tl.store(dx_ptr + width + offs, as_operand(db, dx_ptr.dtype.element_ty, CPU_BF16), mask=mask)
        if HAS_BIAS:
            dbias_a += tl.sum(da, 0)
            dbias_b += tl.sum(db, 0)
    if HAS_BIAS:
        partials_ptr += program.to(tl.int64) * (2 * width)
        tl.store(partials_ptr + offs_n, dbias_a, mask=offs_n < width)
        tl.store(partials_ptr + width + offs_n, dbias_b, mask=offs_n < width)


def geglu_forward(x_TG: Tensor, bias_G: Tensor | None, approximate: str) -> Tensor:
    """Return y (T, F)."""
    num_rows, width = x_TG.shape[0], x_TG.shape[1] // 2
    y = torch.empty(num_rows, width, dtype=x_TG.dtype, device=x_TG.device)
    tile = pick_tile(GEGLU["fwd"], x_TG.device, width)
    arguments = _arguments(x_TG, bias_G, approximate, tile)
    programs = cdiv(num_rows, tile.block_m) * cdiv(width, tile.block_n)
    launch(_geglu_fwd_kernel, (programs,), tile, arguments | {"y_ptr": y})
    return y


def geglu_backward(x_TG: Tensor, bias_G: Tensor | None, dy: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """Return dx (T, G) and dbias (G), (0,) without a bias."""
    num_rows, width = x_TG.shape[0], x_TG.shape[1] // 2
    dx = torch.empty_like(x_TG)
    tile = pick_tile(GEGLU["bwd"], x_TG.device, width)
    arguments = _arguments(x_TG, bias_G, approximate, tile)
    programs = min(BIAS_GELU_PROGRAMS, cdiv(num_rows, tile.block_m))
    partials = torch.empty(programs, 0 if bias_G is None else 2 * width, dtype=torch.float32, device=x_TG.device)
    own = {"dy_ptr": dy.contiguous(), "dx_ptr": dx, "partials_ptr": partials, "num_programs": programs}
    launch(_geglu_bwd_kernel, (programs * cdiv(width, tile.block_n),), tile, arguments | own)
    return dx, x_TG.new_empty(0) if bias_G is None else column_sums(partials, bias_G.dtype)


def _arguments(x_TG: Tensor, bias_G: Tensor | None, approximate: str, tile: Any) -> dict[str, Any]:
    return {
        "x_ptr": x_TG,
        # Not read without a bias, but a pointer all the same.
        "bias_ptr": x_TG if bias_G is None else bias_G,
        "num_rows": x_TG.shape[0],
        "width": x_TG.shape[1] // 2,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "HAS_BIAS": bias_G is not None,
        "TANH": approximate == "tanh",
        "EXACT_ERF": x_TG.dtype == torch.float32,
        "CPU_BF16": cpu_bf16(x_TG.dtype),
    }


@operator("bert_kernels::geglu")
def _geglu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return geglu_forward(x, bias, approximate)


@_geglu.register_fake
def _(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@operator("bert_kernels::geglu_backward")
def _geglu_backward(x: Tensor, bias: Tensor | None, dy: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    return geglu_backward(x, bias, dy, approximate)


@_geglu_backward.register_fake
def _(x: Tensor, bias: Tensor | None, dy: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, dy: Tensor) -> tuple:
    x, bias = ctx.saved_tensors
    dx, dbias = _geglu_backward(x, bias, dy, ctx.approximate)
    return dx, None if bias is None else dbias, None


_geglu.register_autograd(_backward, setup_context=_setup_context)


def geglu(x_TG: Tensor, bias_G: Tensor | None = None, *, approximate: Approximate = "none") -> Tensor:
    """Return gelu(a) * b as geglu_reference does, by the Triton kernels.

    Raises:
        ValueError: an argument is outside what the kernels can do.
    """
    check_device("geglu", x_TG=x_TG, bias_G=bias_G)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"geglu: approximate must be 'none' or 'tanh', got {approximate!r}")
    if x_TG.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"geglu: x_TG must be bfloat16, float16 or float32, got {x_TG.dtype}")
    if x_TG.dim() != 2 or x_TG.shape[1] % 2:
        raise ValueError(f"geglu: x_TG must have shape (T, G) with an even G, got {list(x_TG.shape)}")
    if bias_G is not None and bias_G.shape != x_TG.shape[1:]:
        raise ValueError(f"geglu: bias_G must have shape [{x_TG.shape[1]}], got {list(bias_G.shape)}")
    if bias_G is not None and bias_G.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"geglu: bias_G must be bfloat16, float16 or float32, got {bias_G.dtype}")
    return _geglu(x_TG.contiguous(), None if bias_G is None else bias_G.contiguous(), approximate)
