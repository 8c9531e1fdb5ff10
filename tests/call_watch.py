"""What a module hands to the functions that it has imported: the arguments of every call, by name."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest


class Calls(dict[str, list[dict[str, Any]]]):
    """Name of a function -> the arguments of each of its calls, defaults included.

    Args:
        patch: undoes it.
        module: whose names are watched.
        watched: name -> what a call returns, or `Calls.THROUGH`, which lets it do what it does.
    """

    THROUGH = object()

    def __init__(self, patch: pytest.MonkeyPatch, module: ModuleType, **watched: Any) -> None:
        super().__init__({name: [] for name in watched})
        for name, result in watched.items():
            patch.setattr(module, name, self._watched(name, getattr(module, name), result))

    def _watched(self, name: str, original: Any, result: Any) -> Any:
        signature = inspect.signature(original)

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            self[name].append(dict(bound.arguments))
            return original(*args, **kwargs) if result is Calls.THROUGH else result

        return call
