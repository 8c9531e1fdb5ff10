"""What a step drops: a 64-bit dropout seed per micro-batch, and layers. A documented hash: no random state is saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bert_ds.basics.micro_batch import BranchDraws

_MASK = 2**64 - 1
_LAYERS = 2**32
"""Names the draws of layers, where the others have a number of a micro-batch."""
_BRANCHES = 2**33
"""Those of blocks of layers, which go by the example."""


def drops_of(
    module: nn.Module, seed: int, step: int, part: int, *, device: torch.device | str, example_ids: Tensor | None
) -> dict[str, Any]:
    """Return the arguments of a model's forward that say what a micro-batch drops.

    Args:
        module: of pre-training, which may have a `layer_drop` and a `stochastic_depth`, or of a task.
        seed, step, part, device: see `dropout_seed`.
        example_ids: of the micro-batch, on the device.
    """
    drops: dict[str, Any] = {"dropout_seed": dropout_seed(seed, step, part, device=device)}
    model: Any = module
    if layer_drop := getattr(model, "layer_drop", 0.0):
        drops["passed_over"] = passed_over(seed, step, num_layers=len(model.bert.layer), layer_drop=layer_drop)
    if getattr(model, "stochastic_depth", 0.0):
        assert example_ids is not None, "a batch of pre-training names its examples"
        drops["branches"] = BranchDraws(dropout_seed(seed, step, _BRANCHES, device=device), example_ids)
    return drops


def passed_over(seed: int, step: int, *, num_layers: int, layer_drop: float) -> frozenset[int]:
    """Return the layers that a step is taken without, each with probability layer_drop: those of all its micro-batches.

    A function of seed, step and layer and of nothing else, so it is the same on every rank.

    Args:
        seed: the run's seed, non-negative.
        step: optimizer step, from 1.
        num_layers: of the encoder; they are counted from 0.
        layer_drop: in [0, 1).
    """
    drawn = [dropout_seed_value(seed, step, _LAYERS + layer) % 2**64 / 2**64 for layer in range(num_layers)]
    return frozenset(layer for layer, number in enumerate(drawn) if number < layer_drop)


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
