"""Spikes of the loss, found before they enter the weights and without waiting for the device.

The loss of a step over all ranks is known before its last backward. There it is compared, on the device, with the
losses of the steps before; the loss that is then back-propagated is multiplied by NaN if it spikes (or is not finite),
and whatever keeps a NaN gradient out of the weights drops the step on all ranks alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bert_ds.basics.loss_term import LossTerm
from bert_ds.training.loop.step_loss import term_factors, weighted_sum

_SMALLEST_SIGMA = 1e-3
"""Of the mean: a loss that hardly moves does not make every ripple a spike."""


class LossGuard:
    """The losses of the last applied steps, on the device.

    A step spikes where its loss is more than `sigmas` standard deviations above their mean; then it does not count for
    later ones. Nothing spikes until the window is full.

    Args:
        sigmas: see above.
        window: number of losses.
        recent: the losses of the steps before, the newest last.
        device: of the engine.
    """

    def __init__(self, sigmas: float, window: int, *, recent: Sequence[float], device: torch.device | str) -> None:
        losses = [math.nan] * window + [*recent]
        self._sigmas = sigmas
        self._window = torch.tensor(losses[-window:], dtype=torch.float64, device=device)
        self._last = torch.zeros(3, dtype=torch.float64, device=device)

    def judge(self, sums: Tensor, *, counts: Mapping[str, float], terms: Sequence[LossTerm], armed: bool) -> Tensor:
        """Return a factor for the last loss of a step, 1 or NaN on all ranks alike; a collective on the device.

        Args:
            sums: fp64, this rank's sums over all micro-batches of the step, the loss terms first.
            counts: targets over all ranks, by name.
            terms: what the losses are.
            armed: whether a spike is dropped; a loss that is not finite always is.
        """
        total = sums.clone()
        dist.all_reduce(total)
        factors = term_factors(terms, counts)
        loss = weighted_sum(total[: len(factors)], factors)
        mean, sigma = self._window.mean(), self._window.std()
        sigma = torch.maximum(sigma, _SMALLEST_SIGMA * mean.abs())
        spikes = loss > mean + self._sigmas * sigma  # false while the window holds a NaN
        good = torch.isfinite(loss) & ~spikes if armed else torch.isfinite(loss)
        self._last = torch.stack([loss, mean, sigma])
        self._window = torch.where(good, torch.cat([self._window[1:], loss[None]]), self._window)
        return torch.where(good, 1.0, math.nan).to(torch.float32)

    def forget(self) -> None:
        """Empty the window, as losses that come are not to be compared with those before."""
        self._window = torch.full_like(self._window, math.nan)

    def recent(self) -> list[float]:
        """Return the losses in the window, the newest last; a host sync."""
        return [loss for loss in self._window.tolist() if not math.isnan(loss)]

    def explain(self) -> str | None:
        """Say by how much the loss of the newest step spiked, None where it did not; a host sync."""
        loss, mean, sigma = self._last.tolist()
        if not loss > mean + self._sigmas * sigma or math.isinf(loss):
            return None
        return f"loss {loss:.4g} is {(loss - mean) / sigma:.1f} sigma above {mean:.4g}, the mean of the steps before"
