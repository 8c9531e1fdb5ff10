"""A cross-encoder reads query and passage together and puts what was found first into a new order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.downstream.scores.ranking import Ranks
from bert_ds.downstream.tuning.predictor import Predictor


def reranked(
    folder: Path,
    queries: Sequence[str],
    passages: Sequence[str],
    orders: Sequence[Sequence[int]],
    *,
    batch_size: int,
) -> list[list[int]]:
    """Return the first passages of each query in the order of a cross-encoder's scores, the best first.

    Args:
        folder: of a regression on pairs, or of a classification of them whose last label says that both belong
            together; a query is its text, a passage its text_pair.
        queries, passages: texts.
        orders: of each query the indices of the passages that are read with it; of equal scores the first stays first.
        batch_size: pairs at a time.

    Raises:
        ConfigError: the folder is of another kind.
        DataError: a pair cannot be scored.
    """
    predictor = Predictor(folder)
    if predictor.kind not in ("regression", "classification"):
        raise ConfigError(
            f"retrieval.reranker: {folder} is of kind {predictor.kind}, wanted regression or classification"
        )
    found = []
    for query, order in zip(queries, orders, strict=True):
        answers = predictor([{"text": query, "text_pair": passages[place]} for place in order], batch_size=batch_size)
        if faults := [answer["error"] for answer in answers if "error" in answer]:
            raise DataError(f"{folder} cannot score the query {query[:80]!r}: {faults[0]}")
        scores = [_score(answer) for answer in answers]
        found.append([order[index] for index in sorted(range(len(order)), key=lambda index: -scores[index])])
    return found


def ranks_of(orders: Sequence[Sequence[int]], before: Ranks, wanted: Sequence[Sequence[int]]) -> Ranks:
    """Return the places of what each query has to find: in its new order, or the place before of what is not in it.

    Args:
        orders: of each query the indices of its first passages.
        before: the places in the order of all passages, see `Ranks`.
        wanted: indices of passages.
    """
    ranks = []
    for order, old, places in zip(orders, before, wanted, strict=True):
        new = [order.index(place) + 1 for place in places if place in order]
        ranks.append(tuple(sorted([*new, *(rank for rank in old if rank > len(order))])))
    return ranks


def _score(answer: dict) -> float:
    return answer["score"] if "score" in answer else list(answer["probabilities"].values())[-1]
