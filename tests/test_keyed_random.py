from __future__ import annotations

import numpy as np

from bert_ds.corpus.batches.keyed_random import Draw, below, fraction, keyed_bits


def test_the_bits_of_a_key_are_frozen() -> None:
    """A change here changes every batch of every run."""
    assert keyed_bits(0, 1, 2, np.arange(3)).tolist() == [
        10115958738084393897,
        9136008749489698502,
        694360845471097611,
    ]


def test_keys_broadcast_like_arrays() -> None:
    table = keyed_bits(7, np.arange(3)[:, None], np.arange(4))
    assert table.shape == (3, 4)
    assert table[2, 3] == keyed_bits(7, 2, np.array([3]))[0]


def test_every_part_of_a_key_matters_and_so_does_its_place() -> None:
    keys = [(0, 1, 2), (1, 0, 2), (0, 2, 1), (0, 1, 3), (0, 0, 1), (0, 1)]
    assert len({int(keyed_bits(*key[:-1], np.array([key[-1]]))[0]) for key in keys}) == len(keys)


def test_one_bit_of_a_key_flips_half_of_the_bits() -> None:
    counters = np.arange(20_000)
    for bit in (0, 1, 17, 40):
        flipped = np.bitwise_count(keyed_bits(3, counters) ^ keyed_bits(3, counters ^ (1 << bit)))
        # 64 fair coins: mean 32, deviation of the mean of 20,000 is 0.03.
        assert abs(flipped.mean() - 32) < 0.15


def test_fractions_and_integers_fill_their_range_evenly() -> None:
    bits = keyed_bits(1, np.arange(70_000))
    assert 0 <= fraction(bits).min() < fraction(bits).max() < 1
    assert abs(fraction(bits).mean() - 0.5) < 0.005
    counts = np.bincount(below(bits, 7), minlength=7)
    # Chi-square with 6 degrees of freedom: 22.5 is passed once in 1,000.
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 22.5


def test_decisions_have_numbers_of_their_own() -> None:
    assert len({draw.value for draw in Draw}) == len(Draw.__members__)
