"""What the ranks agree on: small host-side collectives that never touch the device.

They run over gloo, on CUDA too: numbers that steer the loop (counts, stop flags, damage reports) then never wait for
queued kernels. Every function here is a collective: all ranks call it, in the same order. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bert_ds.basics.ranks import CheckpointError, DataError
from bert_ds.configuration.reading.config_files import ConfigError

Value = TypeVar("Value")

_ERRORS = {error.__name__: error for error in (ConfigError, DataError, CheckpointError)}

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Longer than rank 0 may need to build a corpus or to write a checkpoint while the others wait."""


_host_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


def host_group(timeout: timedelta = COLLECTIVE_TIMEOUT) -> dist.ProcessGroup:
    """Return the gloo group of all ranks; made on the first call, which is a collective and may give a timeout."""
    world = dist.group.WORLD
    assert world is not None, "the process group is not initialised"
    if world not in _host_groups:
        _host_groups.clear()
        is_gloo = dist.get_backend(world) == "gloo"
        _host_groups[world] = world if is_gloo else dist.new_group(backend="gloo", timeout=timeout)
    return _host_groups[world]


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Return the elementwise sum of a short list of numbers over all ranks, in fp64."""
    group = host_group()
    total = torch.tensor(values, dtype=torch.float64)
    if dist.get_world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total.tolist()


def max_over_ranks(value: float) -> float:
    """Return the largest value of any rank."""
    largest = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=host_group())
    return float(largest[0])


def gather_json(value: Any) -> list[Any]:
    """Return every rank's JSON value, in rank order."""
    text = _encode(value)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(text)]), group=host_group())
    longest = int(max(int(size) for size in sizes))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(text)] = text
    gathered = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(gathered, padded, group=host_group())
    return [_decode(part[: int(size)]) for part, size in zip(gathered, sizes, strict=True)]


def broadcast_json(value: Any) -> Any:
    """Return rank 0's JSON value on every rank."""
    text = _encode(value)
    size = torch.tensor([len(text)])
    dist.broadcast(size, src=0, group=host_group())
    if dist.get_rank() != 0:
        text = torch.zeros(int(size), dtype=torch.uint8)
    dist.broadcast(text, src=0, group=host_group())
    return _decode(text)


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(text: Tensor) -> Any:
    return json.loads(text.numpy().tobytes())


def on_main_rank(action: Callable[[], Value]) -> Value:
    """Run an action on rank 0 while the others wait; a collective.

    Returns:
        What the action returned, on every rank; it must be a JSON value.

    Raises:
        ConfigError, DataError, CheckpointError: what the action raised, on every rank; DataError for an OSError.
    """
    answer: dict[str, Any] = {}
    if dist.get_rank() == 0:
        try:
            answer = {"value": action()}
        except tuple(_ERRORS.values()) as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        except OSError as error:  # the others would wait for ever
            what = f"{error.filename} cannot be read or written: " if error.filename else ""
            answer = {"error": DataError.__name__, "message": f"{what}{error.strerror or error}"}
    answer = broadcast_json(answer)
    if "error" in answer:
        raise _ERRORS[answer["error"]](answer["message"])
    return answer["value"]
