"""The benchmark scripts: they run anywhere with --dry_run, write nothing there, and their arithmetic is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "kernels/benchmarks"


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", BENCHMARKS)))
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("script", "arguments", "wanted"),
    [
        ("bench_ops.py", ["--ops", "lamb", "bias_gelu"], ["lamb", "bias_gelu", "torch eager"]),
        ("bench_train_step.py", [], ["ours compiled", "transformers eager", "transformers compiled"]),
    ],
)
def test_a_dry_run_calls_every_provider_and_writes_nothing(
    script: str, arguments: list[str], wanted: list[str]
) -> None:
    records = [BENCHMARKS / "results" / name for name in ("ops.csv", "train_step.csv")]
    before = [path.stat().st_mtime_ns if path.exists() else None for path in records]
    result = run_python(str(BENCHMARKS / script), "--dry_run", *arguments)
    assert result.returncode == 0, result.stderr
    assert all(text in result.stdout for text in wanted), result.stdout
    assert [path.stat().st_mtime_ns if path.exists() else None for path in records] == before


def test_the_arithmetic_of_the_benchmarks() -> None:
    script = """
import tempfile
from dataclasses import dataclass
from pathlib import Path
from bench_harness import *
assert roofline_s(Work(8e9, 0), Ceilings(4e9, 1e12)) == 2.0
assert roofline_s(Work(8e9, 3e12), Ceilings(4e9, 1e12)) == 3.0
assert sum(HALF_FULL_512) / len(HALF_FULL_512) == 256.0
assert lengths_of((1, 2, 3), 6) == [3, 3, 2, 2, 1, 1]
@dataclass
class One:
    a: int
@dataclass
class Other:
    b: int
path = Path(tempfile.mkdtemp()) / "record.csv"
append_rows(path, [One(1)])
append_rows(path, [One(2), One(3)])
assert path.read_text() == "a\\n1\\n2\\n3\\n"
try:
    append_rows(path, [Other(4)])
except ValueError as error:
    assert "['a'], wanted ['b']" in str(error)
else:
    raise AssertionError
from bench_cases_ends import bert_tensor_sizes
# BERT-large with 30528 rows of words and its pooler, then the masked-LM head, then the pair head.
assert sum(bert_tensor_sizes(24, 1024)) == 335_148_032 + (1024 * 1024 + 3 * 1024 + 30528) + (2 * 1024 + 2)
"""
    result = run_python("-c", script)
    assert result.returncode == 0, result.stderr
