"""Examples as the encoder reads them: `[CLS] a [SEP]`, `[CLS] a [SEP] b [SEP]`, made anew in every epoch.

A plan says for a whole batch at once which token ranges an example joins, so that exact lengths are known before a
token is read; `make_example` then reads the tokens. Every decision is keyed by (seed, source, epoch, example).

Next sentence prediction follows the BERT paper: `a` is the run up to a random sentence boundary; half of the time `b`
is the rest of the run (label 0), otherwise sentences of another document (label 1). A run of one sentence has no rest
and always gets a random next, as in Google's script. Departures from Google's create_pretraining_data.py:
- the rest that a random next displaces is not put back in front of the following run. It is read in the epochs that
  decide otherwise: the decision is drawn per epoch;
- the random sentence is uniform over the sentences of the other documents of the source, not over documents and then
  sentences, and is never of the same document (the script gives up after ten draws);
- a random `b` ends at the sentence boundary nearest to the length of the `b` that it displaces. The script fills it up
  to the target and cuts, which there happens to true pairs too; here it would give the label away by the length. After
  a run of one sentence `b` goes on towards the target length of the run.
Where a pair is still too long, tokens leave the longer side one by one, from the front or the back by a coin, as
published.

Sentence order prediction (ALBERT): the run is cut at a random sentence boundary and the halves are swapped half of the
time (label 1). A run of one sentence stays whole and carries no label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from bert_ds.corpus.keyed_random import Draw, below, fraction, keyed_bits
from bert_ds.corpus.sequences import ExampleTable, num_special_tokens, target_lengths
from bert_ds.run_config import IGNORE_INDEX


class Example(NamedTuple):
    """One sequence before masking."""

    input_ids: np.ndarray
    """int32 [n], [CLS] first and [SEP] last."""
    token_type_ids: np.ndarray
    """int8 [n], 0 or 1."""
    pair_label: int
    """0 next or in order, 1 random or swapped, IGNORE_INDEX without a pair objective."""
    key: tuple[int, int, int]
    """(source, epoch, example)."""


class Spans(NamedTuple):
    """Token ranges of n examples, each range to be followed by [SEP]; ranges of one example are neighbours."""

    owners: np.ndarray
    """int64 [ranges], ascending: the row of the example."""
    starts: np.ndarray
    """int64 [ranges], first token."""
    stops: np.ndarray
    """int64 [ranges], token after the last; a range is never empty."""
    types: np.ndarray
    """int64 [ranges], token type of the range."""


@dataclass(frozen=True)
class Plan:
    """What n examples of one source consist of."""

    table: ExampleTable
    keys: np.ndarray
    """int64 [n, 3]: (source, epoch, example)."""
    spans: Spans
    pair_labels: np.ndarray
    """int64 [n]."""

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [n], tokens with [CLS] and [SEP]."""
        sizes = self.spans.stops - self.spans.starts + 1
        return 1 + np.bincount(self.spans.owners, weights=sizes, minlength=len(self.keys)).astype(np.int64)

    @cached_property
    def first_spans(self) -> np.ndarray:
        """int64 [n + 1], ranges of example i are first_spans[i] to first_spans[i + 1]."""
        return np.searchsorted(self.spans.owners, np.arange(len(self.keys) + 1))


Bits = Callable[[Draw, np.ndarray | slice], np.ndarray]
"""Random bits of a draw for some rows of the plan."""


def plan_examples(table: ExampleTable, indices: np.ndarray, *, epochs: np.ndarray, source: int, seed: int) -> Plan:
    """Decide the segments of some examples.

    Args:
        table: the examples of a source.
        indices: int64 [n], 0 to table.num_examples - 1.
        epochs: int64 [n], non-negative; how often the source was gone through before.
        source: number of the source, part of the key.
        seed: of the run.

    Returns:
        The plan of these n examples, in this order.
    """
    indices, epochs = np.asarray(indices, dtype=np.int64), np.asarray(epochs, dtype=np.int64)

    def bits(draw: Draw, rows: np.ndarray | slice) -> np.ndarray:
        return keyed_bits(seed, draw, source, epochs[rows], indices[rows])

    first, last = table.example_units[indices], table.example_units[indices + 1]
    match table.config.sentence_pair:
        case "none":
            spans, labels = _plan_text(table, first, last), np.full(len(indices), IGNORE_INDEX, dtype=np.int64)
        case "sop":
            spans, labels = _plan_sentence_order(table, first, last, bits=bits)
        case "nsp":
            spans, labels = _plan_next_sentence(table, first, last, bits=bits)
    keys = np.stack([np.full_like(indices, source), epochs, indices], axis=1)
    return Plan(table, keys, spans, labels)


def make_example(plan: Plan, row: int) -> Example:
    """Read the tokens of one planned example and put the special tokens around them."""
    split = plan.table.split
    special = split.special_ids
    input_ids = np.empty(plan.lengths[row], dtype=np.int32)
    token_type_ids = np.zeros(len(input_ids), dtype=np.int8)
    input_ids[0] = special.cls
    at = 1
    for span in range(plan.first_spans[row], plan.first_spans[row + 1]):
        start, stop = int(plan.spans.starts[span]), int(plan.spans.stops[span])
        end = at + stop - start
        input_ids[at:end] = split.tokens(start, stop)
        input_ids[end] = special.sep
        if plan.spans.types[span]:
            token_type_ids[at : end + 1] = 1
        at = end + 1
    source, epoch, index = plan.keys[row].tolist()
    return Example(input_ids, token_type_ids, int(plan.pair_labels[row]), (source, epoch, index))


def _plan_text(table: ExampleTable, first: np.ndarray, last: np.ndarray) -> Spans:
    """One range per document that the run touches: one, unless examples cross documents."""
    documents = table.document_units
    inner = np.searchsorted(documents, first, side="right")
    counts = np.searchsorted(documents, last, side="left") - inner + 1
    owners = np.repeat(np.arange(len(first)), counts)
    nth = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = np.where(nth == 0, first[owners], documents[inner[owners] + nth - 1])
    end = np.where(nth == counts[owners] - 1, last[owners], documents[inner[owners] + nth])
    kept = end > begin
    starts, stops = table.unit_tokens[begin[kept]], table.unit_tokens[end[kept]]
    return Spans(owners[kept], starts, stops, np.zeros(len(starts), dtype=np.int64))


def _plan_sentence_order(
    table: ExampleTable, first: np.ndarray, last: np.ndarray, *, bits: Bits
) -> tuple[Spans, np.ndarray]:
    tokens = table.unit_tokens
    cut = tokens[_random_boundary(first, last, bits=bits)]
    halves = np.stack([tokens[first], cut, cut, tokens[last]], axis=1)
    swapped = _coin(bits(Draw.PAIR_LABEL, slice(None)))
    single = last - first == 1
    halves[swapped & ~single] = halves[swapped & ~single][:, [2, 3, 0, 1]]
    return _pair_spans(halves), np.where(single, IGNORE_INDEX, swapped)


def _plan_next_sentence(
    table: ExampleTable, first: np.ndarray, last: np.ndarray, *, bits: Bits
) -> tuple[Spans, np.ndarray]:
    tokens = table.unit_tokens
    cut = tokens[_random_boundary(first, last, bits=bits)]
    pairs = np.stack([tokens[first], cut, cut, tokens[last]], axis=1)
    is_random = (last - first == 1) | _coin(bits(Draw.PAIR_LABEL, slice(None)))
    rows = np.flatnonzero(is_random)
    wanted = np.where(
        last[rows] - first[rows] == 1,
        target_lengths(pairs[rows, 0], table.config, seed=table.seed) - (pairs[rows, 1] - pairs[rows, 0]),
        pairs[rows, 3] - pairs[rows, 2],
    )
    longest = table.config.max_seq_length - num_special_tokens(table.config)
    room = longest - (pairs[rows, 1] - pairs[rows, 0])
    begin = _random_unit(table, first[rows], bits=bits(Draw.RANDOM_NEXT, rows))
    pairs[rows, 2], pairs[rows, 3] = tokens[begin], tokens[_end_near(table, begin, wanted, room=room)]
    _truncate_pairs(pairs, rows, longest, bits=bits)
    return _pair_spans(pairs), is_random.astype(np.int64)


def _random_boundary(first: np.ndarray, last: np.ndarray, *, bits: Bits) -> np.ndarray:
    """A unit strictly inside each run, or its end where the run is one unit."""
    inner = last - first - 1
    return np.where(inner > 0, first + 1 + below(bits(Draw.SPLIT, slice(None)), np.maximum(inner, 1)), last)


def _random_unit(table: ExampleTable, own_units: np.ndarray, *, bits: np.ndarray) -> np.ndarray:
    """A unit of a document other than that of own_units, all of them equally likely."""
    documents = table.document_units
    own = np.searchsorted(documents, own_units, side="right")
    own_first, own_size = documents[own - 1], documents[own] - documents[own - 1]
    begin = below(bits, documents[-1] - own_size)
    return begin + np.where(begin >= own_first, own_size, 0)


def _end_near(table: ExampleTable, begin: np.ndarray, wanted: np.ndarray, *, room: np.ndarray) -> np.ndarray:
    """Where units from `begin` on end so that their tokens come nearest to `wanted` without exceeding `room`: after at
    least one unit, even too large a one, and not beyond the document."""
    tokens, documents = table.unit_tokens, table.document_units
    goal = tokens[begin] + wanted
    end = np.minimum(np.searchsorted(tokens, goal), len(tokens) - 1)
    is_too_far = (tokens[end] - goal > goal - tokens[end - 1]) | (tokens[end] - tokens[begin] > room)
    document_end = documents[np.searchsorted(documents, begin, side="right")]
    return np.minimum(np.maximum(end - is_too_far, begin + 1), document_end)


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


def _coin(bits: np.ndarray) -> np.ndarray:
    return fraction(bits) < 0.5


def _coins(counts: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Heads among `counts` coins per row."""
    words = np.arange(-(-int(counts.max(initial=0)) // 64))
    used = np.clip(counts[:, None] - 64 * words, 0, 64).astype(np.uint64)
    masks = np.where(used == 0, np.uint64(0), ~np.uint64(0) >> (np.uint64(64) - np.maximum(used, np.uint64(1))))
    return np.bitwise_count(keyed_bits(bits[:, None], words[None, :]) & masks).sum(axis=1, dtype=np.int64)


def _pair_spans(pairs: np.ndarray) -> Spans:
    """Ranges of pairs [n, 4] of (a start, a stop, b start, b stop), without the empty ones."""
    bounds = pairs.reshape(-1, 2)
    kept = np.flatnonzero(bounds[:, 1] > bounds[:, 0])
    return Spans(kept // 2, bounds[kept, 0], bounds[kept, 1], kept % 2)
