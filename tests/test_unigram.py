"""The unigram floor of a validation set."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from corpus_fixtures import open_train

from bert_ds.corpus.batches.unigram import piece_counts, unigram_cross_entropy


def test_the_floor_is_the_mean_surprise_at_mask_under_smoothed_training_counts(tmp_path: Path) -> None:
    split = open_train(tmp_path, [[[5, 5, 5, 6]], [[7, 5]]])
    batch: Any = SimpleNamespace(
        targets={"masked_labels": torch.tensor([5, 8, 6, 7])}, kind_counts={"masked": 2, "random": 1, "kept": 1}
    )
    total = 6 + split.vocab_size
    expected = -(math.log(5 / total) + math.log(1 / total)) / 2
    assert unigram_cross_entropy(piece_counts([split]), [batch]) == pytest.approx(expected, rel=1e-12)


def test_the_pieces_of_every_source_count(tmp_path: Path) -> None:
    first, second = open_train(tmp_path / "one", [[[5, 5, 6]]]), open_train(tmp_path / "two", [[[6, 9]]])
    counts = piece_counts([first, second])
    assert (counts[[5, 6, 9]].tolist(), int(counts.sum())) == ([2, 2, 1], 5)
