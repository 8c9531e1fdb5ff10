"""Attention over packed sequences in plain torch: what `attention` is compared with, and what computes on a CPU.

Sequences of similar length are padded to the longest of them and done together. Those that fit as a whole are one
function with a gradient of its own, or torch's attention where that is faster: autograd would keep more, and add up the
gradients of all groups in tensors of the whole stream. Letters as in `attention`; R rows of queries, C columns of keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from bert_kernels.dropout_mask import ATTENTION, check_dropout, keep_mask_reference, keep_scale

# Sequences whose length is at least this fraction of the longest of their group are padded to it and done together,
_MIN_FILL = 0.85
# and so is any while the scores of a group that nothing is made of are at most these: a group costs as much by itself.
_FEW_SCORES = 1 << 17
# Longer sequences are done in blocks of queries, each with as many scores as a whole sequence of this length has.
_WHOLE_LENGTH = 1024
# Queries of a block in a window, at least.
_MIN_WINDOW_ROWS = 128
# torch's own attention on a CPU is faster in fp32 from this length on, 3 times forward at 512; in bf16, where its
# backward is slow, it is half as fast at any length.
_SDPA_LENGTH = 96


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
    keep = None
    if dropout_p:
        check_dropout(dropout_p, dropout_seed, qkv_T3HK.device)
        keep = _Dropout(dropout_p, dropout_seed, site)
    scale = softmax_scale if softmax_scale is not None else qkv_T3HK.shape[-1] ** -0.5
    has_sdpa = qkv_T3HK.dtype == torch.float32 and qkv_T3HK.device.type == "cpu" and keep is None
    whole: list[_Group] = []
    others: list[tuple[_Group, Callable[[Tensor, _Group], Tensor]]] = []
    for starts, lengths in _groups(cu_seqlens):
        size = lengths[0]
        group = _Group(*_token_grid(starts, lengths, qkv_T3HK.device), scale, window, keep)
        is_whole = _rows_together(size, window) == size
        if has_sdpa and size >= _SDPA_LENGTH and (is_whole or window is None):
            others.append((group, _by_sdpa))
        elif is_whole:
            whole.append(group)
        else:
            others.append((group, _in_blocks))
    if len(others) == 1 and not whole and others[0][0].first == 0:
        group, way = others[0]
        return way(qkv_T3HK, group)
    out_THK = _Whole.apply(qkv_T3HK, whole)
    for group, way in others:
        rows_P, inside_P = _real_places(group)
        out_PHK = way(qkv_T3HK, group)
        out_THK = out_THK.index_copy(0, rows_P, out_PHK if inside_P is None else out_PHK.index_select(0, inside_P))
    return out_THK if keep is None else out_THK * keep_scale(dropout_p)


class _Dropout(NamedTuple):
    dropout_p: float
    seed: Tensor | None
    site: int


class _Group(NamedTuple):
    """Sequences of similar length, padded to the longest, and how they are attended to."""

    offsets_NS: Tensor
    key_mask_NS: Tensor | None
    first: int | None
    """Where the group begins in the stream, if it is a stretch of it without padding."""
    scale: float
    window: int | None
    dropout: _Dropout | None


class _Block(NamedTuple):
    """Queries begin .. end - 1 of a padded group, and the keys that any of them sees."""

    begin: int
    end: int
    first_key: int
    last_key: int


class _Whole(torch.autograd.Function):
    """Attention of groups that are done as a whole; tokens of no group get zeros. Kept values are not scaled yet."""

    @staticmethod
    def forward(ctx: Any, qkv_T3HK: Tensor, groups: list[_Group]) -> Tensor:
        num_tokens, _, num_heads, head_dim = qkv_T3HK.shape
        out_THK, saved = qkv_T3HK.new_zeros(num_tokens, num_heads, head_dim), []
        for group in groups:
            q_BSK, k_BSK, v_BSK = _by_head(qkv_T3HK, group)
            q_BSK.mul_(group.scale)
            size = q_BSK.shape[1]
            # Written out rather than scaled_dot_product_attention: its CPU backward is 3 times slower in bf16.
            scores_NHSS = torch.bmm(q_BSK, k_BSK.mT).view(-1, num_heads, size, size)
            block = _Block(0, size, 0, size)
            if (bias := _score_bias(group, block, q_BSK)) is not None:
                scores_NHSS += bias
            p_NHSS = torch.softmax(scores_NHSS, dim=-1)
            kept_NHSS = _kept(group, block, q_BSK, num_heads)
            dropped_BSS = (p_NHSS if kept_NHSS is None else p_NHSS * kept_NHSS).flatten(0, 1)
            out_BSK = torch.bmm(dropped_BSS, v_BSK)
            _put(out_THK, out_BSK.view(-1, num_heads, size, head_dim).transpose(1, 2), group)
            saved += [q_BSK, k_BSK, v_BSK, p_NHSS.flatten(0, 1), kept_NHSS]
        ctx.save_for_backward(*saved)
        ctx.groups, ctx.shape = groups, qkv_T3HK.shape
        return out_THK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THK: Tensor) -> tuple[Tensor, None]:
        dqkv_T3HK, saved = dout_THK.new_zeros(ctx.shape), iter(ctx.saved_tensors)
        for group in ctx.groups:
            q_BSK, k_BSK, v_BSK, p_BSS, kept_NHSS = itertools.islice(saved, 5)
            dout_BSK = _by_head(dout_THK[:, None], group, is_padding_zero=True)[0]
            d_3BSK = dout_BSK.new_empty(3, *dout_BSK.shape)
            dropped_BSS = p_BSS if kept_NHSS is None else p_BSS * kept_NHSS.flatten(0, 1)
            torch.bmm(dropped_BSS.mT, dout_BSK, out=d_3BSK[2])
            dp_BSS = torch.bmm(dout_BSK, v_BSK.mT)
            if kept_NHSS is not None:
                dp_BSS *= kept_NHSS.flatten(0, 1)
            dscores_BSS = torch.ops.aten._softmax_backward_data(dp_BSS, p_BSS, -1, p_BSS.dtype)
            torch.bmm(dscores_BSS, k_BSK, out=d_3BSK[0])
            d_3BSK[0] *= group.scale
            torch.bmm(dscores_BSS.mT, q_BSK, out=d_3BSK[1])
            d_3NHSK = d_3BSK.view(3, *group.offsets_NS.shape[:1], -1, *d_3BSK.shape[2:])
            _put(dqkv_T3HK, d_3NHSK.permute(1, 3, 0, 2, 4), group)
        return dqkv_T3HK, None


def _by_head(x_TPHK: Tensor, group: _Group, *, is_padding_zero: bool = False) -> Tensor:
    """Return (P, N H, S, K) of a stream (T, P, H, K), a tensor of its own; padding is a row of it, or zero."""
    x_NSPHK = _padded(x_TPHK, group)
    if is_padding_zero and group.key_mask_NS is not None:
        x_NSPHK.masked_fill_(~group.key_mask_NS[:, :, None, None, None], 0.0)
    return x_NSPHK.permute(2, 0, 3, 1, 4).contiguous().flatten(1, 2)


def _padded(x_TPHK: Tensor, group: _Group) -> Tensor:
    """Return (N, S, P, H, K) of a stream (T, P, H, K): a view of it where it is a stretch."""
    places = (*group.offsets_NS.shape, *x_TPHK.shape[1:])
    if group.first is not None:
        return x_TPHK.narrow(0, group.first, group.offsets_NS.numel()).view(places)
    return x_TPHK.index_select(0, group.offsets_NS.flatten()).view(places)


def _put(stream: Tensor, padded: Tensor, group: _Group) -> None:
    """Write (N, S, ...) to its rows of a stream (T, ...)."""
    if group.first is not None:
        stream.narrow(0, group.first, group.offsets_NS.numel()).view(padded.shape).copy_(padded)
        return
    rows_P, inside_P = _real_places(group)
    flat = padded.reshape(-1, *stream.shape[1:])
    stream.index_copy_(0, rows_P, flat if inside_P is None else flat.index_select(0, inside_P))


def _real_places(group: _Group) -> tuple[Tensor, Tensor | None]:
    """Return the rows of the stream that a group holds, and where they lie among its places (None: one by one)."""
    rows = group.offsets_NS.flatten()
    if group.key_mask_NS is None:
        return rows, None
    inside_P = group.key_mask_NS.flatten().nonzero().squeeze(1)
    return rows[inside_P], inside_P


def _by_sdpa(qkv_T3HK: Tensor, group: _Group) -> Tensor:
    """Return the output (N S, H, K) of one padded group, by torch's own attention."""
    q_NHSK, k_NHSK, v_NHSK = _padded(qkv_T3HK, group).permute(2, 0, 3, 1, 4).unbind(0)
    size = q_NHSK.shape[2]
    bias = _score_bias(group, _Block(0, size, 0, size), q_NHSK)
    out_NHSK = F.scaled_dot_product_attention(q_NHSK, k_NHSK, v_NHSK, attn_mask=bias, scale=group.scale)
    return out_NHSK.transpose(1, 2).flatten(0, 1)


def _in_blocks(qkv_T3HK: Tensor, group: _Group) -> Tensor:
    """Return the output (N S, H, K) of one padded group, by blocks of queries; kept values are not scaled yet."""
    size = group.offsets_NS.shape[1]
    q, k, v = _padded(qkv_T3HK, group).permute(2, 0, 3, 1, 4).unbind(0)
    rows = _rows_together(size, group.window)
    # Scores in a window are linear in the tokens anyway; those of everything are made again rather than kept.
    is_made_again = group.window is None and torch.is_grad_enabled()
    parts = []
    for q_NHRK, begin in zip(q.split(rows, dim=2), range(0, size, rows), strict=True):
        end, reach = min(begin + rows, size), size if group.window is None else group.window
        block = _Block(begin, end, max(0, begin - reach), min(size, end + reach))
        keys = slice(block.first_key, block.last_key)
        arguments = (q_NHRK, k[:, :, keys], v[:, :, keys], group, block)
        if is_made_again:
            parts.append(checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_attend(*arguments))
    return torch.cat(parts, dim=2).transpose(1, 2).flatten(0, 1)


def _rows_together(size: int, window: int | None) -> int:
    """Return how many queries are done at once: all of a short sequence, of a long one as many as memory has room for.

    In a window a block must pay: it is at most half of the work of doing all at once.
    """
    if window is None:
        return size if size <= _WHOLE_LENGTH else max(1, _WHOLE_LENGTH**2 // size)
    rows = max(_MIN_WINDOW_ROWS, 2 * window)
    return rows if size >= 2 * (rows + 2 * window) else size


def _attend(q_NHRK: Tensor, k_NHCK: Tensor, v_NHCK: Tensor, group: _Group, block: _Block) -> Tensor:
    """Return the output (N, H, R, K) of R queries over C keys."""
    bias = _score_bias(group, block, q_NHRK)
    scores_NHRC = (q_NHRK * group.scale) @ k_NHCK.transpose(-2, -1)
    p_NHRC = torch.softmax(scores_NHRC if bias is None else scores_NHRC + bias, dim=-1)
    kept_NHRC = _kept(group, block, q_NHRK, q_NHRK.shape[1])
    return (p_NHRC if kept_NHRC is None else p_NHRC * kept_NHRC) @ v_NHCK


def _kept(group: _Group, block: _Block, q: Tensor, num_heads: int) -> Tensor | None:
    """Return 1 where a score is kept, uint8 (N, H, R, C), by which torch multiplies faster; None without dropout."""
    if (dropout := group.dropout) is None:
        return None
    assert dropout.seed is not None
    keep = keep_mask_reference(
        group.offsets_NS[:, None, block.begin : block.end],
        block.last_key,
        dropout_p=dropout.dropout_p,
        dropout_seed=dropout.seed,
        site=dropout.site,
        heads=torch.arange(num_heads, device=q.device)[:, None],
        layout=ATTENTION,
    )
    return keep[..., block.first_key :].view(torch.uint8)


def _token_grid(
    starts: list[int], lengths: list[int], device: torch.device
) -> tuple[Tensor, Tensor | None, int | None]:
    """Return the packed index (N, S) of each place of a padded group, where it is real, and where a stretch begins.

    A place beyond the end of its sequence points to the first token of that sequence. The mask is None where all are
    real, the begin where they do not follow one another.
    """
    size = lengths[0]
    position = torch.arange(size, device=device)
    offsets_NS = torch.tensor(starts, device=device)[:, None] + position
    if min(lengths) == size:
        is_stretch = all(after - before == size for before, after in itertools.pairwise(starts))
        return offsets_NS, None, starts[0] if is_stretch else None
    mask_NS = position < torch.tensor(lengths, device=device)[:, None]
    return torch.where(mask_NS, offsets_NS, offsets_NS[:, :1]), mask_NS, None


def _groups(cu_seqlens: Tensor) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (starts, lengths) of non-empty sequences of similar length, longest first."""
    bounds = cu_seqlens.tolist()
    spans = ((stop - start, start) for start, stop in itertools.pairwise(bounds))
    longest_first = sorted(spans, key=lambda span: (-span[0], span[1]))
    starts: list[int] = []
    lengths: list[int] = []
    wasted = 0
    for length, start in longest_first:
        wasted += lengths[0] ** 2 - length**2 if lengths else 0
        if lengths and ((length < _MIN_FILL * lengths[0] and wasted > _FEW_SCORES) or length == 0):
            yield starts, lengths
            starts, lengths, wasted = [], [], 0
        if length == 0:
            break
        starts.append(start)
        lengths.append(length)
    if lengths:
        yield starts, lengths


def _score_bias(group: _Group, block: _Block, q: Tensor) -> Tensor | None:
    """Return 0 where a key is seen and -inf elsewhere, broadcastable to (N, H, R, C); None where all are seen."""
    seen = None if group.key_mask_NS is None else group.key_mask_NS[:, None, None, block.first_key : block.last_key]
    if group.window is not None:
        rows = torch.arange(block.begin, block.end, device=q.device)[:, None]
        distance = (rows - torch.arange(block.first_key, block.last_key, device=q.device)).abs()
        near = distance <= group.window
        # A padded query may have no key at all inside its window; it sees itself so that no row is empty.
        seen = near if seen is None else near & (seen | (distance == 0))
    if seen is None:
        return None
    return torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, float("-inf"))
