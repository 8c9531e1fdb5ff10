"""The loss of every micro-batch of a step: by itself, or as its share of a loss that looks at all rows of the step.

Of the second kind is a loss that tells each row from all others. Its gradient is exact in the memory of one
micro-batch by gradient caching (Gao et al. 2021, arXiv 2101.06983): the rows' vectors are computed without a graph and
gathered over the ranks; the loss over all of them gives the gradient of each vector; then every micro-batch runs again,
with the graph and with the same dropout, and back-propagates from that gradient. So such a loss too does not depend on
how a step is cut into ranks and micro-batches.

M vectors of this rank, N of all ranks, D their width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.training.loop.dropout_seeds import drops_of
from bert_ds.training.loop.step_loss import step_loss


class WholeStepLoss(Protocol):
    """What a model has as `whole_step_loss` where its loss is of the second kind, else None."""

    def __call__(self, vectors_ND: Tensor, targets: Mapping[str, Tensor], own: slice) -> Tensor:
        """Return the loss sums of some rows, fp32 [L].

        Args:
            vectors_ND: fp32, "vectors" among the scores of the model's forward, of all rows of the step.
            targets: of all rows, by name.
            own: the rows that are summed over, counted as the targets are.
        """
        ...


class MicroLoss(NamedTuple):
    """What is back-propagated of a micro-batch, and what is logged of it."""

    loss: Tensor
    """fp32 scalar, its share of the loss of the step."""
    sums: Tensor
    """fp64, its loss sums and metric sums, without gradient."""


def micro_losses(
    run: Any,
    micro_batches: Sequence[MicroBatch],
    *,
    counts: Mapping[str, float],
    seed: int | None,
    step: int,
    device: torch.device,
) -> Iterator[MicroLoss]:
    """Yield the loss of each micro-batch of this rank; a collective.

    Args:
        run: a DeepSpeed engine, or the module in it to leave the engine's own sums alone.
        micro_batches: of this rank, as many on every rank; of the same numbers of rows for a loss over the whole step.
        counts: targets by name over the whole step.
        seed: of the run; None where the model draws nothing.
        step: from 1; which dropout is drawn.
        device: of the engine.
    """
    module = getattr(run, "module", run)

    def forward(place: int, **options: Any) -> Any:
        moved = micro_batches[place].to(device)
        inputs: dict[str, Any] = {"dropout_seed": None, **moved.model_inputs(), **options}
        if seed is not None:
            part = dist.get_rank() * len(micro_batches) + place
            inputs |= drops_of(module, seed, step, part, device=device, example_ids=moved.example_ids)
        return run(**inputs)

    if getattr(module, "whole_step_loss", None) is None:
        for place in range(len(micro_batches)):
            loss_sums_L, metric_sums_M = forward(place)
            loss = step_loss(loss_sums_L, counts, terms=module.terms)
            yield MicroLoss(loss, torch.cat([loss_sums_L.detach(), metric_sums_M.detach()]).double())
        return
    with torch.no_grad():
        vectors = [forward(place, with_scores=True)[-1]["vectors"].float() for place in range(len(micro_batches))]
    shares = _shares(module, vectors, [batch.to(device).targets for batch in micro_batches], counts)
    for place, (gradient_MD, share, loss_sums_L) in enumerate(shares):
        _, metric_sums_M, scores = forward(place, with_scores=True)
        product = (scores["vectors"].float() * gradient_MD).sum()
        loss = share + product - product.detach()  # the value of the share, the gradient of the vectors
        yield MicroLoss(loss, torch.cat([loss_sums_L, metric_sums_M.detach()]).double())


def _shares(
    module: Any, vectors: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]], counts: Mapping[str, float]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return of each micro-batch the gradient of its vectors, its share of the loss, and its loss sums."""
    all_ND = _of_all_ranks(torch.cat(list(vectors))).requires_grad_()
    all_targets = {name: _of_all_ranks(torch.cat([one[name] for one in targets])) for name in targets[0]}
    num_rows = [len(next(iter(one.values()))) for one in targets]
    first, gradient_ND, found = dist.get_rank() * sum(num_rows), torch.zeros_like(all_ND), []
    for number in num_rows:
        with torch.enable_grad():
            sums_L = module.whole_step_loss(all_ND, all_targets, slice(first, first + number))
            loss = step_loss(sums_L, counts, terms=module.terms)
        gradient_ND += torch.autograd.grad(loss, all_ND)[0]
        found.append((loss.detach(), sums_L.detach()))
        first += number
    dist.all_reduce(gradient_ND)
    own_MD = gradient_ND.chunk(dist.get_world_size())[dist.get_rank()]
    parts = own_MD.split([len(one) for one in vectors])
    return [(part, *facts) for part, facts in zip(parts, found, strict=True)]


def _of_all_ranks(own: Tensor) -> Tensor:
    """Return the rows of every rank, in rank order; as many on each."""
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    return torch.cat(gathered)
