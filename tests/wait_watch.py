"""Sees what makes the host wait for a card, on tensors that only say that they are there (`fake_cuda`).

On a card a copy from memory that is not page-locked synchronises the stream, as does whatever brings a number back or
needs one to know a shape: an item, a mask of booleans as an index, `nonzero`. FakeTensorMode alone shows neither.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bert_kernels import _launch

ROOT = Path(__file__).resolve().parents[1]
_HIDDEN = (str(Path(__file__)), str(Path(_launch.__file__)))
_is_composite = torch._C._dispatch_has_kernel_for_dispatch_key
_OURS = tuple(f"{ROOT / folder}/" for folder in ("bert_ds", "kernels", "tests"))
READS = ("_local_scalar_dense", "is_nonzero", "equal", "item")
"""Operators that give the host a number."""
SHAPES = ("nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "argwhere")
"""Operators whose result has a shape that only the card knows."""


class Wait(NamedTuple):
    """One place where the host would wait, or where devices are mixed."""

    operator: str
    what: str
    file: str
    """Relative to the checkout; "autograd" in a thread of the backward pass without Python."""
    function: str
    line: int


class WaitError(RuntimeError):
    """A wait after which the step cannot go on without the card."""


class WaitWatch(TorchDispatchMode):
    """Collects the waits of a block, in `waits`; inside FakeTensorMode.

    A number that the host reads is 1, so that what follows is seen too.

    Args:
        allowed: (file, function) -> why the wait has to be.
    """

    def __init__(self, allowed: Mapping[tuple[str, str], str] | None = None) -> None:
        super().__init__()
        self.allowed, self.waits, self.used = allowed or {}, list[Wait](), set[tuple[str, str]]()
        self._pinned: dict[int, Any] = {}

    def pinned(self, tensor: Tensor) -> Tensor:
        """Return the tensor, which lies in page-locked memory from now on."""
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = storage
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        if func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        ):
            with self:  # inside an operator these come whole: `to` in place of the copy that it is
                return func.decompose(*args, **kwargs)
        if name == "is_pinned":
            return self.is_pinned(args[0])
        if name == "_pin_memory":
            return self.pinned(args[0].clone())
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor.is_cuda for tensor in tensors) or "cuda" in str(kwargs.get("device")):
            what = self._reason(name, args, kwargs, tensors)
            if what is not None and not self._note(str(func), what):
                raise WaitError(f"{func}: {what}")
            if name == "_local_scalar_dense":
                return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func.namespace == "bert_kernels":
            with self:  # what the operator does on the host, in place of the shapes that it declares
                return OPDEFS[f"bert_kernels::{name}"]._init_fn(*args, **kwargs)
        return func(*args, **kwargs)

    def _reason(self, name: str, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> str | None:
        """Say why the host waits, or None."""
        if name == "_to_copy":
            return self._copy(args[0], torch.device(kwargs.get("device") or args[0].device), kwargs)
        if name == "copy_":
            flags = dict(zip(("non_blocking",), args[2:], strict=False)) | kwargs
            return self._copy(args[1], args[0].device, flags)
        if name in READS:
            return "reads a number"
        if name in SHAPES or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            return "needs a number for a shape"
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                return "is indexed by booleans"
        if len({tensor.device for tensor in tensors if tensor.dim() or tensor.is_cuda}) > 1:
            return f"mixes devices: {', '.join(str(tensor.device) for tensor in tensors)}"
        return None

    def _copy(self, source: Tensor, target: torch.device, flags: dict[str, Any]) -> str | None:
        if source.device.type == target.type:
            return None
        if source.is_cuda:
            return None if flags.get("non_blocking") else "copies to the host"
        if not flags.get("non_blocking"):
            return "copies to the card and waits"
        return None if self.is_pinned(source) else "copies to the card from memory that is not pinned"

    def _note(self, operator: str, what: str) -> bool:
        """Remember a wait unless it is allowed; whether the step can go on."""
        wait = Wait(operator, what, *_place())
        place = wait.file, wait.function
        if place in self.allowed:
            self.used.add(place)
        else:
            self.waits.append(wait)
        return what != "needs a number for a shape" and what != "is indexed by booleans"


def _place() -> tuple[str, str, int]:
    """Return file, function and line of the innermost code that is neither torch's nor of the watch."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_OURS) and name not in _HIDDEN:
            return str(Path(name).relative_to(ROOT)), frame.f_code.co_name, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return "autograd", "", 0
