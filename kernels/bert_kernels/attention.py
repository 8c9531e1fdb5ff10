"""Bidirectional attention over packed sequences of different lengths, with dropout of the probabilities.

    p = softmax(softmax_scale * q k^T) over the keys of the same sequence (those at most `window` away, where given)
    out = dropout(p) v

Letters: T tokens of all sequences, N sequences, H heads, K head dim, S length. cu_seqlens[i] is where sequence i
starts in T, cu_seqlens[N] = T. Inputs and outputs bf16, fp16 or fp32; softmax in fp32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_kernels.dropout_mask import ATTENTION, check_dropout, keep_mask_reference, keep_scale, keep_threshold

# Sequences whose length is at least this fraction of the longest of their group are padded to it and done together.
_MIN_FILL = 0.85


def attention_reference(
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
    """Return attention's output (T, H, K) in the dtype of qkv_T3HK.

    Args:
        qkv_T3HK: queries, keys and values (T, 3, H, K).
        cu_seqlens: int32 (N + 1), start of each sequence and T; empty sequences are allowed.
        max_seqlen: at least the longest length (not needed here, the kernels' grid needs it).
        dropout_p: probability in [0, 1), rounded to 1/256; mask as in `dropout_mask`.
        softmax_scale: factor of the scores, 1/sqrt(K) where None.
        window: keys at most this many positions away are seen, all where None.
    """
    check_dropout(dropout_p, dropout_seed, qkv_T3HK.device)
    scale = softmax_scale if softmax_scale is not None else qkv_T3HK.shape[-1] ** -0.5
    parts, index = [], []
    for starts, lengths in _groups(cu_seqlens):
        size = lengths[0]
        offsets = torch.tensor(starts, device=qkv_T3HK.device)[:, None] + torch.arange(size, device=qkv_T3HK.device)
        if min(lengths) < size:
            limits = torch.tensor(lengths, device=qkv_T3HK.device)
            key_mask_NS = torch.arange(size, device=qkv_T3HK.device) < limits[:, None]
            offsets = torch.where(key_mask_NS, offsets, offsets[:, :1])
        else:
            key_mask_NS = None
        mask = _score_mask(key_mask_NS, size, window, qkv_T3HK.device)
        q, k, v = qkv_T3HK[offsets].permute(2, 0, 3, 1, 4).unbind(0)
        if keep_threshold(dropout_p) == 256:
            out_NHSK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        else:
            assert dropout_seed is not None
            heads = torch.arange(q.shape[1], device=q.device)[:, None]
            keep = keep_mask_reference(
                offsets[:, None],
                size,
                dropout_p=dropout_p,
                dropout_seed=dropout_seed,
                site=site,
                heads=heads,
                layout=ATTENTION,
            )
            out_NHSK = _softmax_dropout(q, k, v, mask, keep, scale, keep_scale(dropout_p))
        out_NSHK = out_NHSK.transpose(1, 2)
        parts.append(out_NSHK.flatten(0, 1) if key_mask_NS is None else out_NSHK[key_mask_NS])
        index.append(offsets.flatten() if key_mask_NS is None else offsets[key_mask_NS])
    if not parts:
        return qkv_T3HK[:, 0] * 0
    # Each packed token is in exactly one group, so the inverse permutation puts the rows back.
    return torch.cat(parts)[torch.argsort(torch.cat(index))]


def _groups(cu_seqlens: Tensor) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (starts, lengths) of non-empty sequences of similar length, longest first."""
    bounds = cu_seqlens.tolist()
    spans = sorted(((stop - start, start) for start, stop in itertools.pairwise(bounds)), reverse=True)
    starts: list[int] = []
    lengths: list[int] = []
    for length, start in spans:
        if lengths and (length < _MIN_FILL * lengths[0] or length == 0):
            yield starts, lengths
            starts, lengths = [], []
        if length == 0:
            break
        starts.append(start)
        lengths.append(length)
    if lengths:
        yield starts, lengths


def _score_mask(key_mask_NS: Tensor | None, size: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return True where a key is seen, broadcastable to (N, H, S, S), or None where all are."""
    mask = None if key_mask_NS is None else key_mask_NS[:, None, None, :]
    if window is None:
        return mask
    position = torch.arange(size, device=device)
    near = (position[:, None] - position).abs() <= window
    # A padded query may have no key at all inside its window; it sees itself so that no row is empty.
    return near if mask is None else near & (mask | torch.eye(size, dtype=torch.bool, device=device))


def _softmax_dropout(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keep: Tensor, scale: float, scale_kept: float
) -> Tensor:
    scores = (q @ k.transpose(-2, -1)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    p = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    return (p * keep) @ v * scale_kept


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
    """Not written yet: use attention_reference."""
    raise NotImplementedError("attention has no Triton kernel yet; choose the torch operators")
