"""Helpers of the kernel tests and benchmarks: the 2x rule and memory that is poisoned before a kernel writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def assert_close_to_truth(kernel: Tensor, truth: Tensor, peer: Tensor, *, name: str, atol: float = 0.0) -> None:
    """Assert that a kernel is at most twice as far from the fp32 truth as plain torch in the kernel's dtype, plus atol.

    Args:
        kernel: what the kernel gave.
        truth: the same from fp32 (or fp64) inputs by the reference.
        peer: the same maths by torch in the kernel's dtype.
        name: which output or gradient this is, for the message.
        atol: what rounding alone may add.
    """
    assert kernel.shape == truth.shape == peer.shape, f"{name}: {kernel.shape}, {truth.shape}, {peer.shape}"
    if truth.numel() == 0:
        return
    error = (kernel.double() - truth.double()).abs().max().item()
    allowed = 2.0 * (peer.double() - truth.double()).abs().max().item() + atol
    assert error <= allowed, f"{name}: off the truth by {error:.3e}, torch allows {allowed:.3e}"


@contextmanager
def poison_empty() -> Iterator[None]:
    """Fill what torch.empty and its kin give with NaN (floats) or -1 (integers), so that unwritten memory shows."""
    names = ("empty", "empty_like")
    originals = {name: getattr(torch, name) for name in names}

    def poisoned(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            tensor = original(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

        return allocate

    for name, original in originals.items():
        setattr(torch, name, poisoned(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)
