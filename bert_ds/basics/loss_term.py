"""What a loss is the sum of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LossTerm:
    """One term of a loss: sums over targets, divided by their number in the whole step, times a weight."""

    name: str
    """In the log `loss_<name>`."""
    count: str
    """Which of the counts of a batch says how many targets there are, see `MicroBatch.counts`."""
    metric: str | None = None
    """What is counted over the same targets; `<x>_correct` is logged as `<x>_accuracy`."""
    weight: float = 1.0
    of_words: bool = False
    """Whether the targets are words: perplexity is logged, and in an evaluation figures by kind of target."""


def metric_names(terms: Sequence[LossTerm]) -> list[str]:
    """Return the metrics of the terms that have one, in their order: that of a model's metric sums."""
    return [term.metric for term in terms if term.metric is not None]
