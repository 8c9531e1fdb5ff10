"""The kernels as machine code for cards that need not be here: the rules, and the figures of the committed table."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "kernels/benchmarks/results/aot.csv"


def check_table(*only: str) -> None:
    """Compile in a process of its own: the one of the tests may have bound the kernels to the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    command = [sys.executable, str(ROOT / "kernels/benchmarks/aot_table.py"), "--check"]
    result = subprocess.run(
        [*command, *(["--only", *only] if only else [])], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert result.stdout.count("\n") >= 1, "no kernel was compiled"


def test_attention_at_berts_shapes_compiles_for_sm_80_and_sm_90_as_well_as_recorded() -> None:
    check_table("attention d=64 s=128 p=0.1 bfloat16", "attention d=64 s=512 p=0.1 bfloat16")


@pytest.mark.campaign
def test_every_kernel_compiles_for_sm_80_and_sm_90_as_well_as_recorded() -> None:
    check_table()


def test_the_table_holds_no_kernel_that_spills() -> None:
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["architecture"] for row in rows} == {"sm_80", "sm_90"}
    assert all(row["spills"] == row["stack_bytes"] == "0" for row in rows)


def test_a_figure_above_the_recorded_one_fails_the_check() -> None:
    script = (
        "from aot_table import *\n"
        "row = Row('3.6.0', 'sm_90', 'case', 'kernel', Figures(128, 0, 0, 65536, 8, 16, 1000, 3))\n"
        "old = dict(registers='120', stack_bytes='0', spills='0', shared_bytes='65536', instructions='995')\n"
        "print(worse_figures(row, {row.key: old}))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT / "kernels"), str(ROOT / "kernels/benchmarks")))
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['registers rose from 120 to 128']"
