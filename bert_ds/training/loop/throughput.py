"""Speed of training: tokens per second, model FLOPs utilisation, share of time spent waiting for data, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from bert_ds.configuration.recipe.precision import Precision

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H20": 148e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 149.7e12,
    "L40S": 362e12,
    "L4": 121e12,
}
"""Dense bf16 and fp16 tensor-core FLOP/s by a part of the device name, from NVIDIA's data sheets."""


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Return the dense peak of one device in FLOP/s, or None where it is not known.

    The longest entry whose words all begin the same way in the device name wins, so that "A10G" is not taken for A10.
    """
    if precision == "fp32":
        return None
    words = device_name.replace("-", " ").replace("_", " ").split()
    known = [name for name in PEAK_FLOPS if all(word in words for word in name.split())]
    return PEAK_FLOPS[max(known, key=len)] if known else None


@dataclass
class Throughput:
    """Sums since the last report. Token counts and waits are totals over all ranks, time is this rank's clock."""

    world_size: int
    flops_per_token: float | None = None
    """Of the steps that are taken now."""
    peak_flops_per_rank: float | None = None
    clock: Callable[[], float] = time.perf_counter
    num_steps: int = 0
    num_tokens: float = 0.0
    num_flops: float = 0.0
    padded_tokens: float = 0.0
    filling_tokens: float = 0.0
    data_wait_s: float = 0.0
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self._started = self.clock()

    def add(self, *, num_tokens: float, padded_tokens: float, data_wait_s: float, filling_tokens: float = 0.0) -> None:
        """Add one optimizer step's totals over all ranks; fillings are not among the tokens."""
        self.num_steps += 1
        self.num_tokens += num_tokens
        self.num_flops += num_tokens * (self.flops_per_token or 0.0)
        self.padded_tokens += padded_tokens
        self.filling_tokens += filling_tokens
        self.data_wait_s += data_wait_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside (an evaluation, a save) out of the speed."""
        begun = self.clock()
        yield
        self._started += self.clock() - begun

    def report(self, *, steps_left: int) -> dict[str, float | None]:
        """Return the figures since the last report and start over."""
        seconds = max(self.clock() - self._started, 1e-9)
        tokens_per_s = self.num_tokens / seconds
        figures = {
            "tokens_per_s": tokens_per_s,
            "padding_avoided": 1.0 - self.num_tokens / self.padded_tokens if self.padded_tokens else 0.0,
            "filling_share": self.filling_tokens / (self.num_tokens + self.filling_tokens)
            if self.filling_tokens
            else None,
            "mfu": self._mfu(self.num_flops / seconds),
            "data_wait_share": min(1.0, self.data_wait_s / self.world_size / seconds),
            "seconds": seconds,
            "eta_s": steps_left * seconds / max(self.num_steps, 1),
        }
        self.num_steps, self.num_tokens, self.num_flops = 0, 0.0, 0.0
        self.padded_tokens, self.filling_tokens, self.data_wait_s = 0.0, 0.0, 0.0
        self._started = self.clock()
        return figures

    def _mfu(self, flops_per_s: float) -> float | None:
        if self.flops_per_token is None or self.peak_flops_per_rank is None:
            return None
        return flops_per_s / (self.peak_flops_per_rank * self.world_size)
