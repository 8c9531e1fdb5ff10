"""A module whose class becomes a subclass of the same name, and back.

Neither hooks nor a `forward` of the instance would do: sentence-transformers calls `model.forward` itself, which no
hook sees; a replica of nn.DataParallel would run the forward of the first card's module; a layer would lose gradient
checkpointing, which transformers puts around the forward of the class. The subclass keeps name, qualified name and
module, since transformers finds the outputs that it records, FSDP its layers and config.json its architecture by them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

STATE = "_bert_kernels"
"""Attribute of a changed module. Without it the forward is that of transformers: `type(model).from_pretrained(...)`
makes a module of the changed class that nobody has unpadded."""

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Makes a forward of transformers' forward."""

_CHANGED: dict[tuple[str, type], type] = {}
_ORIGINAL: dict[type, type] = {}
_WRAPS: dict[str, Wrap] = {}


def register(kind: str, wrap: Wrap) -> None:
    """Name a way of changing a forward, so that a pickle can say which one it was."""
    _WRAPS[kind] = wrap


def swap(module: nn.Module, kind: str, state: Any) -> None:
    """Give the module the changed class of its class, and its state."""
    module.__class__ = _changed_class(kind, original_class(module))
    setattr(module, STATE, state)


def swap_back(module: nn.Module) -> Any:
    """Give the module its own class again; return the state that it had, None where it had none."""
    module.__class__ = original_class(module)
    return module.__dict__.pop(STATE, None)


def original_class(module: nn.Module) -> type:
    """Return the class that the module has or had before it was changed."""
    return _ORIGINAL.get(type(module), type(module))


def state_of(module: nn.Module) -> Any:
    """Return the state of a changed module, None for every other."""
    return module.__dict__.get(STATE)


class _Changed:
    """First base of every class made here."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(max(int(protocol), 2))
        cls = next(base for base in type(self).__mro__ if base in _ORIGINAL)
        return _new, (cls._kind, _ORIGINAL[cls]), *made[2:]  # type: ignore[attr-defined]


def _new(kind: str, original: type) -> Any:
    cls: Any = _changed_class(kind, original)
    return cls.__new__(cls)


def _changed_class(kind: str, original: type) -> type:
    if (kind, original) not in _CHANGED:
        forward = functools.wraps(original.forward)(_WRAPS[kind](original.forward))  # type: ignore[attr-defined]
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
        cls = type(original.__name__, (_Changed, original), {**names, "forward": forward, "_kind": kind})
        _CHANGED[kind, original], _ORIGINAL[cls] = cls, original
    return _CHANGED[kind, original]
