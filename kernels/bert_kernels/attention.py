"""Bidirectional attention over packed sequences of different lengths, with dropout of the probabilities.

    p = softmax(softmax_scale * q k^T) over the keys of the same sequence (those at most `window` away, where given)
    out = dropout(p) v

Letters: T tokens of all sequences, N sequences, H heads, K head dim, S length. cu_seqlens[i] is where sequence i
starts in T, cu_seqlens[N] = T. Inputs and outputs bf16, fp16 or fp32; softmax in fp32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bert_kernels._launch import check_device, values_at_hand
from bert_kernels._operator import operator
from bert_kernels.attention_kernels import AttentionCall, attention_backward, attention_forward
from bert_kernels.dropout_mask import ATTENTION, check_dropout, keep_mask_reference, keep_scale, keep_threshold

MAX_HEAD_DIM = 128
# Offsets inside a sequence are 32 bits; a block may reach 128 rows beyond the end before it is masked.
_MOST_ELEMENTS = (1 << 31) - (1 << 24)

# Sequences whose length is at least this fraction of the longest of their group are padded to it and done together.
_MIN_FILL = 0.85
# Longer sequences are done in blocks of queries, each with as many scores as a whole sequence of this length has.
_WHOLE_LENGTH = 1024
# Queries of a block in a window, at least.
_MIN_WINDOW_ROWS = 128


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
    parts, index = [], []
    for starts, lengths in _groups(cu_seqlens):
        offsets_NS, key_mask_NS = _token_grid(starts, lengths, qkv_T3HK.device)
        out_PHK = _padded_attention(qkv_T3HK, _Group(offsets_NS, key_mask_NS, scale, window, keep))
        rows = offsets_NS.flatten()
        if key_mask_NS is not None:
            inside = key_mask_NS.flatten().nonzero().squeeze(1)
            out_PHK, rows = out_PHK.index_select(0, inside), rows[inside]
        parts.append(out_PHK)
        index.append(rows)
    if not parts:
        return qkv_T3HK[:, 0] * 0
    # Each packed token is in exactly one group, so the inverse permutation puts the rows back.
    out_THK = torch.cat(parts).index_select(0, torch.argsort(torch.cat(index)))
    return out_THK if keep is None else out_THK * keep_scale(dropout_p)


class _Dropout(NamedTuple):
    dropout_p: float
    seed: Tensor | None
    site: int


class _Group(NamedTuple):
    """Sequences of similar length, padded to the longest, and how they are attended to."""

    offsets_NS: Tensor
    key_mask_NS: Tensor | None
    scale: float
    window: int | None
    dropout: _Dropout | None


class _Block(NamedTuple):
    """Queries begin .. end - 1 of a padded group, and the keys that any of them sees."""

    begin: int
    end: int
    first_key: int
    last_key: int


def _padded_attention(qkv_T3HK: Tensor, group: _Group) -> Tensor:
    """Return the output (N S, H, K) of one padded group; kept values are not scaled yet."""
    size = group.offsets_NS.shape[1]
    grid = (*group.offsets_NS.shape, *qkv_T3HK.shape[1:])
    q, k, v = qkv_T3HK.index_select(0, group.offsets_NS.flatten()).view(grid).permute(2, 0, 3, 1, 4).unbind(0)
    rows = _rows_together(size, group.window)
    if rows == size:  # no slices, whose gradients are tensors of zeros
        return _attend(q, k, v, group, _Block(0, size, 0, size)).transpose(1, 2).flatten(0, 1)
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
    # Written out rather than scaled_dot_product_attention: its CPU backward is 3 times slower in bf16.
    scores_NHRC = (q_NHRK * group.scale) @ k_NHCK.transpose(-2, -1)
    p_NHRC = torch.softmax(scores_NHRC if bias is None else scores_NHRC + bias, dim=-1)
    if (dropout := group.dropout) is not None:
        assert dropout.seed is not None
        kept_NHRC = keep_mask_reference(
            group.offsets_NS[:, None, block.begin : block.end],
            block.last_key,
            dropout_p=dropout.dropout_p,
            dropout_seed=dropout.seed,
            site=dropout.site,
            heads=torch.arange(q_NHRK.shape[1], device=q_NHRK.device)[:, None],
            layout=ATTENTION,
        )[..., block.first_key :]
        p_NHRC = p_NHRC * kept_NHRC
    return p_NHRC @ v_NHCK


def _token_grid(starts: list[int], lengths: list[int], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return the packed index (N, S) of each place of a padded group, and where it is real (None: everywhere).

    A place beyond the end of its sequence points to the first token of that sequence.
    """
    position = torch.arange(lengths[0], device=device)
    offsets_NS = torch.tensor(starts, device=device)[:, None] + position
    if min(lengths) == lengths[0]:
        return offsets_NS, None
    mask_NS = position < torch.tensor(lengths, device=device)[:, None]
    return torch.where(mask_NS, offsets_NS, offsets_NS[:, :1]), mask_NS


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
