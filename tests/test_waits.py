"""Nothing in a training step waits for a card, seen without one: `fake_steps` runs all steps in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import COMPILER, built_guard
from fake_plants import PLANTS, Plant

pytestmark = pytest.mark.skipif(COMPILER is None, reason="the guard needs a C++ compiler")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what waits in each case."""
    built_guard()
    out = tmp_path_factory.mktemp("waits") / "found.json"
    command = [sys.executable, str(Path(__file__).with_name("fake_cuda.py")), "fake_steps", str(out)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


def test_no_step_waits_and_no_reason_is_stale(found: dict[str, Any]) -> None:
    planted = {plant.name for plant in PLANTS}
    waiting = {name: case["waits"] or case["error"] for name, case in found.items() if name not in planted}
    assert {name: waits for name, waits in waiting.items() if waits} == {}
    reasons = {name: {file for file, _ in case["used"]} for name, case in found.items() if name not in planted}
    for name, files in reasons.items():
        wanted = {"kernels/bert_kernels/attention_reference.py"} if "kernels=torch" in name else set()
        wanted |= {"bert_ds/training/loop/train_step.py"} if "stage 0" in name else set()
        assert files == wanted, name
    words = ("pretrain bert", "pretrain bert, pre-norm", "pretrain modernbert, recompute", "stage 0 bert, lion")
    for word in (*words, "pretrain electra, replaced tokens"):
        assert word in found


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_planted_wait_is_named(plant: Plant, found: dict[str, Any]) -> None:
    file = plant.module.replace(".", "/") + ".py"
    file = file if file.startswith("bert_ds") else f"kernels/{file}"
    waits = found[plant.name]["waits"]
    assert {(wait["file"], wait["function"]) for wait in waits} == {(file, plant.function.rpartition(".")[2])}
    assert all(f".{plant.operator}." in wait["operator"] for wait in waits), waits


def test_the_guard_is_compiled_once_and_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    first = built_guard()
    changed = first.stat().st_mtime_ns
    assert built_guard() == first and first.stat().st_mtime_ns == changed
    assert list(tmp_path.iterdir()) == [first]
