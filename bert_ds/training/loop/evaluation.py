"""Loss and accuracy over held-out batches, as sums over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from bert_ds.basics.loss_term import LossTerm, metric_names
from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.basics.ranks import DataError
from bert_ds.training.agreement import max_over_ranks, sum_over_ranks


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
        words, which what can be copied would flatter.

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
    names, kinds = list(local[0].counts), list(local[0].kind_counts)
    counts = [sum(batch.counts[name] for batch in local) for name in names]
    counts += [sum(batch.kind_counts[kind] for batch in local) for kind in kinds]
    agreed = sum_over_ranks([*totals.tolist(), *counts])  # host sync: once per evaluation
    counted = dict(zip(names + kinds, agreed[len(totals) :], strict=True))
    return _evaluated(engine.module.terms, agreed[: len(totals)], counts=counted, kinds=kinds)


def evaluate_sources(engine: DeepSpeedEngine, sources: Iterable[tuple[str, Iterable[MicroBatch]]]) -> dict[str, float]:
    """Return the means of an evaluation and, of each source, loss and number of its targets at [MASK]; a collective.

    Args:
        engine: see `evaluate`.
        sources: "" and the batches of the evaluation, then the path of a folder and the batches of each source, whose
            figures are called `FIGURE of NAME`: the last part of the path, or all of it where two end alike.
    """
    found = {path: evaluate(engine, batches) for path, batches in sources}
    means = found.pop("")
    ends = [path.rstrip("/").rpartition("/")[2] for path in found]
    for end, (path, of_source) in zip(ends, found.items(), strict=True):
        name = end if ends.count(end) == 1 else path
        figures = [figure for figure in ("loss_mlm_masked", "mlm_masked_targets") if figure in of_source]
        means |= {f"{figure} of {name}": of_source[figure] for figure in figures}
    return means


def _evaluated(
    terms: Sequence[LossTerm], sums: Sequence[float], *, counts: Mapping[str, float], kinds: Sequence[str]
) -> dict[str, float]:
    means = named_means(terms, sums, counts=counts)
    if not kinds:
        return means
    words = next(term for term in terms if term.of_words)
    by_kind = sums[len(terms) + len(metric_names(terms)) :]
    figures = kind_means(words.name, by_kind, counts={kind: counts[kind] for kind in kinds})
    flattered = ("perplexity", f"{words.name}_accuracy")
    return {"loss": means["loss"], **figures, **{name: mean for name, mean in means.items() if name not in flattered}}


def forward_sums(engine: DeepSpeedEngine, batch: MicroBatch) -> Tensor:
    """Return loss sums and metric sums of one batch in fp64, on the device, without dropout."""
    inputs = batch.to(engine.device).model_inputs()
    loss_sums_L, metric_sums_M = engine(**inputs, dropout_seed=None)
    return torch.cat([loss_sums_L, metric_sums_M]).double()


def named_means(terms: Sequence[LossTerm], sums: Sequence[float], *, counts: Mapping[str, float]) -> dict[str, float]:
    """Return the figures of a step or an evaluation by name.

    Args:
        terms: of the model.
        sums: one per term, then one for each metric; what comes behind them is not looked at.
        counts: number of targets, by name. A term without targets is left out.

    Returns:
        `loss` (the weighted total), `loss_<name>`, `perplexity` of words, and for a metric `<name>_correct`
        `<name>_accuracy`, for any other its mean under its own name; a term's shares, where there is something of them.
    """
    means = {"loss": 0.0}
    found = [(term, counts[term.count]) for term in terms]
    for (term, count), total in zip(found, sums, strict=False):
        if count:
            means[f"loss_{term.name}"] = total / count
            means["loss"] += term.weight * total / count
    for term, count in found:
        if term.of_words and count:
            means["perplexity"] = _exp(means[f"loss_{term.name}"])
    measured = dict(zip(metric_names(terms), sums[len(terms) :], strict=False))
    for term, count in found:
        if (name := term.metric) is not None and count:
            logged = name.removesuffix("_correct") + "_accuracy" if name.endswith("_correct") else name
            means[logged] = measured[name] / count
        for share in term.shares:
            if whole := measured[f"{share}_of"]:
                means[share] = measured[share] / whole
    return means


def kind_means(term: str, sums: Sequence[float], *, counts: Mapping[str, float]) -> dict[str, float]:
    """Return loss, accuracy and number of a term's targets by kind; without targets the number alone.

    Args:
        term: its name.
        sums: [2 K], the losses of every kind, then the right predictions of every kind.
        counts: targets of the K kinds.

    Returns:
        `loss_<term>_<kind>`, `<term>_<kind>_accuracy` and `<term>_<kind>_targets`.
    """
    means: dict[str, float] = {}
    for kind, loss, correct in zip(counts, sums[: len(counts)], sums[len(counts) :], strict=True):
        if count := counts[kind]:
            means[f"loss_{term}_{kind}"] = loss / count
            means[f"{term}_{kind}_accuracy"] = correct / count
    return means | {f"{term}_{kind}_targets": int(count) for kind, count in counts.items()}


def _exp(value: float) -> float:
    return math.exp(value) if value < 700.0 else math.inf
