"""Which examples a step trains on, as a pure function of (seed, step): nothing to store, nothing to fast-forward.

An epoch of a mixture holds every source `weight` times. Positions of the endless run are cut into epochs; inside an
epoch a keyed bijection shuffles over the whole corpus, and consecutive positions form the global batches, which may
straddle two epochs. A rank, a worker or a resumed run enters at any step at once, and the global batch of a step does
not depend on the number of ranks.

A source is gone through in *passes*. Each pass is a permutation of its examples, a weight of 2.5 uses two and a half
passes per epoch, and the next epoch goes on where the last one stopped: after any whole number of epochs no example of
a source was seen more than once oftener than another. The pass is what the rest of the corpus code calls the epoch of
an example, so that an example which comes twice in one epoch of the mixture gets other masks and another pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bert_ds.corpus.batches.keyed_random import Draw, below, keyed_bits

_ROUNDS = 8


@dataclass(frozen=True)
class Mixture:
    """Sizes and weights of the sources that a run draws from."""

    num_examples: tuple[int, ...]
    """Examples of each source."""
    weights: tuple[float, ...]
    """How many times a source's examples are seen per epoch."""

    @property
    def draws_per_epoch(self) -> tuple[int, ...]:
        """Examples that an epoch takes from each source: weight x size, at least 1."""
        pairs = zip(self.num_examples, self.weights, strict=True)
        return tuple(max(1, round(weight * size)) for size, weight in pairs)

    @property
    def epoch_size(self) -> int:
        """Examples of one epoch over all sources."""
        return sum(self.draws_per_epoch)


def permute(positions: np.ndarray, size: int, *key: int | np.ndarray) -> np.ndarray:
    """Map positions to places by a keyed bijection of 0 .. size - 1.

    An alternating Feistel network over the pairs (x, y) of a rectangle a x b that just covers the size: in turn
    x += f(y) mod a and y += f(x) mod b. A result in the few cells beyond the size goes through the network again
    (cycle walking), which keeps the map one to one.

    Args:
        positions: int64 [n], 0 to size - 1.
        size: of the domain, 1 to 2**60.
        key: integers or arrays [n]; equal keys give one bijection.

    Returns:
        int64 [n].
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    places = np.asarray(positions, dtype=np.int64).copy()
    keys = np.broadcast_to(keyed_bits(*key), places.shape)
    todo = np.arange(len(places))
    while len(todo):
        places[todo] = _feistel(places[todo], a, b, key=keys[todo])
        todo = todo[places[todo] >= size]
    return places


def global_batch(
    step: int, *, seed: int, mixture: Mixture, train_batch_size: int, first_position: int = 0
) -> np.ndarray:
    """The examples of one optimizer step over all ranks.

    Args:
        step: from 0.
        seed: of the run.
        mixture: the sources.
        train_batch_size: examples per step over all ranks.
        first_position: of step 0 in the endless run, which other batches have come up to.

    Returns:
        int64 [train_batch_size, 3]: (source, epoch, example). No triple ever comes twice in a run.
    """
    positions = first_position + np.arange(step * train_batch_size, (step + 1) * train_batch_size)
    epochs, offsets = np.divmod(positions, mixture.epoch_size)
    slots = permute(offsets, mixture.epoch_size, seed, Draw.BATCH_ORDER, epochs)
    draws = np.array(mixture.draws_per_epoch)
    first_slots = np.cumsum(draws) - draws
    sources = np.searchsorted(first_slots, slots, side="right") - 1
    nth_draws = epochs * draws[sources] + slots - first_slots[sources]
    triples = np.empty((train_batch_size, 3), dtype=np.int64)
    triples[:, 0] = sources
    for source, size in enumerate(mixture.num_examples):
        rows = sources == source
        passes, places = np.divmod(nth_draws[rows], size)
        triples[rows, 1] = passes
        triples[rows, 2] = permute(places, size, seed, Draw.SOURCE_ORDER, source, passes)
    return triples


def deal(lengths: np.ndarray, *, num_parts: int) -> np.ndarray:
    """Deal examples to parts so that all get equally many examples and nearly equally many tokens.

    The examples are taken in rounds of num_parts, longest first; in a round the part with the fewest tokens so far
    gets the longest example.

    Args:
        lengths: int64 [n], tokens of each example.
        num_parts: ranks x micro-steps; part = rank * accumulation + micro_step.

    Returns:
        int64 [n], the part of each example; where num_parts does not divide n, counts differ by one.
    """
    order = np.argsort(-lengths, kind="stable")
    parts = np.empty(len(lengths), dtype=np.int64)
    tokens = np.zeros(num_parts, dtype=np.int64)
    for first in range(0, len(order), num_parts):
        examples = order[first : first + num_parts]
        poorest = np.argsort(tokens, kind="stable")[: len(examples)]
        parts[examples] = poorest
        tokens[poorest] += lengths[examples]
    return parts


def balance(lengths: np.ndarray, parts: np.ndarray) -> float:
    """Tokens of the fullest part over the mean: 1.0 is perfect, and the share beyond it is time that others wait."""
    tokens = np.bincount(parts, weights=lengths)
    return float(tokens.max() / tokens.mean())


def _feistel(places: np.ndarray, a: int, b: int, *, key: np.ndarray) -> np.ndarray:
    x, y = np.divmod(places, b)
    for number in range(0, _ROUNDS, 2):
        x = (x + below(keyed_bits(key, number, y), a)) % a
        y = (y + below(keyed_bits(key, number + 1, x), b)) % b
    return x * b + y
