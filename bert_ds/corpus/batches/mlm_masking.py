"""Masked language modelling targets: which positions are predicted and what the encoder sees there.

As in Google's create_pretraining_data.py, round(mlm_probability x length) positions of an example are predicted, the
length counting [CLS] and [SEP], at least one and at most max_predictions_per_seq; of these 80 % become [MASK], 10 % a
random piece, and 10 % stay. With whole words, words are taken in random order and a word that no longer fits is passed
over, so that an example may have a few targets less than allowed, and none where its only words are too long. Spans
of words, see `mask_spans`, are replaced as one: all their pieces by [MASK], all by random pieces, or none.

Departures: [UNK] and the other special pieces are neither predicted nor drawn as random pieces; and the choice is drawn
anew in every epoch, keyed by (seed, source, epoch, example), which makes it the same on one rank or on eight.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import MaskingConfig
from bert_ds.corpus.batches.examples import Example
from bert_ds.corpus.batches.keyed_random import Draw, below, fraction, keyed_bits
from bert_ds.corpus.batches.mask_spans import choose_spans, span_lengths
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer
from bert_ds.corpus.tokenizer.word_segments import WordJoiner


class MaskedExample(NamedTuple):
    """One sequence as the encoder sees it, with its targets."""

    input_ids: np.ndarray
    """int32 [n], [CLS] first and [SEP] last, replaced at the masked positions."""
    token_type_ids: np.ndarray
    """int8 [n], 0 or 1."""
    pair_label: int
    """0, 1, or IGNORE_INDEX without a pair objective."""
    positions: np.ndarray
    """int64 [p], masked positions in ascending order."""
    labels: np.ndarray
    """int32 [p], the pieces that stood there."""
    key: tuple[int, int, int]
    """(source, epoch, example)."""


class Masker:
    """Draws the targets of examples; a pure function of the seed and the examples' keys."""

    def __init__(self, tokenizer: TextTokenizer, config: MaskingConfig, *, seed: int) -> None:
        """Prepare the tables of a vocabulary.

        Raises:
            ValueError: the word segmenter of the config cannot be used.
        """
        self._config = config
        self._seed = seed
        self._mask_id = tokenizer.special_ids.mask
        self._is_special = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._is_special[list(tokenizer.special_ids)] = True
        self._text_ids = np.flatnonzero(~self._is_special)
        self._joiner = WordJoiner(tokenizer, config) if config.whole_word_mask else None

    def max_predictions(self, lengths: np.ndarray) -> np.ndarray:
        """Upper bound on the targets of sequences of these lengths, int64."""
        wanted = np.maximum(1, np.rint(self._config.mlm_probability * lengths)).astype(np.int64)
        bound = self._config.max_predictions_per_seq
        return wanted if bound is None else np.minimum(wanted, bound)

    def mask(self, examples: Sequence[Example]) -> list[MaskedExample]:
        """Mask some examples, all at once; the result for one does not depend on the others.

        Raises:
            DataError: an example holds an id that the vocabulary lacks.
        """
        lengths = np.array([len(example.input_ids) for example in examples])
        keys = np.array([example.key for example in examples], dtype=np.int64)
        ids = np.concatenate([example.input_ids for example in examples])
        rows = np.repeat(np.arange(len(examples)), lengths)
        if ids.max() >= len(self._is_special):
            source, _, index = examples[rows[ids.argmax()]].key
            raise DataError(
                f"example {index} of source {source} holds the id {ids.max()}, the vocabulary ends at "
                f"{len(self._is_special) - 1}: the shards are damaged"
            )
        starts = np.cumsum(lengths) - lengths
        heads = self._choose(ids, rows, lengths, keys=keys)
        chosen = np.flatnonzero(heads >= 0)
        labels = ids[chosen]
        positions, heads = chosen - starts[rows[chosen]], heads[chosen] - starts[rows[chosen]]
        ids[chosen] = self._replacements(labels, rows[chosen], positions, heads=heads, keys=keys)
        bounds = np.searchsorted(chosen, np.append(starts, len(ids)))
        masked = []
        for row, example in enumerate(examples):
            own = slice(bounds[row], bounds[row + 1])
            seen = ids[starts[row] : starts[row] + lengths[row]]
            masked.append(MaskedExample(seen, *example[1:3], positions[own], labels[own], example.key))
        return masked

    def _choose(self, ids: np.ndarray, rows: np.ndarray, lengths: np.ndarray, *, keys: np.ndarray) -> np.ndarray:
        """Choose words, or spans of them, in random order while they fit the budget of their example.

        Returns:
            int64, for each token the one whose draw says how it is replaced: itself, or the first of its span; -1 where
            it is not predicted.
        """
        heads = np.full(len(ids), -1)
        candidates = np.flatnonzero(~self._is_special[ids])
        if not len(candidates):
            return heads
        is_start = np.ones(len(candidates), dtype=bool)
        is_neighbour = np.diff(candidates, prepend=-2) == 1
        if self._joiner is not None:
            is_start = ~(self._joiner.continues(ids)[candidates] & is_neighbour)
        word_of = np.cumsum(is_start) - 1
        word_rows = rows[candidates[is_start]]
        word_ids = candidates[is_start] - (np.cumsum(lengths) - lengths)[word_rows]
        bits = keyed_bits(self._example_bits(Draw.MASK_CHOICE, keys)[word_rows], word_ids)
        budgets, sizes = self.max_predictions(lengths), np.bincount(word_of)
        if not self._config.span_mask:
            taken = choose_words(word_rows, sizes, bits, budgets=budgets)
            heads[candidates] = np.where(taken[word_of], candidates, -1)
            return heads
        spans = span_lengths(keyed_bits(self._example_bits(Draw.SPAN_LENGTH, keys)[word_rows], word_ids))
        first_of, follows = np.full(len(sizes), -1), is_neighbour[is_start]
        bounds = np.searchsorted(word_rows, np.arange(len(lengths) + 1)).tolist()
        for row, (first, end) in enumerate(pairwise(bounds)):
            own, budget = slice(first, end), int(budgets[row])
            found = choose_spans(sizes[own], spans[own], bits[own], follows=follows[own], budget=budget)
            first_of[own] = np.where(found >= 0, first + found, -1)
        heads[candidates] = np.where(first_of >= 0, candidates[is_start][first_of], -1)[word_of]
        return heads

    def _replacements(
        self, labels: np.ndarray, rows: np.ndarray, positions: np.ndarray, *, heads: np.ndarray, keys: np.ndarray
    ) -> np.ndarray:
        """What stands at the predicted positions: [MASK], a random piece, or the piece itself, drawn at `heads`."""
        kind = fraction(keyed_bits(self._example_bits(Draw.MASK_KIND, keys)[rows], heads))
        bits = keyed_bits(self._example_bits(Draw.MASK_PIECE, keys)[rows], positions)
        random_ids = self._text_ids[below(bits, len(self._text_ids))]
        mask_share = self._config.mask_token_fraction
        changed = np.where(kind < mask_share + self._config.random_token_fraction, random_ids, labels)
        return np.where(kind < mask_share, self._mask_id, changed)

    def _example_bits(self, draw: Draw, keys: np.ndarray) -> np.ndarray:
        return keyed_bits(self._seed, draw, *keys.T)


def choose_words(rows: np.ndarray, sizes: np.ndarray, bits: np.ndarray, *, budgets: np.ndarray) -> np.ndarray:
    """Take words in the order of their random bits; a word that does not fit what is left is passed over.

    All examples advance together: in a round every word that is larger than what its example has left is out for good,
    and of the others each example takes as many as fit. What is left only shrinks, so that this is the one-by-one rule.

    Args:
        rows: int64 [words], ascending: the example of each word.
        sizes: int64 [words], pieces of each word.
        bits: uint64 [words], random.
        budgets: int64 [examples], pieces to take at most.

    Returns:
        bool [words], whether a word is taken.
    """
    order = np.lexsort((bits, rows))
    taken = np.zeros(len(rows), dtype=bool)
    left = budgets.copy()
    while True:
        order = order[sizes[order] <= left[rows[order]]]
        if not len(order):
            return taken
        owners = rows[order]
        up_to = np.cumsum(sizes[order])
        first = np.searchsorted(owners, owners)
        in_row = up_to - (up_to - sizes[order])[first]
        fits = in_row <= left[owners]
        taken[order[fits]] = True
        np.subtract.at(left, owners[fits], sizes[order[fits]])
        order = order[~fits]
