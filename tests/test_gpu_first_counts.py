"""What of the kernel tests on a first card becomes rows."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from test_gpu_first import benchmarks_importable, first, run

__all__ = ["benchmarks_importable", "first"]


@pytest.mark.parametrize(
    ("printed", "counts"),
    [
        (
            ".....s   [100%]\n5 passed, 1 skipped, 13 deselected in 75.31s (0:01:15)\n",
            "5 passed 1 skipped 13 deselected",
        ),
        ("..F\n=== FAILURES ===\n1 failed, 2 passed in 3.0s\n", "1 failed 2 passed"),
        ("FFFFF\n!!! stopping after 5 failures !!!\n5 failed in 3.0s\n", "5 failed"),
        ("no tests ran in 0.01s\n", ""),
        ("......F. [ 40%]\n..s", "9 passed 1 failed 1 skipped"),
    ],
    ids=["passed", "failed", "all failed", "none", "stopped"],
)
def test_the_row_of_the_kernel_tests_has_pytests_counts(
    first: ModuleType, tmp_path: Path, printed: str, counts: str
) -> None:
    from gpu_first_stages import Stage

    words = counts.split()
    wanted = [(f"tests {name}", number, "") for number, name in zip(words[::2], words[1::2], strict=True)]
    script = ("-c", f"print({printed!r}, end='')", "pytest")
    assert run(first, Stage("tests", 30.0, (script,)), tmp_path).figures == wanted
    assert run(first, Stage("others", 30.0, (script[:2],)), tmp_path).figures == []
