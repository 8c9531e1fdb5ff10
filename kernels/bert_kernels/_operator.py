"""How an operator is called: by itself where torch runs eagerly, in its registered form where torch must see it.

A call through `torch.library` costs the host about as much as all that an operator does there, forward and backward.
The registered form is needed under `torch.compile` and `torch.export`, and wherever a mode or a transform of torch
watches or replaces operators. Both run the same function, so they give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bert_kernels._launch import is_recording


class Operator:
    """An operator of `torch.library` that eager code calls without it."""

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self._name, self._run = name, run
        self._registered = torch.library.custom_op(name, run, mutates_args=())
        self._function: Any = None

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """Say what shapes the outputs have."""
        self._registered.register_fake(fake)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Give the gradient, in the terms of `torch.library`, to both ways of calling."""
        self._registered.register_autograd(backward, setup_context=setup_context)
        self._function = _autograd_function(self._name, self._run, backward, setup_context=setup_context)

    def __call__(self, *args: Any) -> Any:
        """Run the operator; arguments by position."""
        if torch.compiler.is_compiling() or _torch_watches():
            return self._registered(*args)
        if not torch.is_grad_enabled():
            return self._run(*args)
        # A gradient of a gradient: torch differentiates the registered form or says that it cannot.
        return self._registered(*args) if self._function is None else self._function.apply(*args)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make an operator of a function whose annotations are its schema."""
    return lambda run: Operator(name, run)


def _torch_watches() -> bool:
    """Return whether a mode (fake tensors, tracing, selective recomputation, counting) or a transform is on.

    Where launches are recorded for a card, its own path is taken, so that whoever watches sees what that does.
    """
    is_watched = torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()
    return is_watched and not is_recording()


def _autograd_function(
    name: str, run: Callable[..., Any], backward: Callable[..., Any], *, setup_context: Callable[..., None]
) -> Any:
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = run(*inputs)
        setup_context(ctx, inputs, output)
        return output

    def backward_of_tensors(ctx: Any, *gradients: Any) -> Any:
        # The library wants a list of None for a list of tensors, a Function one None.
        return tuple(None if type(each) is list else each for each in backward(ctx, *gradients))

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_tensors)}
    return type(name.rpartition(":")[2], (torch.autograd.Function,), methods)
