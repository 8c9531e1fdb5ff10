"""BLiMP and its like: of two sentences, the grammatical one should be the likelier (Warstadt et al. 2020)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer
from bert_ds.downstream.untrained.masked_scores import pseudo_log_likelihoods
from bert_ds.encoder.pretraining_model import PretrainingModel


class MinimalPair(NamedTuple):
    """Two sentences that differ in one point of grammar, and the name of the point."""

    good: str
    bad: str
    paradigm: str


class JudgedPair(NamedTuple):
    """A pair with the pseudo-log-likelihoods of its sentences, in nats."""

    pair: MinimalPair
    good_score: float
    bad_score: float

    @property
    def is_right(self) -> bool:
        """Whether the grammatical sentence is the likelier; a tie is wrong."""
        return self.good_score > self.bad_score


def judge_pairs(model: PretrainingModel, tokenizer: TextTokenizer, pairs: Sequence[MinimalPair]) -> list[JudgedPair]:
    """Score both sentences of every pair.

    Raises:
        DataError: a sentence is empty, or longer than the model.
    """
    texts = [text for pair in pairs for text in (pair.good, pair.bad)]
    scores = pseudo_log_likelihoods(model, tokenizer, texts)
    return [JudgedPair(*row) for row in zip(pairs, scores[::2], scores[1::2], strict=True)]


def pair_accuracies(judged: Sequence[JudgedPair]) -> dict[str, float]:
    """Return "accuracy", the mean over the paradigms, and "accuracy_PARADIGM" of each; half is what chance gives."""
    by_paradigm: dict[str, list[bool]] = defaultdict(list)
    for one in judged:
        by_paradigm[one.pair.paradigm].append(one.is_right)
    shares = {name: sum(rights) / len(rights) for name, rights in sorted(by_paradigm.items())}
    return {"accuracy": sum(shares.values()) / len(shares)} | {f"accuracy_{name}": x for name, x in shares.items()}
