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
    shares: tuple[str, ...] = ()
    """Of each <x> the forward sums <x> and <x>_of, how many of them there were to be; the quotient is logged."""
    weight: float = 1.0
    of_words: bool = False
    """Whether the targets are words: perplexity is logged, and in an evaluation figures by kind of target."""


def metric_names(terms: Sequence[LossTerm]) -> list[str]:
    """Return all that is summed beside the losses, in the order of the terms: that of a model's metric sums."""
    names: list[str] = []
    for term in terms:
        names += [] if term.metric is None else [term.metric]
        names += [name for share in term.shares for name in (share, f"{share}_of")]
    return names
