from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_ds.corpus.batches.batch_order import Mixture, balance, deal, global_batch, permute

one_source = Mixture((1000,), (1.0,))
quick = settings(max_examples=100, deadline=None)


def stream(mixture: Mixture, num_draws: int, *, seed: int = 0) -> list[tuple[int, int, int]]:
    batch = global_batch(0, seed=seed, mixture=mixture, train_batch_size=num_draws)
    return [tuple(triple) for triple in batch.tolist()]


@quick
@given(st.integers(1, 3000), st.integers(0, 2**31 - 1))
def test_a_permutation_takes_every_place_once(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_a_place_does_not_depend_on_the_other_positions_asked_for() -> None:
    alone = permute(np.array([777]), 1000, 5)
    assert alone.tolist() == permute(np.arange(1000), 1000, 5)[[777]].tolist()


def test_an_array_of_keys_permutes_each_position_by_its_own() -> None:
    mixed = permute(np.array([3, 3, 4]), 50, 9, np.array([0, 1, 1]))
    separate = [permute(np.array([position]), 50, 9, np.array([key]))[0] for position, key in ((3, 0), (3, 1), (4, 1))]
    assert mixed.tolist() == separate


def test_every_place_is_equally_likely() -> None:
    places = permute(np.zeros(20_000, dtype=np.int64), 10, np.arange(20_000))
    counts = np.bincount(places, minlength=10)
    # Chi-square with 9 degrees of freedom: 27.9 is passed once in 1,000.
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9


def test_neighbours_are_torn_apart() -> None:
    places = permute(np.arange(100_000), 100_000, 1)
    # The mean distance of two random places is a third of the size.
    assert abs(np.abs(np.diff(places)).mean() - 100_000 / 3) < 500


def test_the_order_is_frozen() -> None:
    """A change here makes every run started before it resume with other data."""
    batch = global_batch(3, seed=7, mixture=Mixture((40, 9), (1.0, 2.5)), train_batch_size=5)
    assert batch.tolist() == [[0, 0, 21], [0, 0, 22], [1, 0, 6], [1, 1, 8], [0, 0, 33]]


def test_an_epoch_holds_every_example_once() -> None:
    assert Counter(stream(one_source, 1000)) == Counter((0, 0, example) for example in range(1000))


def test_batches_straddle_epochs_without_a_gap() -> None:
    batches = [global_batch(step, seed=0, mixture=one_source, train_batch_size=64) for step in range(40)]
    assert np.concatenate(batches).tolist() == [list(triple) for triple in stream(one_source, 2560)]
    assert set(batches[15][:, 1].tolist()) == {0, 1}


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = np.array(stream(one_source, 2000))[:, 2].reshape(2, 1000)
    other = np.array(stream(one_source, 1000, seed=1))[:, 2]
    assert (first == second).mean() < 0.02
    assert (first == other).mean() < 0.02


def test_epochs_mix_the_sources_in_orders_of_their_own() -> None:
    first, second = np.array(stream(Mixture((500, 500), (1.0, 1.0)), 2000))[:, 0].reshape(2, 1000)
    assert 400 < (first == second).sum() < 600


def test_a_far_step_is_entered_at_once() -> None:
    batch = global_batch(10**12, seed=0, mixture=one_source, train_batch_size=1000)
    assert sorted(batch[:, 2].tolist()) == list(range(1000))
    assert set(batch[:, 1].tolist()) == {10**12}


@quick
@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0.3, 0.5, 1.0, 1.7, 2.5])), min_size=1, max_size=3),
    st.integers(1, 4),
)
def test_nothing_comes_twice_and_counts_are_even_after_whole_epochs(
    sources: list[tuple[int, float]], num_epochs: int
) -> None:
    mixture = Mixture(tuple(size for size, _ in sources), tuple(weight for _, weight in sources))
    seen = stream(mixture, num_epochs * mixture.epoch_size)
    assert len(set(seen)) == len(seen)
    for source, size in enumerate(mixture.num_examples):
        counts = Counter(example for number, _, example in seen if number == source)
        assert sum(counts.values()) == num_epochs * mixture.draws_per_epoch[source]
        assert max(counts.values()) - min(counts[example] for example in range(size)) <= 1


def test_a_weight_of_two_and_a_half_shows_half_of_the_examples_a_third_time() -> None:
    mixture = Mixture((100, 60), (2.5, 1.0))
    counts = Counter(example for source, _, example in stream(mixture, 310) if source == 0)
    assert sorted(counts.values()) == [2] * 50 + [3] * 50


def test_sources_are_mixed_in_proportion_within_a_batch() -> None:
    batch = global_batch(0, seed=0, mixture=Mixture((10_000, 5_000), (1.0, 1.0)), train_batch_size=3000)
    # 1,000 expected; the deviation without replacement is below 26.
    assert abs((batch[:, 0] == 1).sum() - 1000) < 104


@quick
@given(st.lists(st.integers(3, 512), min_size=1, max_size=64), st.integers(1, 16))
def test_parts_differ_by_one_example_at_most(lengths: list[int], num_parts: int) -> None:
    counts = np.bincount(deal(np.array(lengths), num_parts=num_parts), minlength=num_parts)
    assert counts.max() - counts.min() <= 1
    assert (counts.max() - counts.min() == 0) == (len(lengths) % num_parts == 0)


@quick
@given(st.lists(st.integers(3, 512), min_size=1, max_size=64), st.integers(1, 16))
def test_parts_differ_by_one_longest_example_at_most(lengths: list[int], num_parts: int) -> None:
    count = len(lengths) // num_parts * num_parts
    if count:
        parts = deal(np.array(lengths[:count]), num_parts=num_parts)
        tokens = np.bincount(parts, weights=lengths[:count])
        assert tokens.max() - tokens.min() <= max(lengths)


@pytest.mark.parametrize(("num_parts", "bound"), [(8, 1.01), (64, 1.01), (256, 1.03)])
def test_tokens_are_dealt_evenly(num_parts: int, bound: float) -> None:
    lengths = np.random.default_rng(0).integers(20, 129, 4096)
    in_order = np.repeat(np.arange(num_parts), 4096 // num_parts)
    assert balance(lengths, deal(lengths, num_parts=num_parts)) < bound < balance(lengths, in_order)


def test_dealing_is_a_pure_rule() -> None:
    assert deal(np.array([5, 9, 9, 1, 7, 3]), num_parts=3).tolist() == [2, 0, 1, 1, 2, 0]
