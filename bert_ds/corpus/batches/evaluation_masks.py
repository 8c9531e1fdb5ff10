"""What an evaluation of masked words predicts, and what it shows there: the same whatever a recipe masks or packs.

Of the pieces of the held-out text 15 % are targets. Of these 80 % show [MASK], 10 % another piece, drawn evenly, and
10 % the piece itself (the shares of Devlin et al. 2019, arXiv 1810.04805). The loss at [MASK] is the figure of merit:
what a model copies at the kept pieces says nothing about language.

The fate of a piece is a function of the text's key and the piece's place in it, counted from the first piece of the
held-out text. Sequence length, pairs, whole words, mask rate and seed have no part in it; they decide only which pieces
an evaluation comes by. Special pieces, [UNK] among them, are neither predicted nor shown as another piece.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import numpy as np

from bert_ds.basics.ranks import DataError
from bert_ds.corpus.batches.examples import Example
from bert_ds.corpus.batches.keyed_random import Draw, below, fraction, keyed_bits
from bert_ds.corpus.batches.mlm_masking import MaskedExample
from bert_ds.corpus.shards.shard_folder import ShardSplit

TARGET_SHARE = 0.15
MASK_SHARE = 0.8
OTHER_SHARE = 0.1
KEYED_PIECES = 1 << 20
"""Pieces that the key of a text is taken from, from its beginning."""


def text_key(first_ids: np.ndarray, num_ids: int) -> int:
    """Return the key of a text: 64 bits of the sha256 of its number of pieces and its first KEYED_PIECES ids.

    Args:
        first_ids: integers, at least the first KEYED_PIECES ids, or all.
        num_ids: pieces of the whole text.
    """
    content = np.append(first_ids[:KEYED_PIECES], num_ids).astype("<i8").tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def split_key(split: ShardSplit) -> int:
    """Return the key of what a split holds; how it is cut into shards does not matter."""
    return text_key(split.tokens(0, min(split.num_tokens, KEYED_PIECES)), split.num_tokens)


class EvaluationMasker:
    """Turns sequences of a held-out text into what an evaluation shows."""

    def __init__(self, *, vocab_size: int, special_ids: Collection[int], mask_id: int) -> None:
        """Prepare the tables of a vocabulary.

        Args:
            vocab_size: ids are 0 to vocab_size - 1.
            special_ids: never predicted and never drawn; mask_id is one of them.
            mask_id: of [MASK].

        Raises:
            DataError: fewer than two pieces are not special.
        """
        self.mask_id = mask_id
        self._is_special = np.zeros(vocab_size, dtype=bool)
        self._is_special[list(special_ids)] = True
        self._text_ids = np.flatnonzero(~self._is_special)
        self._rank = np.cumsum(~self._is_special) - 1
        if len(self._text_ids) < 2:
            raise DataError(f"the vocabulary has {len(self._text_ids)} pieces that are not special, wanted two")

    def mask(
        self, examples: Sequence[Example], places: Sequence[np.ndarray], *, keys: np.ndarray
    ) -> list[MaskedExample]:
        """Mask some sequences, all at once; the result for one does not depend on the others.

        Args:
            examples: sequences with their special marks.
            places: int64 [n] for each, the place of each of its pieces in the text; -1 for a mark.
            keys: uint64 [examples], the key of the text that each is from.

        Raises:
            DataError: an example holds an id that the vocabulary lacks.
        """
        lengths = np.array([len(example.input_ids) for example in examples])
        ids, places_n = np.concatenate([example.input_ids for example in examples]), np.concatenate(places)
        if int(ids.max()) >= len(self._is_special):
            raise DataError(f"the held-out text holds the id {ids.max()}, the vocabulary has {len(self._is_special)}")
        keys_n = np.repeat(keys, lengths)
        chosen = np.flatnonzero(
            (places_n >= 0)
            & ~self._is_special[ids]
            & (fraction(keyed_bits(keys_n, Draw.EVALUATED, places_n)) < TARGET_SHARE)
        )
        labels = ids[chosen]
        shown = ids.copy()
        shown[chosen] = self._shown(labels, places_n[chosen], keys_n[chosen])
        starts = np.append(0, np.cumsum(lengths))
        bounds = np.searchsorted(chosen, starts)
        masked = []
        for row, example in enumerate(examples):
            own = slice(bounds[row], bounds[row + 1])
            seen = shown[starts[row] : starts[row + 1]]
            masked.append(MaskedExample(seen, *example[1:3], chosen[own] - starts[row], labels[own], example.key))
        return masked

    def _shown(self, labels: np.ndarray, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """What stands at the targets: [MASK], another piece, or the piece itself."""
        kind = fraction(keyed_bits(keys, Draw.EVALUATED_KIND, places))
        others = len(self._text_ids) - 1
        step = 1 + below(keyed_bits(keys, Draw.EVALUATED_PIECE, places), others)
        other_ids = self._text_ids[(self._rank[labels] + step) % (others + 1)]
        changed = np.where(kind < MASK_SHARE + OTHER_SHARE, other_ids, labels)
        return np.where(kind < MASK_SHARE, self.mask_id, changed)
