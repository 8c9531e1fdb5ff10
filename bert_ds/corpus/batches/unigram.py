"""What a model knows that ignores the context: the floor that masked language modelling first falls to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.corpus.shards.shard_folder import ShardSplit

MAX_COUNTED_TOKENS = 1 << 25
"""Tokens of each source that are counted, from its beginning; more would only cost time."""


def piece_counts(train: Sequence[ShardSplit]) -> np.ndarray:
    """Return how often each piece is in the training text, int64 [V]; sources count alike, whatever their weight."""
    vocab_size = max(split.vocab_size for split in train)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for split in train:
        tokens = split.tokens(0, min(split.num_tokens, MAX_COUNTED_TOKENS))
        counts += np.bincount(tokens, minlength=vocab_size)
    return counts


def unigram_cross_entropy(counts: np.ndarray, held_out: Iterable[MicroBatch]) -> float:
    """Return the mean cross-entropy, in nats, of the targets at [MASK] under the frequencies of the training text.

    Args:
        counts: of every piece in the training text; one is added to each.
        held_out: batches of an evaluation, their targets grouped by kind.

    Returns:
        NaN where there is no target at [MASK].
    """
    labels = np.concatenate(
        [batch.targets["masked_labels"][: batch.kind_counts["masked"]].numpy() for batch in held_out]
    )
    surprise = np.log((counts + 1).sum()) - np.log(counts + 1)
    return float(surprise[labels].mean()) if len(labels) else math.nan
