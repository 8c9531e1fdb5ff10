"""Examples as the encoder reads them: `[CLS] a [SEP]`, `[CLS] a [SEP] b [SEP]`, made anew in every epoch.

`choose_spans` says for a whole batch at once which token ranges an example joins, so that exact lengths are known
before a token is read; `make_example` then reads the tokens. Every decision is keyed by (seed, source, epoch, example).
How the segments of a pair are chosen: `sentence_pairs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.corpus.batches.keyed_random import Draw, keyed_bits
from bert_ds.corpus.batches.sentence_pairs import next_sentence_pairs, order_pairs, structure_pairs
from bert_ds.corpus.batches.sequences import ExampleTable


class Example(NamedTuple):
    """One sequence before masking."""

    input_ids: np.ndarray
    """int32 [n], [CLS] first and [SEP] last."""
    token_type_ids: np.ndarray
    """int8 [n], 0 or 1."""
    pair_label: int
    """0 next or in order, 1 random or swapped, 2 random of three, IGNORE_INDEX without a pair objective."""
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
class ExampleSpans:
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


def choose_spans(
    table: ExampleTable, indices: np.ndarray, *, epochs: np.ndarray, source: int, seed: int
) -> ExampleSpans:
    """Decide the segments of some examples.

    Args:
        table: the examples of a source.
        indices: int64 [n], 0 to table.num_examples - 1.
        epochs: int64 [n], non-negative; how often the source was gone through before.
        source: number of the source, part of the key.
        seed: of the run.

    Returns:
        What these n examples consist of, in this order.
    """
    indices, epochs = np.asarray(indices, dtype=np.int64), np.asarray(epochs, dtype=np.int64)

    def bits(draw: Draw, rows: np.ndarray | slice) -> np.ndarray:
        return keyed_bits(seed, draw, source, epochs[rows], indices[rows])

    first, last = table.example_units[indices], table.example_units[indices + 1]
    match table.config.sentence_pair:
        case "none":
            spans, labels = _text_spans(table, first, last), np.full(len(indices), IGNORE_INDEX, dtype=np.int64)
        case "sop":
            pairs, labels = order_pairs(table, first, last, bits=bits)
            spans = _pair_spans(pairs)
        case "nsp":
            pairs, labels = next_sentence_pairs(table, first, last, bits=bits)
            spans = _pair_spans(pairs)
        case "structure":
            pairs, labels = structure_pairs(table, first, last, bits=bits)
            spans = _pair_spans(pairs)
    keys = np.stack([np.full_like(indices, source), epochs, indices], axis=1)
    return ExampleSpans(table, keys, spans, labels)


def make_example(chosen: ExampleSpans, row: int) -> Example:
    """Read the tokens of one example and put the special tokens around them."""
    split = chosen.table.split
    special = split.special_ids
    input_ids = np.empty(chosen.lengths[row], dtype=np.int32)
    token_type_ids = np.zeros(len(input_ids), dtype=np.int8)
    input_ids[0] = special.cls
    at = 1
    for span in range(chosen.first_spans[row], chosen.first_spans[row + 1]):
        start, stop = int(chosen.spans.starts[span]), int(chosen.spans.stops[span])
        end = at + stop - start
        input_ids[at:end] = split.tokens(start, stop)
        input_ids[end] = special.sep
        if chosen.spans.types[span]:
            token_type_ids[at : end + 1] = 1
        at = end + 1
    source, epoch, index = chosen.keys[row].tolist()
    return Example(input_ids, token_type_ids, int(chosen.pair_labels[row]), (source, epoch, index))


def token_places(chosen: ExampleSpans, row: int) -> np.ndarray:
    """Return the place in the split of every token of one example, int64 [n]; -1 for a special token."""
    places = np.full(chosen.lengths[row], -1, dtype=np.int64)
    at = 1
    for span in range(chosen.first_spans[row], chosen.first_spans[row + 1]):
        start, stop = int(chosen.spans.starts[span]), int(chosen.spans.stops[span])
        places[at : at + stop - start] = np.arange(start, stop)
        at += stop - start + 1
    return places


def _text_spans(table: ExampleTable, first: np.ndarray, last: np.ndarray) -> Spans:
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


def _pair_spans(pairs: np.ndarray) -> Spans:
    """Ranges of pairs [n, 4] of (a start, a stop, b start, b stop), without the empty ones."""
    bounds = pairs.reshape(-1, 2)
    kept = np.flatnonzero(bounds[:, 1] > bounds[:, 0])
    return Spans(kept // 2, bounds[kept, 0], bounds[kept, 1], kept % 2)
