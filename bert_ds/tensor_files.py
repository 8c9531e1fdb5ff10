"""The one place that lets PyTorch unpickle: tensors, containers and named classes, nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from bert_ds.ranks import CheckpointError


def load_tensor_file(path: Path, *, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Return the content of a .pt or .bin file; what `torch.serialization.safe_globals` allows is built too.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or holds anything else; nothing of it was executed.
    """
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # the unpickler raises whatever a crafted file makes it raise
        raise CheckpointError(f"{path} is damaged or holds more than tensors: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Return what PyTorch found, without its advice to load the file unprotected."""
    found = re.search(r"unsupported GLOBAL \S+|WeightsUnpickler error: [^\n]*|Unsupported operand \d+", str(error))
    return found[0] if found else type(error).__name__
