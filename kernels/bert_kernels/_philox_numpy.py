"""Philox of `dropout_mask` on a CPU by numpy: the same words by half the operations, each of a third of the cost.

Of the counter (call, row, head, site) the call is the same in every row, and row, head and site in every call of one.
So the first round is one of vectors, the second of vectors and one xor of everything. numpy has unsigned 64-bit
integers: a product is two words, and nothing has to be repaired behind a shift. Letters: R rows, C calls, L sites; a
pair of words is (0, 2), or (3, 1) as a pair of products leaves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np

from bert_kernels._drawn_ahead import DrawnAhead
from bert_kernels._philox import KEY_STEPS, LOW_32, MULTIPLIERS, NUM_ROUNDS

# Calls done together: few enough for the work arrays to stay in the cache of a core.
_CALLS_PER_CHUNK = 8192
# Chunks that take longer than threads to start.
_PARTS_FOR_THREADS = 8
# Calls of a mask that is small.
_FEW_CALLS = 16384
_WORD = np.uint64(32)
_LOW = np.uint64(LOW_32)
_FIRST, _SECOND = (np.uint64(multiplier) for multiplier in MULTIPLIERS)
_BOTH_2111 = np.array(MULTIPLIERS, dtype=np.uint64)[:, None, None, None]
_ahead = DrawnAhead()


def bytes_of_calls(
    rows_R: np.ndarray, heads_R: np.ndarray, num_calls: int, *, seed: int, site: int, num_threads: int
) -> np.ndarray:
    """Return the 16 bytes of calls 0 .. num_calls - 1 of each row of a head: uint8 (R, C, 16)."""

    def draw(sites: Sequence[int]) -> np.ndarray:
        words_LRC22 = np.empty((len(sites), len(rows_R), num_calls, 2, 2), np.uint32)
        places = rows_R.astype(np.uint64)[:, None], heads_R.astype(np.uint64)[:, None]
        _draw(words_LRC22.transpose(3, 0, 1, 2, 4), *places, seed=seed, sites=sites, num_threads=num_threads)
        return words_LRC22.view(np.uint8).reshape(len(sites), len(rows_R), num_calls, 16)

    if len(rows_R) * num_calls > _FEW_CALLS:
        return draw([site])[0]
    return _ahead.take(seed, site, (rows_R.tobytes(), heads_R.tobytes(), num_calls), draw)


def hidden_bytes(num_rows: int, num_columns: int, *, seed: int, site: int, num_threads: int) -> np.ndarray:
    """Return the bytes of layout HIDDEN: uint8 (num_rows, num_columns)."""
    num_pairs, num_calls = (num_rows + 1) // 2, -(-num_columns // 8)

    def draw(sites: Sequence[int]) -> np.ndarray:
        # The words of a call lie in two rows: (site, pair, row of the pair, call, word of the row).
        words_LR2C2 = np.empty((len(sites), num_pairs, 2, num_calls, 2), np.uint32)
        places = np.arange(num_pairs, dtype=np.uint64)[:, None], np.zeros((num_pairs, 1), np.uint64)
        _draw(words_LR2C2.transpose(2, 0, 1, 3, 4), *places, seed=seed, sites=sites, num_threads=num_threads)
        return words_LR2C2.view(np.uint8).reshape(len(sites), 2 * num_pairs, 8 * num_calls)

    if num_pairs * num_calls > _FEW_CALLS:
        drawn = draw([site])[0]
    else:
        drawn = _ahead.take(seed, site, (num_pairs, num_calls), draw)
    return drawn[:num_rows, :num_columns]


def _draw(
    out_2LRC2: np.ndarray,
    rows_R1: np.ndarray,
    heads_R1: np.ndarray,
    *,
    seed: int,
    sites: Sequence[int],
    num_threads: int,
) -> None:
    """Write words (0, 1) and (2, 3) of every call, uint32, in threads where they are many."""
    sites_L11 = np.array(sites, dtype=np.uint64)[:, None, None]
    size = max(1, _CALLS_PER_CHUNK // max(1, len(sites) * out_2LRC2.shape[3]))
    parts = [slice(start, start + size) for start in range(0, len(rows_R1), size)]

    def fill(part: slice) -> None:
        _fill(out_2LRC2[:, :, part], rows_R1[part], heads_R1[part], sites_L11=sites_L11, seed=seed)

    if num_threads < 2 or len(parts) < _PARTS_FOR_THREADS:
        for part in parts:
            fill(part)
    else:  # threads of this call alone: a process that forks takes none along
        with ThreadPoolExecutor(min(num_threads, len(parts))) as pool:
            list(pool.map(fill, parts))


@lru_cache(maxsize=4)
def _keys(seed: int) -> np.ndarray:
    """Return both words of the key of each round: uint64 (rounds, 2)."""
    low, high = seed & LOW_32, (seed >> 32) & LOW_32
    keys = [(low + step * KEY_STEPS[0], high + step * KEY_STEPS[1]) for step in range(NUM_ROUNDS)]
    return np.array(keys, dtype=np.uint64) & _LOW


def _fill(
    out_2LRC2: np.ndarray, rows_R1: np.ndarray, heads_R1: np.ndarray, *, sites_L11: np.ndarray, seed: int
) -> None:
    """Write words (0, 1) and (2, 3) of every call, uint32."""
    words, old, new = np.empty((3, *out_2LRC2.shape[:-1]), np.uint64)
    keys = _keys(seed)
    # Round 1: words 0 and 1 go by the row alone, 2 and 3 by the call alone.
    of_call, of_head = np.arange(out_2LRC2.shape[3], dtype=np.uint64) * _FIRST, heads_R1 * _SECOND
    word_0 = (of_head >> _WORD) ^ rows_R1 ^ keys[0, 0]
    word_2 = (of_call >> _WORD) ^ (sites_L11 ^ keys[0, 1])
    word_1, word_3 = of_head & _LOW, of_call & _LOW
    # Round 2: so do the products, crosswise, and with them words 1 and 3.
    of_row, of_call = word_0 * _FIRST, word_2 * _SECOND
    np.bitwise_xor((of_call >> _WORD) ^ keys[1, 0], word_1, out=words[0])
    np.bitwise_xor((of_row >> _WORD) ^ keys[1, 1], word_3, out=words[1])
    # Round 3.
    np.multiply(words, _BOTH_2111, out=old)
    np.right_shift(old, _WORD, out=new)
    np.bitwise_xor(new[1], (of_call & _LOW) ^ keys[2, 0], out=words[0])
    np.bitwise_xor(new[0], (of_row & _LOW) ^ keys[2, 1], out=words[1])
    for key in keys[3:]:
        np.multiply(words, _BOTH_2111, out=new)
        np.right_shift(new, _WORD, out=words)
        # The low halves of the products of the round before are its words 3 and 1.
        np.bitwise_xor(words, old, out=old)
        np.bitwise_and(old, _LOW, out=old)
        np.bitwise_xor(old[::-1], key[:, None, None, None], out=words)
        old, new = new, old
    out_2LRC2[..., 0], out_2LRC2[..., 1] = words, old[::-1]  # the low halves
