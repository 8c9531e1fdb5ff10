"""The one definition of the dropout masks: counter-based, so that any tile size and any recomputation agree.

One Philox 4x32 call gives 16 bytes, for 16 elements of head h and site s:

    counter = (call(j), row(t), h, s)      key = (low 32 bits of the seed, high 32 bits of the seed)
    byte of element (t, j) = byte number byte(t, j) of the four output words, in little-endian order
    keep iff byte < keep_threshold(p) = round((1 - p) * 256);  kept values are scaled by 256 / keep_threshold(p)

Which 16 elements share a call is chosen so that they lie in one thread's registers and no mask passes through shared
memory:

    ATTENTION: two neighbours of every eight columns in a block of 64, as a tensor-core accumulator spreads a row over
    four threads: row(t) = t, call(j) = 4 (j // 64) + (j % 8) // 2, byte(t, j) = 2 (j % 64 // 8) + j % 2
    HIDDEN: eight columns of a pair of rows, as a thread that owns whole columns reads them in 16-byte vectors:
    row(t) = t // 2, call(j) = j // 8, byte(t, j) = 8 (t % 2) + j % 8, h = 0

By instruction count for sm_90 the ATTENTION mask costs 5.8 per score element, 11.2 with 16 neighbours per call.

The scale is the inverse of the probability that is really drawn, so the expectation is exact although p is rounded to
1/256. The number of rounds is 7, the fewest that pass BigCrush (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC11, table 2).

For a hidden tensor row t is the packed token, h is 0. For attention t is the packed query token, column j the position
of the key inside its sequence, h the head. The site tells the places of one model apart; the seed tells the rank, the
step and the micro-step apart.
"""

from __future__ import annotations

from enum import Enum

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_kernels._philox import KEY_STEPS, LOW_32, MULTIPLIERS, NUM_ROUNDS

try:
    from bert_kernels import _philox_numpy
except ImportError:  # torch does without numpy
    _philox_numpy = None  # type: ignore[assignment]


class MaskLayout(Enum):
    """Which 16 elements share one Philox call."""

    ATTENTION = 1
    HIDDEN = 2


ATTENTION, HIDDEN = MaskLayout.ATTENTION, MaskLayout.HIDDEN


def keep_threshold(dropout_p: float) -> int:
    """Return how many of the 256 byte values keep an element: 256 for no dropout.

    Raises:
        ValueError: dropout_p is outside [0, 1), or so near to 0 or 1 that no byte value tells it apart.
    """
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    threshold = round((1.0 - dropout_p) * 256)
    if threshold == 0 or (threshold == 256 and dropout_p > 0.0):
        raise ValueError(f"dropout_p {dropout_p} is nearer to 0 or 1 than the mask's resolution of 1/256 can tell")
    return threshold


def keep_scale(dropout_p: float) -> float:
    """Return the factor of kept values, the inverse of the probability with which they are really kept."""
    return 256.0 / keep_threshold(dropout_p)


def check_dropout(dropout_p: float, dropout_seed: Tensor | None, device: torch.device) -> None:
    """Raise ValueError unless the seed that this dropout_p needs is there: an int64 tensor of shape [1] on `device`."""
    if keep_threshold(dropout_p) == 256:
        return
    if dropout_seed is None:
        raise ValueError(f"dropout_p is {dropout_p} but dropout_seed is None: give an int64 tensor of shape [1]")
    if dropout_seed.dtype != torch.int64 or dropout_seed.numel() != 1:
        found = f"{dropout_seed.dtype} of shape {list(dropout_seed.shape)}"
        raise ValueError(f"dropout_seed must be torch.int64 of shape [1], got {found}")
    if dropout_seed.device != device:
        raise ValueError(f"dropout_seed is on {dropout_seed.device}, the input on {device}: put both on one device")


def philox_words(counters: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor, num_rounds: int = NUM_ROUNDS) -> Tensor:
    """Return the four output words of Philox 4x32 as int64 values in [0, 2^32).

    Args:
        counters: four int64 tensors of the same shape (...), values in [0, 2^32), overwritten where that saves memory.
        seed: int64 of shape [1].

    Returns:
        int64 (4, ...).
    """
    key_0, key_1 = seed & LOW_32, (seed >> 32) & LOW_32
    c0, c1, c2, c3 = counters
    for step in range(num_rounds):
        # The products wrap to a negative int64; the final mask of a word removes what the sign extension brought.
        product_a, product_b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (product_b >> 32).bitwise_xor_(c1).bitwise_xor_(key_0).bitwise_and_(LOW_32)
        c2 = (product_a >> 32).bitwise_xor_(c3).bitwise_xor_(key_1).bitwise_and_(LOW_32)
        c1, c3 = product_b, product_a
        if step + 1 < num_rounds:
            key_0, key_1 = (key_0 + KEY_STEPS[0]) & LOW_32, (key_1 + KEY_STEPS[1]) & LOW_32
    return torch.stack((c0, c1 & LOW_32, c2, c3 & LOW_32))


def keep_mask_reference(
    rows: Tensor,
    num_columns: int,
    *,
    dropout_p: float,
    dropout_seed: Tensor,
    site: int,
    heads: Tensor | None = None,
    layout: MaskLayout = HIDDEN,
) -> Tensor:
    """Return True where an element is kept.

    Args:
        rows: int64 (...), packed token index of each row.
        num_columns: columns 0 .. num_columns - 1 of each row are drawn.
        dropout_p: probability in [0, 1) of being dropped, rounded to 1/256.
        dropout_seed: int64 of shape [1].
        site: which dropout of the model this is, in [0, 2^32).
        heads: int64 broadcastable with rows, None for 0 (as it must be for HIDDEN).
        layout: ATTENTION for attention probabilities, HIDDEN for hidden tensors.

    Returns:
        bool (..., num_columns), of the broadcast shape of rows and heads.
    """
    if layout is HIDDEN:
        num_rows = int(rows.max()) + 1 if rows.numel() else 0
        return hidden_keep_mask(num_rows, num_columns, dropout_p=dropout_p, dropout_seed=dropout_seed, site=site)[rows]
    rows, heads = torch.broadcast_tensors(rows, torch.zeros_like(rows) if heads is None else heads)
    num_blocks = -(-num_columns // 64)
    bytes_kept = _bytes_kept(rows.reshape(-1), heads.reshape(-1), 4 * num_blocks, dropout_p, dropout_seed, site)
    # (block, lane, place of eight, pair of neighbours) -> (block, place, lane, pair); a pair moves as one number.
    by_lane = bytes_kept.view(torch.int16).view(-1, num_blocks, 4, 8)
    keep = (
        by_lane.transpose(2, 3)
        .clone(memory_format=torch.contiguous_format)
        .view(torch.bool)
        .view(rows.numel(), 64 * num_blocks)
    )
    return keep[:, :num_columns].reshape(*rows.shape, num_columns)


def hidden_keep_mask(num_rows: int, num_columns: int, *, dropout_p: float, dropout_seed: Tensor, site: int) -> Tensor:
    """Return the mask of layout HIDDEN for rows 0 .. num_rows - 1: bool (num_rows, num_columns)."""
    check_dropout(dropout_p, dropout_seed, dropout_seed.device)
    if _numpy_draws(dropout_seed):
        how = {"seed": int(dropout_seed), "site": site, "num_threads": torch.get_num_threads()}
        drawn = _philox_numpy.hidden_bytes(num_rows, num_columns, **how)
        return torch.from_numpy(drawn < keep_threshold(dropout_p))
    pairs = torch.arange((num_rows + 1) // 2, device=dropout_seed.device)
    num_calls = -(-num_columns // 8)
    bytes_kept = _bytes_kept(pairs, torch.zeros_like(pairs), num_calls, dropout_p, dropout_seed, site)
    # (pair, call, row of the pair, eight columns) -> (pair, row, call, eight columns); eight move as one number.
    by_row = (
        bytes_kept.view(torch.int64).view(-1, num_calls, 2).transpose(1, 2).clone(memory_format=torch.contiguous_format)
    )
    return by_row.view(torch.bool).view(-1, 8 * num_calls)[:num_rows, :num_columns]


def _numpy_draws(seed: Tensor) -> bool:
    """Whether masks are drawn by numpy: not where tensors have no data, as in a graph that is being compiled."""
    return (
        _philox_numpy is not None
        and seed.device.type == "cpu"
        and type(seed) is Tensor
        and not torch.compiler.is_compiling()
    )


def _bytes_kept(rows: Tensor, heads: Tensor, num_calls: int, dropout_p: float, seed: Tensor, site: int) -> Tensor:
    """Return which bytes of calls 0 .. num_calls - 1 of each row are kept: bool (rows, 16 num_calls)."""
    check_dropout(dropout_p, seed, rows.device)
    if _numpy_draws(seed):
        how = {"seed": int(seed), "site": site, "num_threads": torch.get_num_threads()}
        drawn = _philox_numpy.bytes_of_calls(rows.numpy(), heads.numpy(), num_calls, **how)
        return torch.from_numpy(drawn < keep_threshold(dropout_p)).flatten(1)
    calls = torch.arange(num_calls, device=rows.device)
    return _bytes_of_calls(calls, rows, heads, seed, site) < keep_threshold(dropout_p)


def _bytes_of_calls(calls: Tensor, rows: Tensor, heads: Tensor, seed: Tensor, site: int) -> Tensor:
    """Return the 16 bytes of each of the calls of each row: uint8 (rows, 16 calls)."""
    counters = torch.broadcast_tensors(calls, rows[:, None], heads[:, None], torch.full_like(calls, site))
    # int64 -> int32 keeps the low 32 bits; their four bytes in memory order are the little-endian ones.
    words = philox_words(counters, seed).to(torch.int32).permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
    return words.view(torch.uint8).flatten(1)


def dropout_reference(
    x: Tensor, *, dropout_p: float, dropout_seed: Tensor | None, site: int, residual: Tensor | None = None
) -> Tensor:
    """Return dropout(x), plus the residual where one is given, for hidden tensors x (rows, columns) in x's dtype."""
    check_dropout(dropout_p, dropout_seed, x.device)
    if keep_threshold(dropout_p) == 256:
        return x if residual is None else residual + x
    assert dropout_seed is not None
    keep = hidden_keep_mask(x.shape[0], x.shape[1], dropout_p=dropout_p, dropout_seed=dropout_seed, site=site)
    keep = keep.view(torch.uint8)  # which torch multiplies and converts three times as fast
    # The scale stays a Python number: as a bf16 tensor it would be off by up to 0.2 %.
    if residual is None:
        return x * keep * keep_scale(dropout_p)
    return torch.addcmul(residual, x, keep.to(x.dtype), value=keep_scale(dropout_p))


@triton.jit
def _philox_tile(seed, rows, head, site, first_call, NUM_CALLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the words of NUM_CALLS calls of each row, from first_call on: uint32 (rows, NUM_CALLS, 2, 2)."""
    zero = tl.zeros([rows.shape[0], NUM_CALLS], tl.int32)
    calls = first_call + tl.arange(0, NUM_CALLS)
    w0, w1, w2, w3 = tl.philox(seed, zero + calls[None, :], zero + rows[:, None], zero + head, zero + site, 7)
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def keep_attention_tile(seed, rows, head, site, first_column, THRESHOLD: tl.constexpr, NUM_COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the keep mask (rows, NUM_COLUMNS) of layout ATTENTION; columns in multiples of 64."""
    M: tl.constexpr = rows.shape[0]
    words = _philox_tile(seed, rows, head, site, first_column // 16, NUM_COLUMNS // 16)
    # (block, lane, word) -> (block, word, half word, lane, neighbour), the order of the columns.
    words = words.reshape(M, NUM_COLUMNS // 64, 4, 4).permute(0, 1, 3, 2).reshape(M, NUM_COLUMNS // 16, 1, 4, 1)
    # The byte goes to the top of its word: there one comparison tells it, whatever the bytes below.
    shift = 24 - 8 * tl.arange(0, 4).reshape(1, 1, 2, 1, 2)
    return (words << shift.to(tl.uint32)).reshape(M, NUM_COLUMNS) < (THRESHOLD << 24)


@triton.jit
def keep_hidden_tile(seed, first_row, site, THRESHOLD: tl.constexpr, NUM_ROWS: tl.constexpr, NUM_COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the keep mask (NUM_ROWS, NUM_COLUMNS) of layout HIDDEN from an even row on; columns in multiples of 8."""
    pairs = (first_row // 2).to(tl.int32) + tl.arange(0, NUM_ROWS // 2)
    words = _philox_tile(seed, pairs, 0, site, 0, NUM_COLUMNS // 8)
    # (pair, call, row of the pair, word of the row) -> (pair, row, call, word), the order of the elements.
    words = words.permute(0, 2, 1, 3).reshape(NUM_ROWS, NUM_COLUMNS // 4, 1)
    shift = 24 - 8 * tl.arange(0, 4).reshape(1, 1, 4)
    return (words << shift.to(tl.uint32)).reshape(NUM_ROWS, NUM_COLUMNS) < (THRESHOLD << 24)
