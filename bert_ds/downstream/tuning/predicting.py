"""Scores of a model on the features of a task, spread over the ranks and gathered again.

It runs on a DeepSpeed engine and on a plain model alike. Every rank makes the same number of forward passes, because
the forward of a ZeRO-3 model is a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bert_ds.basics.loss_term import LossTerm, metric_names
from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.downstream.rows.features import Feature
from bert_ds.downstream.rows.task_batch import pack, scores_of_features
from bert_ds.downstream.rows.task_batches import CountTargets
from bert_ds.training.agreement import gather_json, max_over_ranks, sum_over_ranks
from bert_ds.training.loop.evaluation import named_means

Summarise = Callable[[Feature, dict[str, np.ndarray]], Any]


class Predicted(NamedTuple):
    """What a model says of all features; the same on all ranks."""

    summaries: list[Any]
    """One JSON value per feature, in their order."""
    means: dict[str, float]
    """Losses and accuracies by name; empty where no feature has targets."""


@torch.no_grad()
def predict_features(
    model: Any, features: Sequence[Feature], *, batch_size: int, summarise: Summarise, count_targets: CountTargets
) -> Predicted:
    """Run a model over features, rank r taking every world_size-th; a collective.

    Args:
        model: a DeepSpeed engine over a `TaskModel`, or a `TaskModel` that lies where it is to run.
        features: the same on all ranks, at least one; losses are measured where all of them have targets.
        batch_size: features per forward pass and rank.
        summarise: of the kind: the scores of a feature, as arrays, to a JSON value.
        count_targets: of the kind.
    """
    if not all(feature.targets for feature in features):
        features = [feature._replace(targets={}) for feature in features]
    own = list(range(dist.get_rank(), len(features), dist.get_world_size()))
    own.sort(key=lambda index: -len(features[index].input_ids))
    groups = [own[first : first + batch_size] for first in range(0, len(own), batch_size)]
    num_forwards = int(max_over_ranks(float(len(groups))))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    summaries: dict[int, Any] = {}
    terms = _terms(model)
    totals, counts = torch.zeros(0, dtype=torch.float64), {term.count: 0.0 for term in terms}
    for number in range(num_forwards):
        group = groups[number] if number < len(groups) else [0]
        batch = _pack(features, group, count_targets)
        losses, metrics, scores = model(**batch.to(device).model_inputs(), dropout_seed=None, with_scores=True)
        if number < len(groups):
            found = torch.cat((losses[: len(terms)], metrics)).double().cpu()
            totals = found if not len(totals) else totals + found
            counts = {name: count + batch.counts[name] for name, count in counts.items()}
            for place, arrays in zip(batch.places, scores_of_features(batch, scores), strict=True):
                summaries[group[place]] = summarise(features[group[place]], arrays)
    model.train(was_training)
    return _gathered(terms, summaries, totals=totals, counts=counts)


def _pack(features: Sequence[Feature], group: Sequence[int], count_targets: CountTargets) -> MicroBatch:
    chosen = [features[index] for index in group]
    return pack(chosen, counts=count_targets(chosen))


def _gathered(
    terms: Sequence[LossTerm], summaries: dict[int, Any], *, totals: Tensor, counts: dict[str, float]
) -> Predicted:
    num_sums = len(terms) + len(metric_names(terms))
    local = totals.tolist() if len(totals) else [0.0] * num_sums
    agreed = sum_over_ranks([*local, *counts.values()])
    everything: dict[int, Any] = {}
    for part in gather_json(list(summaries.items())):
        everything.update({index: summary for index, summary in part})
    ordered = [everything[index] for index in range(len(everything))]
    counted = dict(zip(counts, agreed[num_sums:], strict=True))
    return Predicted(ordered, named_means(terms, agreed[:num_sums], counts=counted) if any(counted.values()) else {})


def _terms(model: Any) -> tuple[LossTerm, ...]:
    """Return the terms that the head has: a teacher's, behind them, is there while training only."""
    module = getattr(model, "module", model)
    return module.terms[: len(module.head.terms)]
