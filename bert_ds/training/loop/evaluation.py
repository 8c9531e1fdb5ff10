"""Loss and accuracy over held-out batches, as sums over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from bert_ds.basics.ranks import DataError
from bert_ds.training.agreement import max_over_ranks, sum_over_ranks
from bert_ds.training.checkpoints.train_state import MicroBatch


class Evaluation(NamedTuple):
    """What the training loop is told by an evaluation."""

    means: Mapping[str, float]
    """Figures by name, the same on all ranks."""
    save: bool = False
    """Whether this state is worth a checkpoint; the same on all ranks."""
    stop: bool = False
    """Whether the run has nothing more to gain and ends here; the same on all ranks."""


@torch.no_grad()
def evaluate(engine: DeepSpeedEngine, batches: Iterable[MicroBatch]) -> dict[str, float]:
    """Return means over all targets of all ranks' batches, without dropout; a collective.

    Every rank makes the same number of forward passes, because a forward of a ZeRO-3 model is itself a collective: a
    rank with fewer batches repeats its last one with weight zero.

    Returns:
        See `named_means`; of batches with `kind_counts` also `kind_means`, in place of accuracy and perplexity over all
        targets of the first term, which what can be copied would flatter.

    Raises:
        DataError: a rank has no batch at all.
    """
    local = list(batches)
    if max_over_ranks(float(not local)):
        raise DataError("a rank has no validation batch: the validation split is smaller than the number of ranks")
    num_forwards = int(max_over_ranks(float(len(local))))
    totals: Tensor | None = None
    engine.eval()
    for index in range(num_forwards):
        sums = forward_sums(engine, local[min(index, len(local) - 1)])
        if index < len(local):
            totals = sums if totals is None else totals + sums
    engine.train()
    assert totals is not None
    rows = ((*batch.loss_counts, *getattr(batch, "kind_counts", ())) for batch in local)
    counts = [sum(column) for column in zip(*rows, strict=True)]
    agreed = sum_over_ranks([*totals.tolist(), *counts])  # host sync: once per evaluation
    return _evaluated(engine.module, agreed[: len(totals)], counts=agreed[len(totals) :])


def _evaluated(model: Any, sums: Sequence[float], *, counts: Sequence[float]) -> dict[str, float]:
    means = named_means(model, sums, counts=counts)
    num_terms = len(model.loss_names)
    if len(counts) == num_terms:
        return means
    kinds = kind_means(model, sums[num_terms + len(model.metric_names) :], counts=counts[num_terms:])
    flattered = ("perplexity", f"{model.loss_names[0]}_accuracy")
    return {"loss": means["loss"], **kinds, **{name: mean for name, mean in means.items() if name not in flattered}}


def forward_sums(engine: DeepSpeedEngine, batch: MicroBatch) -> Tensor:
    """Return loss sums and metric sums of one batch in fp64, on the device, without dropout."""
    inputs = batch.to(engine.device).model_inputs()
    loss_sums_L, metric_sums_M = engine(**inputs, dropout_seed=None)
    return torch.cat([loss_sums_L, metric_sums_M]).double()


def named_means(model: Any, sums: Sequence[float], *, counts: Sequence[float]) -> dict[str, float]:
    """Return the figures of a step or an evaluation by name.

    The model names its terms: `loss_names` and `loss_weights`, one per loss sum, and `metric_names`, the k-th of which
    is counted over the targets of the k-th loss. A term without targets is left out.

    Returns:
        `loss` (the weighted total), `loss_<name>`, `perplexity` of the first term unless the model says that it
        `reports_perplexity` not, and for a metric `<name>_correct`
        `<name>_accuracy`, for any other its mean under its own name.
    """
    num_losses = len(model.loss_names)
    means = {"loss": 0.0}
    for name, weight, total, count in zip(model.loss_names, model.loss_weights, sums, counts, strict=False):
        if count:
            means[f"loss_{name}"] = total / count
            means["loss"] += weight * total / count
    if counts[0] and getattr(model, "reports_perplexity", True):
        means["perplexity"] = _exp(sums[0] / counts[0])
    for name, total, count in zip(model.metric_names, sums[num_losses:], counts, strict=False):
        if count:
            means[name.removesuffix("_correct") + "_accuracy" if name.endswith("_correct") else name] = total / count
    return means


def kind_means(model: Any, sums: Sequence[float], *, counts: Sequence[float]) -> dict[str, float]:
    """Return loss, accuracy and number of the first term's targets by kind; without targets the number alone.

    Args:
        model: its `kind_names` are those of the K kinds.
        sums: [2 K], the losses of every kind, then the right predictions of every kind.
        counts: [K], targets.

    Returns:
        `loss_<term>_<kind>`, `<term>_<kind>_accuracy` and `<term>_<kind>_targets`.
    """
    term, kinds = model.loss_names[0], model.kind_names
    means: dict[str, float] = {}
    for name, loss, correct, count in zip(kinds, sums[: len(kinds)], sums[len(kinds) :], counts, strict=True):
        if count:
            means[f"loss_{term}_{name}"] = loss / count
            means[f"{term}_{name}_accuracy"] = correct / count
    return means | {f"{term}_{name}_targets": int(count) for name, count in zip(kinds, counts, strict=True)}


def _exp(value: float) -> float:
    return math.exp(value) if value < 700.0 else math.inf
