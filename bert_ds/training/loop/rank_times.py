"""Which rank holds the others up: time in the forward passes and time spent waiting for data, rank by rank.

The forward is what a rank does alone (at ZeRO-3 it contains gathers); the backward is mixed with the averaging of
gradients, in which every rank waits for the slowest. On CUDA the times come from events that are read at logged steps,
so that no step waits for the device.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bert_ds.training.agreement import gather_json

_NOTABLE = 1.2
"""A rank is called slow where it takes so many times the median."""


class RankTimes:
    """Sums of this rank since the last report.

    Args:
        module: the model; its forward passes are timed while it trains.
    """

    def __init__(self, module: nn.Module) -> None:
        self.data_wait_s = 0.0
        self._forward_s = 0.0
        self._begun: Any = None
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._on_cuda = next(module.parameters()).is_cuda
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def report(self) -> dict[str, Any]:
        """Return the spread over all ranks and start over; a collective on the host. Nothing for a single rank."""
        for first, last in self._spans:
            last.synchronize()  # host sync: at logged steps only, which have waited for the loss already
            self._forward_s += first.elapsed_time(last) / 1000
        mine = [self._forward_s, self.data_wait_s]
        self._forward_s, self.data_wait_s, self._spans = 0.0, 0.0, []
        if dist.get_world_size() == 1:
            return {}
        forward, waits = zip(*gather_json(mine), strict=True)
        return {"rank_forward_s": spread(forward), "rank_data_wait_s": spread(waits), "slow_rank": slow_rank(forward)}

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        if module.training:
            self._begun = self._now()

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not module.training:
            return
        if self._on_cuda:
            self._spans.append((self._begun, self._now()))
        else:
            self._forward_s += self._now() - self._begun

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def spread(values: tuple[float, ...]) -> dict[str, float]:
    """Return smallest, median and largest value, and the rank that has the largest."""
    largest = max(values)
    return {
        "min": min(values),
        "median": statistics.median(values),
        "max": largest,
        "rank_of_max": values.index(largest),
    }


def slow_rank(forward_s: tuple[float, ...]) -> str | None:
    """Return a remark about a rank that is much slower than the median of the others, None where there is none."""
    rank = forward_s.index(max(forward_s))
    others = statistics.median([seconds for other, seconds in enumerate(forward_s) if other != rank])
    if not others or forward_s[rank] <= _NOTABLE * others:
        return None
    return f"rank {rank} (+{forward_s[rank] / others - 1:.0%})"
