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
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a hub on the network


SLOW = (
    "test_kernel",
    "test_benchmarks",
    "test_bad_steps",
    "test_checkpoint",
    "test_build",
    "test_lamb",
    "test_hf_onnx",
    "test_int8",
)
"""Beginnings of files that interpret kernels or train for long in this process."""
LONGEST = (
    "test_recipe_settings",
    "test_lamb_zero",
    "test_waits",
    "test_muon_zero",
    "test_task_settings",
    "test_family_runs",
    "test_benchmarks",
    "test_storms",
    "test_family_use",
    "test_family_kinds",
    "test_checkpoints",
    "test_pretrain",
    "test_elastic",
    "test_kernel_aot",
    "test_kernel_embedding",
    "test_hang_watchdog",
    "test_verbs",
    "test_doc_commands",
)
"""Files that begin first, so that two workers end at about the same time; a worker takes whole files."""
STARTERS = ("run_verb", "run_ranks", "run_forked", "weather", "subprocess", "Desk", "Workshop", "make_workshop", "must")
"""Names by which a test module starts processes."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what `make test-fast` leaves out."""
    module = item.getparent(pytest.Module)
    assert module is not None
    if module.name.startswith(SLOW) or any(hasattr(module.obj, name) for name in STARTERS):
        item.add_marker("slow")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the others keep their order."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained folder of a two-layer BERT, made once."""
    from downstream_cases import write_tiny_export

    return write_tiny_export(tmp_path_factory.mktemp("export") / "hf")
