"""Philox of `dropout_mask` on a CPU by numpy: the same words by half the operations, each of a third of the cost.

Of the counter (call, row, head, site) the call is the same in every row, and row, head and site in every call of one.
So the first round is one of vectors, the second of vectors and one xor of everything. numpy has unsigned 64-bit
integers: a product is two words, and nothing has to be repaired behind a shift. Letters: R rows, C calls; a pair of
words is (0, 2), or (3, 1) as a pair of products leaves them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bert_kernels._philox import KEY_STEPS, LOW_32, MULTIPLIERS, NUM_ROUNDS

# Calls done together: few enough for the six work arrays to stay in the cache of a core.
_CALLS_PER_CHUNK = 8192
_WORD = np.uint64(32)
_LOW = np.uint64(LOW_32)
_MULTIPLIERS_211 = np.array(MULTIPLIERS, dtype=np.uint64)[:, None, None]


def bytes_below(
    threshold: int, rows_R: np.ndarray, heads_R: np.ndarray, *, num_calls: int, seed: int, site: int, num_threads: int
) -> np.ndarray:
    """Return which of the 16 bytes of calls 0 .. num_calls - 1 of each row are below the threshold: bool (R, 16 C)."""
    below = np.empty((len(rows_R), 16 * num_calls), dtype=bool)
    keys, rows_per_chunk = _keys(seed), max(1, _CALLS_PER_CHUNK // max(1, num_calls))

    def fill(start: int) -> None:
        part = slice(start, start + rows_per_chunk)
        words_RC4 = _words(rows_R[part].astype(np.uint64), heads_R[part].astype(np.uint64), num_calls, keys, site)
        np.less(words_RC4.view(np.uint8).reshape(below[part].shape), np.uint8(threshold), out=below[part])

    starts = range(0, len(rows_R), rows_per_chunk)
    if min(num_threads, len(starts)) < 2:
        for start in starts:
            fill(start)
    else:  # threads of this call alone: a process that forks takes none along
        with ThreadPoolExecutor(min(num_threads, len(starts))) as pool:
            list(pool.map(fill, starts))
    return below


def _keys(seed: int) -> list[tuple[np.uint64, np.uint64]]:
    """Return both words of the key of each round."""
    low, high = seed & LOW_32, (seed >> 32) & LOW_32
    return [
        (np.uint64((low + step * KEY_STEPS[0]) & LOW_32), np.uint64((high + step * KEY_STEPS[1]) & LOW_32))
        for step in range(NUM_ROUNDS)
    ]


def _words(
    rows_R: np.ndarray, heads_R: np.ndarray, num_calls: int, keys: list[tuple[np.uint64, np.uint64]], site: int
) -> np.ndarray:
    """Return the four output words of every call: uint32 (R, C, 4)."""
    shape = (2, len(rows_R), num_calls)
    words_2RC, old_2RC, new_2RC = np.empty(shape, np.uint64), np.empty(shape, np.uint64), np.empty(shape, np.uint64)
    first, second = _MULTIPLIERS_211.flatten()
    # Round 1: words 0 and 1 go by the row alone, 2 and 3 by the call alone.
    of_call_C, of_head_R = np.arange(num_calls, dtype=np.uint64) * first, heads_R * second
    word_0_R = (of_head_R >> _WORD) ^ rows_R ^ keys[0][0]
    word_2_C = (of_call_C >> _WORD) ^ np.uint64(site) ^ keys[0][1]
    word_1_R, word_3_C = of_head_R & _LOW, of_call_C & _LOW
    # Round 2: so do the products, crosswise, and with them words 1 and 3.
    of_row_R, of_call_C = word_0_R * first, word_2_C * second
    np.bitwise_xor((of_call_C >> _WORD) ^ keys[1][0], word_1_R[:, None], out=words_2RC[0])
    np.bitwise_xor(((of_row_R >> _WORD) ^ keys[1][1])[:, None], word_3_C, out=words_2RC[1])
    # Round 3.
    np.multiply(words_2RC, _MULTIPLIERS_211, out=old_2RC)
    np.right_shift(old_2RC, _WORD, out=new_2RC)
    np.bitwise_xor(new_2RC[1], (of_call_C & _LOW) ^ keys[2][0], out=words_2RC[0])
    np.bitwise_xor(new_2RC[0], ((of_row_R & _LOW) ^ keys[2][1])[:, None], out=words_2RC[1])
    for key in keys[3:]:
        np.multiply(words_2RC, _MULTIPLIERS_211, out=new_2RC)
        np.right_shift(new_2RC, _WORD, out=words_2RC)
        # The low halves of the products of the round before are its words 3 and 1.
        np.bitwise_xor(words_2RC, old_2RC, out=old_2RC)
        np.bitwise_and(old_2RC, _LOW, out=old_2RC)
        np.bitwise_xor(old_2RC[::-1], np.array(key)[:, None, None], out=words_2RC)
        old_2RC, new_2RC = new_2RC, old_2RC
    out_RC22 = np.empty((*shape[1:], 2, 2), np.uint32)
    out_2RC2 = out_RC22.transpose(2, 0, 1, 3)
    out_2RC2[..., 0], out_2RC2[..., 1] = words_2RC, old_2RC[::-1]  # the low halves
    return out_RC22.reshape(*shape[1:], 4)
