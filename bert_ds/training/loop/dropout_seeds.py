"""One 64-bit dropout seed per micro-batch: a documented hash, so that no random state is ever saved."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 2**64 - 1


def splitmix64(value: int) -> int:
    """Return the splitmix64 hash of an unsigned 64-bit integer (Steele, Lea and Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def dropout_seed_value(seed: int, step: int, part: int) -> int:
    """Return h(h(h(seed) ^ step) ^ part), h = splitmix64, as a signed 64-bit integer.

    Args:
        seed: the run's seed, non-negative.
        step: optimizer step, from 1.
        part: rank * accumulation + micro_step. It names a micro-batch of the global batch independently of how many
            ranks share it, so 1 x 4, 2 x 2 and 4 x 1 draw the same dropout.
    """
    hashed = splitmix64(splitmix64(splitmix64(seed) ^ step) ^ part)
    return hashed - 2**64 if hashed >= 2**63 else hashed


def dropout_seed(seed: int, step: int, part: int, *, device: torch.device | str) -> Tensor:
    """Return the seed as an int64 tensor of shape [1] on the device, as the dropout kernels take it."""
    # A fill, which a card does not wait for, unlike a copy of a list.
    return torch.full((1,), dropout_seed_value(seed, step, part), dtype=torch.int64, device=device)
