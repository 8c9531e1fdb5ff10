"""The two segments of an example: next sentence prediction (BERT), sentence order (ALBERT), both (StructBERT).

Next sentence prediction follows the BERT paper: `a` is the run up to a random sentence boundary; half of the time `b`
is the rest of the run (label 0), otherwise sentences of another document (label 1). A run of one sentence has no rest
and always gets a random next, as in Google's script. Departures from Google's create_pretraining_data.py:
- the rest that a random next displaces is not put back in front of the following run. It is read in the epochs that
  decide otherwise: the decision is drawn per epoch;
- the random sentence is uniform over the sentences of the other documents of the source, not over documents and then
  sentences, and is never of the same document (the script gives up after ten draws);
- true pairs are whole sentences that fit the target length (`sequences`), so random ones must be too, or length and
  broken ends would give the label away. A random `b` therefore takes whole sentences while they fit the target of its
  run, or, where the run was ended by its document, comes as near as it can to the `b` that it displaces; and of a few
  random places the first is taken where that succeeds. The script fills both kinds up and cuts.
Where a pair is still too long, because one sentence does not fit, tokens leave the longer side one by one, from the
front or the back by a coin, as published.

Sentence order prediction: the run is cut at a random sentence boundary and the halves are swapped half of the time
(label 1). A run of one sentence stays whole and carries no label.

Sentence structure (Wang et al. 2019, arXiv 1908.04577): of each three runs one is cut and left in order, so that `b` is
next (label 0), one is swapped, so that `b` is what was before (label 1), and one gets a random next as above (label 2),
as does every run of one sentence.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.corpus.batches.keyed_random import Draw, below, fraction, keyed_bits
from bert_ds.corpus.batches.sequences import ExampleTable, num_special_tokens, target_lengths

_NUM_TRIES = 8

Bits = Callable[[Draw, np.ndarray | slice], np.ndarray]
"""Random bits of a draw for some rows."""


def order_pairs(
    table: ExampleTable, first: np.ndarray, last: np.ndarray, *, bits: Bits
) -> tuple[np.ndarray, np.ndarray]:
    """Cut runs for sentence order prediction.

    Args:
        table: the examples of a source.
        first: int64 [n], first unit of each run.
        last: int64 [n], unit after the last.
        bits: random bits per draw.

    Returns:
        int64 [n, 4], tokens (a start, a stop, b start, b stop), b empty in a run of one unit; int64 [n] labels.
    """
    pairs = _true_pairs(table, first, last, bits=bits)
    swapped = _coin(bits(Draw.PAIR_LABEL, slice(None)))
    single = last - first == 1
    pairs[swapped & ~single] = pairs[swapped & ~single][:, [2, 3, 0, 1]]
    return pairs, np.where(single, IGNORE_INDEX, swapped)


def next_sentence_pairs(
    table: ExampleTable, first: np.ndarray, last: np.ndarray, *, bits: Bits
) -> tuple[np.ndarray, np.ndarray]:
    """Cut runs for next sentence prediction; arguments and result as for `order_pairs`, b never empty."""
    pairs = _true_pairs(table, first, last, bits=bits)
    is_random = (last - first == 1) | _coin(bits(Draw.PAIR_LABEL, slice(None)))
    _set_random_nexts(pairs, np.flatnonzero(is_random), table=table, first=first, last=last, bits=bits)
    return pairs, is_random.astype(np.int64)


def structure_pairs(
    table: ExampleTable, first: np.ndarray, last: np.ndarray, *, bits: Bits
) -> tuple[np.ndarray, np.ndarray]:
    """Cut runs for sentence structure; arguments and result as for `order_pairs`, b never empty."""
    pairs = _true_pairs(table, first, last, bits=bits)
    labels = below(bits(Draw.PAIR_LABEL, slice(None)), 3)
    labels[last - first == 1] = 2
    pairs[labels == 1] = pairs[labels == 1][:, [2, 3, 0, 1]]
    _set_random_nexts(pairs, np.flatnonzero(labels == 2), table=table, first=first, last=last, bits=bits)
    return pairs, labels


def truncated_sizes(sizes: np.ndarray, longest: int) -> np.ndarray:
    """Sizes left after tokens were taken from the longer side, from `b` at a tie, until both fit.

    Args:
        sizes: int64 [n, 2], pairs that do not fit.
        longest: tokens of a and b together, at least 2.

    Returns:
        int64 [n, 2]; each row sums to longest.
    """
    shorter = np.minimum(sizes.min(axis=1), longest // 2)
    a_is_longer = np.where(sizes.min(axis=1) > longest // 2, True, sizes[:, 0] > sizes[:, 1])
    longer = longest - shorter
    return np.where(a_is_longer[:, None], np.stack([longer, shorter], 1), np.stack([shorter, longer], 1))


def _set_random_nexts(
    pairs: np.ndarray, rows: np.ndarray, *, table: ExampleTable, first: np.ndarray, last: np.ndarray, bits: Bits
) -> None:
    """Give, in place, these of the true pairs a b of another document."""
    longest = table.config.max_seq_length - num_special_tokens(table.config)
    starts, cuts, _, ends = pairs[rows].T
    targets = target_lengths(starts, table.config, seed=table.seed)
    at_document_end = _document_ends(table, first[rows]) == last[rows]
    displaced = at_document_end & (last - first > 1)[rows]
    wanted = np.where(displaced, ends - cuts, targets - (cuts - starts))
    room = np.where(displaced, longest - (cuts - starts), wanted)
    begin = _random_units(table, first[rows], wanted, bits=bits(Draw.RANDOM_NEXT, rows))
    end = _end_near(table, begin, wanted, room=room)
    pairs[rows, 2], pairs[rows, 3] = table.unit_tokens[begin], table.unit_tokens[end]
    _truncate_pairs(pairs, rows, longest, bits=bits)


def _true_pairs(table: ExampleTable, first: np.ndarray, last: np.ndarray, *, bits: Bits) -> np.ndarray:
    """Runs cut at a random unit boundary inside them; b is empty in a run of one unit."""
    inner = last - first - 1
    cut = np.where(inner > 0, first + 1 + below(bits(Draw.SPLIT, slice(None)), np.maximum(inner, 1)), last)
    return table.unit_tokens[np.stack([first, cut, cut, last], axis=1)]


def _document_ends(table: ExampleTable, units: np.ndarray) -> np.ndarray:
    return table.document_units[np.searchsorted(table.document_units, units, side="right")]


def _random_units(table: ExampleTable, own_units: np.ndarray, wanted: np.ndarray, *, bits: np.ndarray) -> np.ndarray:
    """A unit of a document other than that of own_units, where about `wanted` tokens can be taken if tries find one.

    Each try is uniform over all units of the other documents. A try is good if its first unit is not too large and its
    document goes on for long enough.
    """
    tokens, documents = table.unit_tokens, table.document_units
    own_last = _document_ends(table, own_units)
    own_first = documents[np.searchsorted(documents, own_units, side="right") - 1]
    own_size = (own_last - own_first)[:, None]
    tries = below(keyed_bits(bits[:, None], np.arange(_NUM_TRIES)), documents[-1] - own_size)
    tries += np.where(tries >= own_first[:, None], own_size, 0)
    is_small = tokens[tries + 1] - tokens[tries] <= wanted[:, None]
    goes_on = tokens[_document_ends(table, tries)] - tokens[tries] >= wanted[:, None]
    return tries[np.arange(len(tries)), np.argmax(is_small & goes_on, axis=1)]


def _end_near(table: ExampleTable, begin: np.ndarray, wanted: np.ndarray, *, room: np.ndarray) -> np.ndarray:
    """Where units from `begin` on end so that their tokens come nearest to `wanted` without exceeding `room`: after at
    least one unit, even too large a one, and not beyond the document."""
    tokens = table.unit_tokens
    goal = tokens[begin] + wanted
    end = np.minimum(np.searchsorted(tokens, goal), len(tokens) - 1)
    is_too_far = (tokens[end] - goal > goal - tokens[end - 1]) | (tokens[end] - tokens[begin] > room)
    return np.minimum(np.maximum(end - is_too_far, begin + 1), _document_ends(table, begin))


def _truncate_pairs(pairs: np.ndarray, rows: np.ndarray, longest: int, *, bits: Bits) -> None:
    """Shorten, in place, the pairs among these rows that are longer than `longest` tokens together."""
    sizes = pairs[rows][:, [1, 3]] - pairs[rows][:, [0, 2]]
    too_long = sizes.sum(axis=1) > longest
    rows, sizes = rows[too_long], sizes[too_long]
    kept = truncated_sizes(sizes, longest)
    for side, draw in enumerate((Draw.FRONT_OF_A, Draw.FRONT_OF_B)):
        cut = sizes[:, side] - kept[:, side]
        front = _coins(cut, bits(draw, rows))
        pairs[rows, 2 * side] += front
        pairs[rows, 2 * side + 1] -= cut - front


def _coin(bits: np.ndarray) -> np.ndarray:
    return fraction(bits) < 0.5


def _coins(counts: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Heads among `counts` coins per row."""
    words = np.arange(-(-int(counts.max(initial=0)) // 64))
    used = np.clip(counts[:, None] - 64 * words, 0, 64).astype(np.uint64)
    masks = np.where(used == 0, np.uint64(0), ~np.uint64(0) >> (np.uint64(64) - np.maximum(used, np.uint64(1))))
    return np.bitwise_count(keyed_bits(bits[:, None], words[None, :]) & masks).sum(axis=1, dtype=np.int64)
