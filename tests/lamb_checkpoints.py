"""Save and load training state of the sharded optimizers under DeepSpeed; worker functions for `run_ranks`."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lamb_optimizers import whole_model_value
from lamb_runs import Case, build, quiet_deepspeed, train
from torch import Tensor, nn

STEPS_BEFORE, STEPS_AFTER = 3, 3


def state_of(engine: Any, optimizer: Any, model: nn.Module) -> list[Tensor]:
    """Return copies of masters, moments, step counts and model weights, as this rank holds them."""
    wrapper, found = engine.optimizer, []
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        found += list(getattr(wrapper, name, []))
    for state in optimizer.state.values():
        found += [state[key] if torch.is_tensor(state[key]) else torch.tensor(state[key]) for key in sorted(state)]
    found += [whole_model_value(p) for p in model.parameters()]
    return [tensor.detach().clone() for tensor in found]


def same_bits(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether two states are equal bit for bit, uninitialised padding included."""
    return len(left) == len(right) > 0 and all(
        torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
        for a, b in zip(left, right, strict=True)
    )


def run_same_world_size(
    rank: int, world_size: int, cases: Sequence[Case], folder: str
) -> list[tuple[bool, bool, bool]]:
    """Worker: train, save, train on; load into an engine that was trained otherwise, train on.

    Returns:
        Per case: state after loading is what was saved, final state is the uninterrupted run's, and a power check: the
        state before loading was another one.
    """
    quiet_deepspeed()
    found = []
    for index, case in enumerate(cases):
        path = str(Path(folder) / str(index))
        first = build(case, world_size)
        train(first[0], 0, STEPS_BEFORE)
        first[0].save_checkpoint(path, tag="saved")
        saved = state_of(*first)
        train(first[0], STEPS_BEFORE, STEPS_AFTER)
        uninterrupted = state_of(*first)
        second = build(case, world_size)
        train(second[0], 100, 1)
        differed = not same_bits(state_of(*second), saved)
        second[0].load_checkpoint(path, tag="saved")
        loaded = same_bits(state_of(*second), saved)
        train(second[0], STEPS_BEFORE, STEPS_AFTER)
        found.append((loaded, same_bits(state_of(*second), uninterrupted), differed))
        del first, second
        gc.collect()
    return found


def save_for_universal(rank: int, world_size: int, cases: Sequence[Case], folder: str) -> list[tuple[Any, Any]]:
    """Worker: train, save, train on; return the model's weights at both moments as numpy."""
    quiet_deepspeed()
    found = []
    for index, case in enumerate(cases):
        engine, _, model = build(case, world_size)
        train(engine, 0, STEPS_BEFORE)
        engine.save_checkpoint(str(Path(folder) / str(index)), tag="saved")
        saved = _weights(model)
        train(engine, STEPS_BEFORE, STEPS_AFTER)
        found.append((saved, _weights(model)))
        del engine
        gc.collect()
    return found


def load_universal(rank: int, world_size: int, cases: Sequence[Case], folder: str) -> list[tuple[Any, Any, set[int]]]:
    """Worker: load the converted checkpoints, train on; return the weights at both moments and the step counts."""
    quiet_deepspeed()
    found = []
    for index, case in enumerate(cases):
        engine, optimizer, model = build(case, world_size)
        engine.load_checkpoint(str(Path(folder) / str(index)), tag="universal")
        loaded = _weights(model)
        train(engine, STEPS_BEFORE, STEPS_AFTER)
        found.append((loaded, _weights(model), {int(state["step"]) for state in optimizer.state.values()}))
        del engine, optimizer
        gc.collect()
    return found


def _weights(model: nn.Module) -> dict[str, Any]:
    return {name: whole_model_value(p).float().numpy().copy() for name, p in model.named_parameters()}
