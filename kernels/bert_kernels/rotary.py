"""Rotary positions: queries and keys turned by angles that grow with the position, values as they are.

    y[j] = x[j] cos(a) - x[j + K/2] sin(a)      y[j + K/2] = x[j + K/2] cos(a) + x[j] sin(a)
    a = position * theta^(-2 j / K),  0 <= j < K/2     (Su et al. 2021, arXiv 2104.09864; halves as in `transformers`)

Letters: T tokens of all sequences, H heads, K head dim. Inputs and outputs bf16, fp16 or fp32; angles, sines and
products are fp32 (`transformers` rounds the sines of a 16-bit model to 16 bits). Frequencies are rounded where
`transformers` rounds them, so that far positions get the same angles: the kernel's are equal at heads of 64 and both
thetas of ModernBERT, and off by one unit in the last place where torch's power is. Saved for backward: the positions;
it turns by the negative angle.

The result is a tensor of its own and 6 of (T, H, K) are moved, although turning in place would move 4: qkv is a view of
a linear layer's output, and autograd copies the whole gradient of a view that was changed in place. Nothing here keeps
the argument, so a caller that drops it holds one qkv during attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_kernels._launch import cdiv, check_device, launch, next_power_of_2, pick_tile
from bert_kernels._numerics import as_operand, cpu_bf16, load_operand
from bert_kernels._operator import operator
from bert_kernels._tiles import ROTARY

MAX_HEAD_DIM = 128


def rotary_reference(qkv_T3HK: Tensor, position_ids_T: Tensor, *, theta: float) -> Tensor:
    """Return qkv (T, 3, H, K) with queries and keys turned to their positions, in the dtype of qkv_T3HK.

    Args:
        qkv_T3HK: queries, keys and values; K even.
        position_ids_T: int64, place of each token in its sequence.
        theta: base of the frequencies, above 1.

    Raises:
        ValueError: shapes, dtypes or theta do not fit.
    """
    _check(qkv_T3HK, position_ids_T, theta)
    head_dim, device = qkv_T3HK.shape[3], qkv_T3HK.device
    frequencies_J = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles_TJ = position_ids_T.float()[:, None] * frequencies_J
    angles_T11J = angles_TJ.to(torch.promote_types(qkv_T3HK.dtype, torch.float32))[:, None, None]
    return _Turn.apply(qkv_T3HK, angles_T11J.cos(), angles_T11J.sin())


class _Turn(torch.autograd.Function):
    """In torch; autograd would keep both halves in fp32 and put their gradients together once more."""

    @staticmethod
    def forward(ctx: Any, qkv_T3HK: Tensor, cos_T11J: Tensor, sin_T11J: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T11J, sin_T11J)
        out_T3HK, half = torch.empty_like(qkv_T3HK), cos_T11J.shape[-1]
        first, second = qkv_T3HK[:, :2].to(cos_T11J.dtype).split(half, dim=-1)
        out_T3HK[:, :2, :, :half] = first * cos_T11J - second * sin_T11J
        out_T3HK[:, :2, :, half:] = second * cos_T11J + first * sin_T11J
        out_T3HK[:, 2] = qkv_T3HK[:, 2]
        return out_T3HK

    @staticmethod
    def backward(ctx: Any, dout_T3HK: Tensor) -> tuple[Tensor, None, None]:
        cos_T11J, sin_T11J = ctx.saved_tensors
        return _Turn.apply(dout_T3HK, cos_T11J, -sin_T11J), None, None


@triton.jit
def _cos_and_sin(angle):  # type: ignore[no-untyped-def]
    """Return cosine and sine of fp32 angles; up to 10^4 within 1e-7, beyond that worse and worse.

    The library's own would need a stack for angles that no sequence has. Reduction by pi / 2 in three parts, the first
    so short that its multiples are exact; polynomials of Cephes (Moshier, sinf.c) on [-pi / 4, pi / 4].
    """
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    x = angle - quarters * 1.5703125
    x = x - quarters * 4.837512969970703125e-4
    x = x - quarters * 7.549789954891882e-8
    xx = x * x
    sin = ((-1.9515295891e-4 * xx + 8.3321608736e-3) * xx - 1.6666654611e-1) * xx * x + x
    cos = ((2.443315711809948e-5 * xx - 1.388731625493765e-3) * xx + 4.166664568298827e-2) * xx * xx - 0.5 * xx + 1.0
    quadrant = quarters.to(tl.int32)
    odd = quadrant % 2 != 0
    cos_sign = tl.where((quadrant + 1) & 2 != 0, -1.0, 1.0)
    sin_sign = tl.where(quadrant & 2 != 0, -1.0, 1.0)
    return tl.where(odd, sin, cos) * cos_sign, tl.where(odd, cos, sin) * sin_sign


@triton.jit(do_not_specialize=["num_tokens"])
def _rotary_kernel(  # type: ignore[no-untyped-def]
    x_ptr, positions_ptr, y_ptr, num_tokens, num_heads, HEAD_DIM: tl.constexpr, LOG2_THETA: tl.constexpr,
    INVERSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, CPU_BF16: tl.constexpr,
):  # fmt: skip
    # A program has queries, keys or values of a block of tokens.
    part = tl.program_id(0) % 3
    first_row = (tl.program_id(0) // 3).to(tl.int64) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    offs_j = tl.arange(0, BLOCK_J)
    HALF: tl.constexpr = HEAD_DIM // 2
    mask = (rows < num_tokens)[:, None] & (offs_j < HALF)[None, :]
    width = num_heads * HEAD_DIM
    offs_m = tl.arange(0, BLOCK_M)[:, None] * (3 * width)
    offs = first_row * (3 * width) + (part * width + offs_m + offs_j[None, :])
    x_ptr += offs
    y_ptr += offs
    # In fp64 and rounded where transformers rounds: one unit in a frequency's last place would show far from the start.
    exponents = (offs_j.to(tl.float32) * 2.0 / HEAD_DIM).to(tl.float64)
    frequencies = tl.div_rn(tl.full([BLOCK_J], 1.0, tl.float32), tl.exp2(exponents * LOG2_THETA).to(tl.float32))
    positions = tl.load(positions_ptr + rows, mask=rows < num_tokens, other=0).to(tl.float32)
    cos, sin = _cos_and_sin(positions[:, None] * frequencies[None, :])
    if INVERSE:
        sin = -sin
    for _head in range(num_heads):
        first, second = load_operand(x_ptr, mask, CPU_BF16), load_operand(x_ptr + HALF, mask, CPU_BF16)
        if part < 2:
            a, b = first.to(tl.float32), second.to(tl.float32)
            first = as_operand(a * cos - b * sin, y_ptr.dtype.element_ty, CPU_BF16)
            second = as_operand(b * cos + a * sin, y_ptr.dtype.element_ty, CPU_BF16)
        tl.store(y_ptr, first, mask=mask)
        tl.store(y_ptr + HALF, second, mask=mask)
        x_ptr += HEAD_DIM
        y_ptr += HEAD_DIM


def rotary_turn(qkv_T3HK: Tensor, position_ids_T: Tensor, theta: float, *, inverse: bool) -> Tensor:
    """Return qkv with queries and keys turned to their positions, or back."""
    num_tokens, _, num_heads, head_dim = qkv_T3HK.shape
    y = torch.empty_like(qkv_T3HK)
    tile = pick_tile(ROTARY, y.device, head_dim)
    arguments: dict[str, Any] = {
        "x_ptr": qkv_T3HK,
        "positions_ptr": position_ids_T,
        "y_ptr": y,
        "num_tokens": num_tokens,
        "num_heads": num_heads,
        "HEAD_DIM": head_dim,
        "LOG2_THETA": math.log2(theta),
        "INVERSE": inverse,
        "BLOCK_M": tile.block_m,
        "BLOCK_J": max(8, next_power_of_2(head_dim // 2)),
        "CPU_BF16": cpu_bf16(y.dtype),
    }
    launch(_rotary_kernel, (3 * cdiv(num_tokens, tile.block_m),), tile, arguments)
    return y


@operator("bert_kernels::rotary")
def _rotary(qkv: Tensor, position_ids: Tensor, theta: float, inverse: bool) -> Tensor:
    return rotary_turn(qkv.contiguous(), position_ids, theta, inverse=inverse)


@_rotary.register_fake
def _(qkv: Tensor, position_ids: Tensor, theta: float, inverse: bool) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _qkv, position_ids, ctx.theta, ctx.inverse = inputs
    ctx.save_for_backward(position_ids)


def _backward(ctx: Any, dqkv: Tensor) -> tuple:
    (position_ids,) = ctx.saved_tensors
    return _rotary(dqkv, position_ids, ctx.theta, not ctx.inverse), None, None, None


_rotary.register_autograd(_backward, setup_context=_setup_context)


def rotary(qkv_T3HK: Tensor, position_ids_T: Tensor, *, theta: float) -> Tensor:
    """Return qkv with queries and keys turned as rotary_reference does, by the Triton kernel.

    Raises:
        ValueError: an argument is outside what the kernel can do.
    """
    check_device("rotary", qkv_T3HK=qkv_T3HK, position_ids_T=position_ids_T)
    _check(qkv_T3HK, position_ids_T, theta)
    if qkv_T3HK.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"rotary: qkv_T3HK must be bfloat16, float16 or float32, got {qkv_T3HK.dtype}")
    if qkv_T3HK.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"rotary: head dim must be at most {MAX_HEAD_DIM}, got {qkv_T3HK.shape[3]}")
    return _rotary(qkv_T3HK, position_ids_T.contiguous(), theta, False)


def _check(qkv: Tensor, position_ids: Tensor, theta: float) -> None:
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"rotary: qkv_T3HK must have shape (T, 3, H, K), got {list(qkv.shape)}")
    if qkv.shape[3] % 2 or qkv.shape[3] == 0:
        raise ValueError(f"rotary: head dim must be even, as its halves are turned together, got {qkv.shape[3]}")
    if position_ids.dtype != torch.int64 or position_ids.shape != qkv.shape[:1]:
        found = f"{position_ids.dtype} {list(position_ids.shape)}"
        raise ValueError(f"rotary: position_ids_T must be torch.int64 [{qkv.shape[0]}], got {found}")
    if not 1.0 < theta < math.inf:
        raise ValueError(f"rotary: theta must be above 1 and finite, got {theta}")
