"""Random numbers as a pure function of a key: the one source of chance between shards and batches.

A draw is `keyed_bits(seed, Draw.MASKED, source, epoch, example, position)`: no generator, no state, so that it is the
same in any process, in any order, at any world size, and whole arrays are drawn at once. Each part of the key goes
through the finaliser of splitmix64 (Steele, Lea and Flood 2014, constants of Stafford's variant 13), which passes
BigCrush as a counter-based generator. numpy's own generators may change their streams between versions; these few lines
do not, so a run resumes on another numpy.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Draw(IntEnum):
    """What a draw decides; part of every key, so that no two decisions share their bits. The numbers are for ever."""

    IS_SHORT = 1
    SHORT_TARGET = 2
    SPLIT = 3
    PAIR_LABEL = 4
    RANDOM_NEXT = 5
    FRONT_OF_A = 6
    FRONT_OF_B = 7
    BATCH_ORDER = 8
    SOURCE_ORDER = 9
    MASK_CHOICE = 10
    MASK_KIND = 11
    MASK_PIECE = 12
    EVALUATED = 13
    EVALUATED_KIND = 14
    EVALUATED_PIECE = 15
    SPAN_LENGTH = 16


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def keyed_bits(*key: int | np.ndarray) -> np.ndarray:
    """Draw 64 random bits per element of the key.

    Args:
        key: integers and integer arrays that broadcast to one shape; at least one is an array.

    Returns:
        uint64 in the broadcast shape.
    """
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = _finalise(state + _GOLDEN ^ np.atleast_1d(np.asarray(part)).astype(np.uint64))
    return state


def below(bits: np.ndarray, bound: int | np.ndarray) -> np.ndarray:
    """Turn random bits into integers 0 .. bound - 1.

    Args:
        bits: uint64.
        bound: positive, below 2**48; the bias towards small values is below bound / 2**64.

    Returns:
        int64 in the shape of bits.
    """
    return (bits % np.asarray(bound).astype(np.uint64)).astype(np.int64)


def fraction(bits: np.ndarray) -> np.ndarray:
    """Turn random bits into float64 in [0, 1), multiples of 2**-53."""
    return (bits >> np.uint64(11)) * 2.0**-53


def _finalise(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> _SHIFTS[0])) * _MULTIPLIERS[0]
    state = (state ^ (state >> _SHIFTS[1])) * _MULTIPLIERS[1]
    return state ^ (state >> _SHIFTS[2])
