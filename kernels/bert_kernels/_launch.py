"""How kernels are launched: the tile of a card and a size, the device check, and a record of launches for tools.

Tiles are static tables: nothing is timed at run time, so all ranks run the same code and no collective waits for a
tuner. A record of launches, instead of the launches, is what ahead-of-time compilation for another card needs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from bert_kernels._tiles import Tile, TileTable

# Whether kernels run in Triton's interpreter, on the CPU. A kernel is bound to it when its module is imported.
INTERPRETING = bool(triton.knobs.runtime.interpret)
ARCHITECTURES = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}


@dataclass(frozen=True)
class Launch:
    """One kernel launch: arguments by name, the constexpr ones among them."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    tile: Tile


@dataclass
class _Recording:
    architecture: str
    launches: list[Launch]
    run: bool


_recording: _Recording | None = None


@contextmanager
def record_launches(architecture: str, *, run: bool = False) -> Iterator[list[Launch]]:
    """Collect the launches that the given architecture would see; without `run` on CPU tensors and not run."""
    global _recording
    _recording = _Recording(architecture, [], run)
    try:
        yield _recording.launches
    finally:
        _recording = None


def check_device(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on one device on which a kernel can run."""
    first, device = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first} on {device}: put all on one device")
    assert device is not None
    if device.type != "cuda" and not INTERPRETING and _recording is None:
        raise ValueError(
            f"{op}: {first} is on {device}, the Triton kernels need CUDA; "
            f"use {op}_reference, or set TRITON_INTERPRET=1 before the start to run the kernels slowly on the CPU"
        )


def is_recording() -> bool:
    """Return whether launches are recorded."""
    return _recording is not None


def values_at_hand(tensor: Tensor) -> bool:
    """Return whether a tensor's values can be checked: on a CPU, where torch does not trace and no card is recorded."""
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu" and _recording is None


def pick_tile(table: TileTable, device: torch.device, size: int) -> Tile:
    """Return the tile for this card and size; the last of a table serves all larger sizes."""
    rows = table.get(_architecture(device), table["default"])
    for largest, tile in rows:
        if size <= largest:
            return tile
    return rows[-1][1]


def _architecture(device: torch.device) -> str:
    if _recording is not None:
        return _recording.architecture
    if device.type != "cuda":
        return "default"
    return _architecture_of_card(device)


@functools.cache
def _architecture_of_card(device: torch.device) -> str:
    return ARCHITECTURES.get(torch.cuda.get_device_capability(device), "default")


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up. Triton's own, made for kernels too, takes the host twenty times as long."""
    return -(-a // b)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is at least `number`; 1 for 0."""
    return 1 << max(0, number - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile, arguments: dict[str, Any]) -> None:
    """Launch a kernel with a tile's warps and stages, on the device of its tensors; an empty grid is no launch."""
    if 0 in grid:
        return
    this = Launch(kernel, grid, arguments, tile)
    if _recording is not None:
        _recording.launches.append(this)
        if not _recording.run:
            return
    start(this)


def start(launch: Launch) -> None:
    """Run a launch."""
    device = next(value.device for value in launch.arguments.values() if isinstance(value, Tensor))
    if device.type != "cuda":
        _let_interpreted_scalars_bound_loops()
        launch.kernel[launch.grid](**launch.arguments)
        return
    with torch.cuda.device(device):
        launch.kernel[launch.grid](**launch.arguments, **launch.tile.options)


def kernel_name(launch: Launch) -> str:
    """Return a kernel's name as records have it: `attention_fwd` for `_attention_fwd_kernel`."""
    return launch.kernel.__name__.strip("_").removesuffix("_kernel")


@functools.cache
def _let_interpreted_scalars_bound_loops() -> None:
    """Repair `range(first, last)` in interpreted kernels: numpy >= 2.4 makes no int of an array of shape (1,)."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_and_repair(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_repair
