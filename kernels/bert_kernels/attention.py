"""Bidirectional attention over packed sequences of different lengths, with dropout of the probabilities.

    p = softmax(softmax_scale * q k^T) over the keys of the same sequence (those at most `window` away, where given)
    out = dropout(p) v

Letters: T tokens of all sequences, N sequences, H heads, K head dim, S length. cu_seqlens[i] is where sequence i
starts in T, cu_seqlens[N] = T. Inputs and outputs bf16, fp16 or fp32; softmax in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bert_kernels._launch import check_device, values_at_hand
from bert_kernels._operator import operator
from bert_kernels.attention_kernels import AttentionCall, attention_backward, attention_forward
from bert_kernels.attention_reference import attention_reference
from bert_kernels.dropout_mask import check_dropout, keep_threshold

__all__ = ["MAX_HEAD_DIM", "attention", "attention_reference"]

MAX_HEAD_DIM = 128
# Offsets inside a sequence are 32 bits; a block may reach 128 rows beyond the end before it is masked.
_MOST_ELEMENTS = (1 << 31) - (1 << 24)


def attention(
    qkv_T3HK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    site: int = 0,
    softmax_scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Return attention's output as attention_reference does, by the Triton kernels.

    Args:
        qkv_T3HK: bf16, fp16 or fp32 (T, 3, H, K), K at most 128 and contiguous.
        cu_seqlens: int32 (N + 1), on the same device; its last element must be T.
        max_seqlen: at least the longest length. On a GPU neither this nor cu_seqlens can be checked without a wait:
            a value too small leaves rows of the output unwritten.

    Raises:
        ValueError: an argument is outside what the kernels can do.
    """
    scale = softmax_scale if softmax_scale is not None else qkv_T3HK.shape[-1] ** -0.5
    check_device("attention", qkv_T3HK=qkv_T3HK, cu_seqlens=cu_seqlens)
    check_dropout(dropout_p, dropout_seed, qkv_T3HK.device)
    _check_shapes(qkv_T3HK, cu_seqlens, max_seqlen)
    if not scale > 0.0:
        raise ValueError(f"attention: softmax_scale must be positive, got {scale}")
    if window is not None and window < 0:
        raise ValueError(f"attention: window must be at least 0, got {window}")
    seed = None if keep_threshold(dropout_p) == 256 else dropout_seed
    out, _ = _attention(
        qkv_T3HK, cu_seqlens, max_seqlen, dropout_p, seed, site, scale, -1 if window is None else window
    )
    return out


def _check_shapes(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"attention: qkv_T3HK must have shape (T, 3, H, K), got {list(qkv.shape)}")
    if qkv.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"attention: qkv_T3HK must be bfloat16, float16 or float32, got {qkv.dtype}")
    if not 1 <= qkv.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"attention: head dim must be in [1, {MAX_HEAD_DIM}], got {qkv.shape[3]}")
    if qkv.stride(3) != 1:
        raise ValueError(f"attention: the last dimension of qkv_T3HK must have stride 1, got {qkv.stride(3)}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        found = f"{cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
        raise ValueError(f"attention: cu_seqlens must be torch.int32 of shape (N + 1,), got {found}")
    if not cu_seqlens.is_contiguous():
        raise ValueError(f"attention: cu_seqlens must have stride 1, got {cu_seqlens.stride(0)}")
    row = max(qkv.stride(0), 3 * qkv.shape[2] * qkv.shape[3])
    if max_seqlen * row > _MOST_ELEMENTS:
        raise ValueError(
            f"attention: a sequence must span at most {_MOST_ELEMENTS} elements of qkv_T3HK, "
            f"got {max_seqlen} tokens of {row}"
        )
    if values_at_hand(cu_seqlens):
        longest = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != qkv.shape[0]:
            ends = f"{int(cu_seqlens[0])} and {int(cu_seqlens[-1])}"
            raise ValueError(f"attention: cu_seqlens must start at 0 and end at T = {qkv.shape[0]}, got {ends}")
        if max_seqlen < longest:
            raise ValueError(f"attention: max_seqlen is {max_seqlen}, but the longest sequence has {longest} tokens")


@operator("bert_kernels::attention")
def _attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
    site: int,
    softmax_scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    call = AttentionCall(qkv, cu_seqlens, max_seqlen, dropout_p, dropout_seed, site, softmax_scale, window)
    return attention_forward(call)


@_attention.register_fake
def _(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
    site: int,
    softmax_scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    num_tokens, _, num_heads, head_dim = qkv.shape
    lse = qkv.new_empty(num_heads, num_tokens, dtype=torch.float32)
    return qkv.new_empty(num_tokens, num_heads, head_dim), lse


@operator("bert_kernels::attention_backward")
def _attention_backward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
    site: int,
    softmax_scale: float,
    window: int,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
) -> Tensor:
    call = AttentionCall(qkv, cu_seqlens, max_seqlen, dropout_p, dropout_seed, site, softmax_scale, window)
    return attention_backward(call, out, lse, dout)


@_attention_backward.register_fake
def _(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
    site: int,
    softmax_scale: float,
    window: int,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, max_seqlen, dropout_p, dropout_seed, *rest = inputs
    out, lse = output
    ctx.save_for_backward(qkv, cu_seqlens, dropout_seed, out, lse)
    ctx.numbers = (max_seqlen, dropout_p, *rest)
    ctx.mark_non_differentiable(lse)


def _backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple:
    qkv, cu_seqlens, dropout_seed, out, lse = ctx.saved_tensors
    max_seqlen, dropout_p, site, scale, window = ctx.numbers
    dqkv = _attention_backward(
        qkv, cu_seqlens, max_seqlen, dropout_p, dropout_seed, site, scale, window, out, lse, dout
    )
    return dqkv, None, None, None, None, None, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)
