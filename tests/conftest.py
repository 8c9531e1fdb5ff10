"""What is set before anything is imported, which tests are slow, and what several files share.

Without a CUDA device the kernels run in Triton's interpreter; triton reads this once, when it is first imported.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from extension_folder import use_own_extensions

use_own_extensions()
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


SLOW = (
    "test_kernel",
    "test_benchmarks",
    "test_bad_steps",
    "test_checkpoint",
    "test_build",
    "test_lamb",
    "test_hf_onnx",
)
"""Beginnings of files that interpret kernels or train for long in this process."""
STARTERS = ("run_verb", "run_ranks", "subprocess", "make_workshop", "must")
"""Names by which a test module starts processes."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what `make test-fast` leaves out."""
    module = item.getparent(pytest.Module)
    assert module is not None
    if module.name.startswith(SLOW) or any(hasattr(module.obj, name) for name in STARTERS):
        item.add_marker("slow")


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained folder of a two-layer BERT, made once."""
    from downstream_cases import write_tiny_export

    return write_tiny_export(tmp_path_factory.mktemp("export") / "hf")
