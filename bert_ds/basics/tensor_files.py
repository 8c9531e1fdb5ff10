"""The one place that lets PyTorch unpickle: tensors, containers and named classes, nothing else."""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bert_ds.basics.input_gate import open_regular
from bert_ds.basics.ranks import CheckpointError


def load_tensor_file(path: Path, *, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Return the content of a .pt or .bin file; what `torch.serialization.safe_globals` allows is built too.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or holds anything else, such as tensors that are sparse
            or larger than their values; nothing of it was executed.
    """
    with open_regular(path, error=CheckpointError) as file:
        _refuse_compressed(path, file)
    try:
        content = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # the unpickler raises whatever a crafted file makes it raise
        raise CheckpointError(f"{path} is damaged or holds more than tensors: {_reason(error)}") from None
    for name, tensor in _tensors(content):
        if problem := _oddity(tensor):
            raise CheckpointError(f"{path}: {name or 'the tensor'} {problem}, wanted a dense tensor with its values")
    return content


def _refuse_compressed(path: Path, file: BinaryIO) -> None:
    """PyTorch stores tensors as they are: a compressed part is a bomb that unpacks a thousandfold."""
    try:
        packed = [entry.filename for entry in zipfile.ZipFile(file).infolist() if entry.compress_type]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, struct.error):
        return  # another of PyTorch's forms, or damaged: it finds out itself
    if packed:
        raise CheckpointError(f"{path}: {packed[0][:60]!r} is compressed, wanted a file that PyTorch wrote")


def _tensors(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested containers with their keys; without recursion, as a file may nest without end."""
    pending, seen = [("", content)], set[int]()
    while pending:
        name, value = pending.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            pending += [(f"{name}.{str(key)[:80]}"[-200:].lstrip("."), inner) for key, inner in items]


def _oddity(tensor: Tensor) -> str:
    """Return what is wrong with a tensor that is more than its bytes: computing with it could fill the memory."""
    if tensor.is_meta:
        return "is on the meta device and has no values"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"is stored as {str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_quantized:
        return "is quantised"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"has {tensor.numel()} values that share {tensor.untyped_storage().nbytes()} bytes"
    return ""


def _reason(error: Exception) -> str:
    """Return what PyTorch found, without its advice to load the file unprotected."""
    found = re.search(r"unsupported GLOBAL \S+|WeightsUnpickler error: [^\n]*|Unsupported operand \d+", str(error))
    return found[0] if found else type(error).__name__
