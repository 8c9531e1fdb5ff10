"""Without a CUDA device the kernels run in Triton's interpreter; triton reads this once, when it is first imported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained folder of a two-layer BERT, made once."""
    from downstream_cases import write_tiny_export

    return write_tiny_export(tmp_path_factory.mktemp("export") / "hf")
