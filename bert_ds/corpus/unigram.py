"""What a model knows that ignores the context: the floor that masked language modelling first falls to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from bert_ds.corpus.collate import PackedBatch
from bert_ds.corpus.shards import ShardSplit

MAX_COUNTED_TOKENS = 1 << 25
"""Tokens of each source that are counted, from its beginning; more would only cost time."""


def unigram_cross_entropy(train: Sequence[ShardSplit], validation: Iterable[PackedBatch]) -> float:
    """Return the mean cross-entropy, in nats, of the masked words of `validation` under the frequencies of `train`.

    Frequencies are smoothed by adding one to every count. Sources count alike per token, whatever their weight.
    """
    vocab_size = max(split.vocab_size for split in train)
    counts = np.ones(vocab_size)
    for split in train:
        tokens = split.tokens(0, min(split.num_tokens, MAX_COUNTED_TOKENS))
        counts += np.bincount(tokens, minlength=vocab_size)
    surprise = -np.log(counts / counts.sum())
    labels = np.concatenate([batch.masked_labels_P.numpy() for batch in validation])
    return float(surprise[labels].mean())
