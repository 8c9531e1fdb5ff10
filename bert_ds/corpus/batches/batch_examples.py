"""What a batch consists of that draws from several sources: exact lengths first, tokens only where they are needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.corpus.batches.collate import collate, grouped_by_kind
from bert_ds.corpus.batches.evaluation_masks import EvaluationMasker
from bert_ds.corpus.batches.examples import ExampleSpans, choose_spans, make_example, token_places
from bert_ds.corpus.batches.mlm_masking import Masker
from bert_ds.corpus.batches.sequences import ExampleTable


class BatchExamples:
    """What the examples of a batch consist of, grouped by source.

    Attributes:
        by_source: the examples of every source that occurs, by its number.
        lengths: int64 [n], tokens of every example with its special tokens.
    """

    def __init__(self, tables: Sequence[ExampleTable], triples: np.ndarray, *, seed: int) -> None:
        """Decide what the examples consist of.

        Args:
            tables: the examples of every source.
            triples: int64 [n, 3], n >= 1: (source, epoch, example).
            seed: of the run.
        """
        self.by_source: dict[int, ExampleSpans] = {}
        for source in np.unique(triples[:, 0]).tolist():
            rows = triples[triples[:, 0] == source]
            self.by_source[source] = choose_spans(
                tables[source], rows[:, 2], epochs=rows[:, 1], source=source, seed=seed
            )
        self._places = [(chosen, row) for chosen in self.by_source.values() for row in range(len(chosen.lengths))]
        self.lengths = np.concatenate([chosen.lengths for chosen in self.by_source.values()])

    def pack(self, rows: np.ndarray, masker: Masker) -> MicroBatch:
        """Read, mask and pack the examples at some rows of the batch, at least one."""
        examples = [make_example(*self._places[row]) for row in rows.tolist()]
        return collate(masker.mask(examples))

    def pack_held_out(self, rows: np.ndarray, masker: EvaluationMasker, *, keys: np.ndarray) -> MicroBatch:
        """As `pack`, with the masks of an evaluation and the targets grouped by what they show.

        Args:
            rows: int64, at least one row of the batch.
            masker: of the vocabulary.
            keys: uint64 [sources], the key of each source's held-out text.
        """
        places = [self._places[row] for row in rows.tolist()]
        examples = [make_example(*place) for place in places]
        owners = np.array([example.key[0] for example in examples])
        masked = masker.mask(examples, [token_places(*place) for place in places], keys=keys[owners])
        return grouped_by_kind(collate(masked), mask_id=masker.mask_id)
