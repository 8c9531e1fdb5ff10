"""The Triton kernels of attention and their launches; formulas, letters and layouts are in `attention`.

Forward (one program per block of queries, head and sequence): online softmax over blocks of keys, exp2 with log2(e)
folded into the scale; saves lse = log2 of the sum of exp2 of the scaled scores, fp32 (H, T), from which backward
rebuilds any p without a maximum. Dropout acts on p after the sum, its scale on the output once.

Backward, with m the keep mask, c its scale, g = m * (dout v^T) and delta = rowsum(dout * out) / c:

    dv = c (m * p)^T dout      ds = p * (g - delta)      dq = c softmax_scale ds k      dk = c softmax_scale ds^T q

Sequences of up to one tile take one program per head and sequence, five products. Longer ones take a program per block
of queries (dq, and delta for the others) and then one per block of keys (dk, dv). No program adds to what another
wrote, so the gradients do not depend on the order in which programs run.

Rows past the end of a sequence load as 0. A key past the end gets p = 0 through its score or through p itself; a query
past the end gets p = 0 through lse = +inf. The row offset of a sequence is int64, offsets inside it are int32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_kernels._launch import cdiv, launch, next_power_of_2, pick_tile
from bert_kernels._numerics import as_operand, cpu_bf16, load_operand
from bert_kernels._tiles import ATTENTION, Tile
from bert_kernels.dropout_mask import keep_attention_tile, keep_scale, keep_threshold

_UNSPECIALIZED = ["num_tokens", "num_heads", "num_blocks", "site", "window"]


@triton.jit
def _sequence(cu_seqlens_ptr, num_heads, num_blocks):  # type: ignore[no-untyped-def]
    """Return (block, head, first token as int64, length) of this program; blocks of a head are neighbours."""
    pid = tl.program_id(0)
    sequence = pid // num_blocks // num_heads
    start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + sequence + 1) - start).to(tl.int32)
    return pid % num_blocks, pid // num_blocks % num_heads, start, length


@triton.jit
def _near(offs_q, offs_k, window):  # type: ignore[no-untyped-def]
    return tl.abs(offs_q[:, None] - offs_k[None, :]) <= window


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attention_fwd_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr, cu_seqlens_ptr, out_ptr, lse_ptr, seed_ptr,
    num_tokens, stride_t, stride_3, stride_h, stride_ot, num_heads, num_blocks, scale_log2, keep_scale, site, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    THRESHOLD: tl.constexpr, HAS_WINDOW: tl.constexpr, CPU_BF16: tl.constexpr,
):  # fmt: skip
    block, head, start, length = _sequence(cu_seqlens_ptr, num_heads, num_blocks)
    if block * BLOCK_M < length:
        offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tl.arange(0, BLOCK_N)
        offs_d = tl.arange(0, BLOCK_D)
        mask_m = (offs_m < length)[:, None] & (offs_d < HEAD_DIM)[None, :]
        q_ptr = qkv_ptr + start * stride_t + head * stride_h
        q = load_operand(q_ptr + offs_m[:, None] * stride_t + offs_d[None, :], mask_m, CPU_BF16)
        k_ptrs = q_ptr + stride_3 + offs_n[:, None] * stride_t + offs_d[None, :]
        if THRESHOLD < 256:
            seed = tl.load(seed_ptr)
        # A finite start: where a window leaves a row without any key so far, exp2(-inf - row_max) is 0 and not NaN.
        row_max = tl.full([BLOCK_M], -1e30, tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        first = 0
        last = length
        if HAS_WINDOW:
            first = tl.maximum(block * BLOCK_M - window, 0) // BLOCK_N * BLOCK_N
            last = tl.minimum(length, (block + 1) * BLOCK_M + window)
        for n in range(first, last, BLOCK_N):
            mask_n = n + offs_n < length
            mask_k = mask_n[:, None] & (offs_d < HEAD_DIM)[None, :]
            k = load_operand(k_ptrs + n * stride_t, mask_k, CPU_BF16)
            v = load_operand(k_ptrs + n * stride_t + stride_3, mask_k, CPU_BF16)
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
            if HAS_WINDOW:
                score = tl.where(mask_n[None, :] & _near(offs_m, n + offs_n, window), score, float("-inf"))
            else:
                score = tl.where(mask_n[None, :], score, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(score, 1) * scale_log2)
            p = tl.exp2(score * scale_log2 - new_max[:, None])
            decay = tl.exp2(row_max - new_max)
            row_sum = row_sum * decay + tl.sum(p, 1)
            row_max = new_max
            if THRESHOLD < 256:
                keep = keep_attention_tile(seed, (start + offs_m).to(tl.int32), head, site, n, THRESHOLD, BLOCK_N)
                # A zero unknown to the compiler: a constant would move the choice behind the cast of p, where
                # two 16-bit values share a register and must be taken apart.
                p = tl.where(keep, p, tl.minimum(keep_scale, 0.0))
            p = as_operand(p, out_ptr.dtype.element_ty, CPU_BF16)
            acc = tl.dot(p, v, acc * decay[:, None], input_precision="ieee")
        out = as_operand(acc * (keep_scale / row_sum)[:, None], out_ptr.dtype.element_ty, CPU_BF16)
        out_ptrs = out_ptr + start * stride_ot + head * HEAD_DIM + offs_m[:, None] * stride_ot + offs_d[None, :]
        tl.store(out_ptrs, out, mask=mask_m)
        lse_ptrs = lse_ptr + head.to(tl.int64) * num_tokens + start + offs_m
        tl.store(lse_ptrs, row_max + tl.log2(row_sum), mask=offs_m < length)


@triton.jit
def _p_and_ds(  # type: ignore[no-untyped-def]
    q, k, v, dout, lse, delta, keep, mask, scale_log2, keep_scale, THRESHOLD: tl.constexpr, HAS_MASK: tl.constexpr
):
    """Return m * p and ds of a (queries, keys) tile, fp32."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    p = tl.exp2(score * scale_log2 - lse[:, None])
    if HAS_MASK:
        p = tl.where(mask, p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    if THRESHOLD < 256:
        zero = tl.minimum(keep_scale, 0.0)
        ds = p * (tl.where(keep, dp, zero) - delta[:, None])
        p = tl.where(keep, p, zero)
    else:
        ds = p * (dp - delta[:, None])
    return p, ds


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attention_bwd_dq_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr, cu_seqlens_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, seed_ptr,
    num_tokens, stride_t, stride_3, stride_h, stride_ot, num_heads, num_blocks, scale_log2, dq_scale, keep_scale,
    site, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    THRESHOLD: tl.constexpr, HAS_WINDOW: tl.constexpr, CPU_BF16: tl.constexpr,
):  # fmt: skip
    block, head, start, length = _sequence(cu_seqlens_ptr, num_heads, num_blocks)
    if block * BLOCK_M < length:
        offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tl.arange(0, BLOCK_N)
        offs_d = tl.arange(0, BLOCK_D)
        mask_m = (offs_m < length)[:, None] & (offs_d < HEAD_DIM)[None, :]
        q_ptr = qkv_ptr + start * stride_t + head * stride_h
        q = load_operand(q_ptr + offs_m[:, None] * stride_t + offs_d[None, :], mask_m, CPU_BF16)
        offs_out = start * stride_ot + head * HEAD_DIM + offs_m[:, None] * stride_ot + offs_d[None, :]
        out = load_operand(out_ptr + offs_out, mask_m, CPU_BF16)
        dout = load_operand(dout_ptr + offs_out, mask_m, CPU_BF16)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1) / keep_scale
        offs_row = head.to(tl.int64) * num_tokens + start + offs_m
        tl.store(delta_ptr + offs_row, delta, mask=offs_m < length)
        lse = tl.load(lse_ptr + offs_row, mask=offs_m < length, other=float("inf"))
        k_ptrs = q_ptr + stride_3 + offs_n[:, None] * stride_t + offs_d[None, :]
        if THRESHOLD < 256:
            seed = tl.load(seed_ptr)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        first = 0
        last = length
        if HAS_WINDOW:
            first = tl.maximum(block * BLOCK_M - window, 0) // BLOCK_N * BLOCK_N
            last = tl.minimum(length, (block + 1) * BLOCK_M + window)
        for n in range(first, last, BLOCK_N):
            mask = (n + offs_n < length)[None, :]
            mask_k = (n + offs_n < length)[:, None] & (offs_d < HEAD_DIM)[None, :]
            if HAS_WINDOW:
                mask = mask & _near(offs_m, n + offs_n, window)
            k = load_operand(k_ptrs + n * stride_t, mask_k, CPU_BF16)
            v = load_operand(k_ptrs + n * stride_t + stride_3, mask_k, CPU_BF16)
            keep = mask
            if THRESHOLD < 256:
                keep = keep_attention_tile(seed, (start + offs_m).to(tl.int32), head, site, n, THRESHOLD, BLOCK_N)
            _p, ds = _p_and_ds(q, k, v, dout, lse, delta, keep, mask, scale_log2, keep_scale, THRESHOLD, True)
            ds = as_operand(ds, dqkv_ptr.dtype.element_ty, CPU_BF16)
            dq = tl.dot(ds, k, dq, input_precision="ieee")
        dq = as_operand(dq * dq_scale, dqkv_ptr.dtype.element_ty, CPU_BF16)
        dq_ptr = dqkv_ptr + start * (3 * stride_ot) + head * HEAD_DIM
        tl.store(dq_ptr + offs_m[:, None] * (3 * stride_ot) + offs_d[None, :], dq, mask=mask_m)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attention_bwd_dkdv_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr, cu_seqlens_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, seed_ptr,
    num_tokens, stride_t, stride_3, stride_h, stride_ot, num_heads, num_blocks, scale_log2, dk_scale, keep_scale,
    site, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    THRESHOLD: tl.constexpr, HAS_WINDOW: tl.constexpr, CPU_BF16: tl.constexpr,
):  # fmt: skip
    block, head, start, length = _sequence(cu_seqlens_ptr, num_heads, num_blocks)
    if block * BLOCK_N < length:
        offs_m = tl.arange(0, BLOCK_M)
        offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_d = tl.arange(0, BLOCK_D)
        mask_n = (offs_n < length)[:, None] & (offs_d < HEAD_DIM)[None, :]
        q_ptr = qkv_ptr + start * stride_t + head * stride_h
        k_ptrs = q_ptr + stride_3 + offs_n[:, None] * stride_t + offs_d[None, :]
        k = load_operand(k_ptrs, mask_n, CPU_BF16)
        v = load_operand(k_ptrs + stride_3, mask_n, CPU_BF16)
        q_ptrs = q_ptr + offs_m[:, None] * stride_t + offs_d[None, :]
        dout_ptrs = dout_ptr + start * stride_ot + head * HEAD_DIM + offs_m[:, None] * stride_ot + offs_d[None, :]
        offs_row = head.to(tl.int64) * num_tokens + start + offs_m
        if THRESHOLD < 256:
            seed = tl.load(seed_ptr)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        first = 0
        last = length
        if HAS_WINDOW:
            first = tl.maximum(block * BLOCK_N - window, 0) // BLOCK_M * BLOCK_M
            last = tl.minimum(length, (block + 1) * BLOCK_N + window)
        for m in range(first, last, BLOCK_M):
            mask_row = m + offs_m < length
            mask_m = mask_row[:, None] & (offs_d < HEAD_DIM)[None, :]
            q = load_operand(q_ptrs + m * stride_t, mask_m, CPU_BF16)
            dout = load_operand(dout_ptrs + m * stride_ot, mask_m, CPU_BF16)
            lse = tl.load(lse_ptr + offs_row + m, mask=mask_row, other=float("inf"))
            delta = tl.load(delta_ptr + offs_row + m, mask=mask_row, other=0.0)
            # A key past the end spoils only its own rows of dk and dv, which are not stored.
            mask = _near(m + offs_m, offs_n, window)
            keep = mask
            if THRESHOLD < 256:
                rows = (start + m + offs_m).to(tl.int32)
                keep = keep_attention_tile(seed, rows, head, site, block * BLOCK_N, THRESHOLD, BLOCK_N)
            p, ds = _p_and_ds(q, k, v, dout, lse, delta, keep, mask, scale_log2, keep_scale, THRESHOLD, HAS_WINDOW)
            p = as_operand(p, dqkv_ptr.dtype.element_ty, CPU_BF16)
            dv = tl.dot(tl.trans(p), dout, dv, input_precision="ieee")
            ds = as_operand(ds, dqkv_ptr.dtype.element_ty, CPU_BF16)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee")
        dk = as_operand(dk * dk_scale, dqkv_ptr.dtype.element_ty, CPU_BF16)
        dv = as_operand(dv * keep_scale, dqkv_ptr.dtype.element_ty, CPU_BF16)
        dk_ptr = dqkv_ptr + start * (3 * stride_ot) + stride_ot + head * HEAD_DIM
        dk_ptrs = dk_ptr + offs_n[:, None] * (3 * stride_ot) + offs_d[None, :]
        tl.store(dk_ptrs, dk, mask=mask_n)
        tl.store(dk_ptrs + stride_ot, dv, mask=mask_n)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attention_bwd_short_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr, cu_seqlens_ptr, out_ptr, dout_ptr, lse_ptr, dqkv_ptr, seed_ptr,
    num_tokens, stride_t, stride_3, stride_h, stride_ot, num_heads, num_blocks, scale_log2, dq_scale, keep_scale,
    site, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    THRESHOLD: tl.constexpr, HAS_WINDOW: tl.constexpr, CPU_BF16: tl.constexpr,
):  # fmt: skip
    _block, head, start, length = _sequence(cu_seqlens_ptr, num_heads, num_blocks)
    if length > 0:
        offs_m = tl.arange(0, BLOCK_M)
        offs_n = tl.arange(0, BLOCK_N)
        offs_d = tl.arange(0, BLOCK_D)
        mask_row = offs_m < length
        mask_m = mask_row[:, None] & (offs_d < HEAD_DIM)[None, :]
        q_ptrs = qkv_ptr + start * stride_t + head * stride_h + offs_m[:, None] * stride_t + offs_d[None, :]
        q = load_operand(q_ptrs, mask_m, CPU_BF16)
        offs_out = start * stride_ot + head * HEAD_DIM + offs_m[:, None] * stride_ot + offs_d[None, :]
        out = load_operand(out_ptr + offs_out, mask_m, CPU_BF16)
        dout = load_operand(dout_ptr + offs_out, mask_m, CPU_BF16)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1) / keep_scale
        lse_ptrs = lse_ptr + head.to(tl.int64) * num_tokens + start + offs_m
        lse = tl.load(lse_ptrs, mask=mask_row, other=float("inf"))
        if THRESHOLD < 256:
            seed = tl.load(seed_ptr)
        dtype: tl.constexpr = dqkv_ptr.dtype.element_ty
        dq_ptr = dqkv_ptr + start * (3 * stride_ot) + head * HEAD_DIM
        k_ptrs = qkv_ptr + start * stride_t + head * stride_h + stride_3 + offs_n[:, None] * stride_t + offs_d[None, :]
        dk_ptrs = dq_ptr + stride_ot + offs_n[:, None] * (3 * stride_ot) + offs_d[None, :]
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for n in range(0, length, BLOCK_N):
            mask_k = (n + offs_n < length)[:, None] & (offs_d < HEAD_DIM)[None, :]
            k = load_operand(k_ptrs + n * stride_t, mask_k, CPU_BF16)
            v = load_operand(k_ptrs + n * stride_t + stride_3, mask_k, CPU_BF16)
            mask = (n + offs_n < length)[None, :]
            if HAS_WINDOW:
                mask = mask & _near(offs_m, n + offs_n, window)
            keep = mask
            if THRESHOLD < 256:
                keep = keep_attention_tile(seed, (start + offs_m).to(tl.int32), head, site, n, THRESHOLD, BLOCK_N)
            p, ds = _p_and_ds(q, k, v, dout, lse, delta, keep, mask, scale_log2, keep_scale, THRESHOLD, True)
            p = as_operand(p, dtype, CPU_BF16)
            dv = tl.dot(tl.trans(p), dout, input_precision="ieee")
            dv = as_operand(dv * keep_scale, dtype, CPU_BF16)
            tl.store(dk_ptrs + n * (3 * stride_ot) + stride_ot, dv, mask=mask_k)
            ds = as_operand(ds, dtype, CPU_BF16)
            dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
            dk = as_operand(dk * dq_scale, dtype, CPU_BF16)
            tl.store(dk_ptrs + n * (3 * stride_ot), dk, mask=mask_k)
            dq = tl.dot(ds, k, dq, input_precision="ieee")
        dq = as_operand(dq * dq_scale, dtype, CPU_BF16)
        tl.store(dq_ptr + offs_m[:, None] * (3 * stride_ot) + offs_d[None, :], dq, mask=mask_m)


@dataclass(frozen=True)
class AttentionCall:
    """What forward and backward of one call share."""

    qkv_T3HK: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    dropout_p: float
    dropout_seed: Tensor | None
    site: int
    softmax_scale: float
    window: int
    """-1: no window."""

    def arguments(self, out_THK: Tensor) -> dict[str, Any]:
        """Return the arguments that all kernels take."""
        qkv = self.qkv_T3HK
        num_tokens, _, num_heads, head_dim = qkv.shape
        return {
            "qkv_ptr": qkv,
            "cu_seqlens_ptr": self.cu_seqlens,
            # Not read without dropout, but a pointer all the same.
            "seed_ptr": self.cu_seqlens if self.dropout_seed is None else self.dropout_seed,
            "num_tokens": num_tokens,
            "stride_t": qkv.stride(0),
            "stride_3": qkv.stride(1),
            "stride_h": qkv.stride(2),
            "stride_ot": out_THK.stride(0),
            "num_heads": num_heads,
            "scale_log2": self.softmax_scale * math.log2(math.e),
            "keep_scale": keep_scale(self.dropout_p),
            "site": self.site,
            "window": self.window,
            "HEAD_DIM": head_dim,
            "BLOCK_D": self.block_d,
            "THRESHOLD": keep_threshold(self.dropout_p),
            "HAS_WINDOW": self.window >= 0,
            "CPU_BF16": cpu_bf16(qkv.dtype),
        }

    @property
    def block_d(self) -> int:
        """Head dim rounded up to a power of two that a matrix product takes."""
        return max(16, next_power_of_2(self.qkv_T3HK.shape[3]))

    def tile(self, kernel: str) -> Tile:
        """Return the tile of a kernel for this dtype, head dim, length and card."""
        width = "fp32" if self.qkv_T3HK.dtype == torch.float32 else str(max(64, self.block_d))
        return pick_tile(ATTENTION[f"{kernel}/{width}"], self.qkv_T3HK.device, self.max_seqlen)

    def grid(self, block: int) -> tuple[int, int]:
        """Return (programs, blocks of `block` rows per sequence and head)."""
        num_blocks = cdiv(self.max_seqlen, block)
        return num_blocks * (len(self.cu_seqlens) - 1) * self.qkv_T3HK.shape[2], num_blocks


def attention_forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Return out (T, H, K) and lse (H, T)."""
    num_tokens, _, num_heads, head_dim = call.qkv_T3HK.shape
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=call.qkv_T3HK.dtype, device=call.qkv_T3HK.device)
    lse = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=out.device)
    tile = call.tile("fwd")
    programs, num_blocks = call.grid(tile.block_m)
    blocks = {"num_blocks": num_blocks, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    launch(_attention_fwd_kernel, (programs,), tile, {**call.arguments(out), "out_ptr": out, "lse_ptr": lse, **blocks})
    return out, lse


def attention_backward(call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor) -> Tensor:
    """Return dqkv (T, 3, H, K), contiguous."""
    dout = dout.contiguous()
    dqkv = torch.empty(call.qkv_T3HK.shape, dtype=out.dtype, device=out.device)
    shared = call.arguments(out) | {"dout_ptr": dout, "lse_ptr": lse, "dqkv_ptr": dqkv}
    scale = call.softmax_scale * keep_scale(call.dropout_p)
    tile = call.tile("short")
    if call.max_seqlen <= tile.block_m:
        programs, _ = call.grid(max(1, call.max_seqlen))
        own = {"out_ptr": out, "dq_scale": scale, "num_blocks": 1, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        launch(_attention_bwd_short_kernel, (programs,), tile, shared | own)
        return dqkv
    delta = torch.empty_like(lse)
    tile = call.tile("dq")
    programs, num_blocks = call.grid(tile.block_m)
    blocks = {"num_blocks": num_blocks, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    own = {"out_ptr": out, "delta_ptr": delta, "dq_scale": scale, **blocks}
    launch(_attention_bwd_dq_kernel, (programs,), tile, shared | own)
    tile = call.tile("dkdv")
    programs, num_blocks = call.grid(tile.block_n)
    blocks = {"num_blocks": num_blocks, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    launch(_attention_bwd_dkdv_kernel, (programs,), tile, shared | {"delta_ptr": delta, "dk_scale": scale, **blocks})
    return dqkv
