"""The kernels as machine code for cards that need not be here: the rules, and the figures of the committed table."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

from forked_verbs import run_text

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "kernels/benchmarks"
TABLE = ROOT / "kernels/benchmarks/results/aot.csv"


def recorded_rows() -> list[dict[str, str]]:
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


CHECKS = """
import sys, aot_table
codes = []
for words in {runs}:
    sys.argv[1:] = ["--check", *words]
    codes.append(aot_table.main())
sys.exit(max(codes))
"""


def check_table(*runs: tuple[str, ...]) -> None:
    """Compare kernels with the table, in one process of their own: this one may have bound them to the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Behind what is there: that may hold another triton.
    paths = (os.environ.get("PYTHONPATH", ""), str(ROOT / "kernels"), str(BENCHMARKS))
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-c", CHECKS.format(runs=runs)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    architectures = {line.partition(",")[0] for line in result.stdout.splitlines()}
    assert architectures == {words[-1] for words in runs}, "no kernel was compiled"


REPRESENTATIVES = (
    "attention d=64 s=128 p=0.1 bfloat16",
    "attention d=64 s=512 p=0.1 bfloat16",
    "dropout_add_layer_norm p=0.1 d=1024 bfloat16",
    "dropout_add_layer_norm autocast p=0.1 d=1024",
    "dropout_add_then_norm p=0.0 d=1024 weight only bfloat16",
    "rotary d=64 bfloat16",
    "bias_gelu none f=3072 bfloat16",
    "geglu none f=2624 bias bfloat16",
    "mlm_cross_entropy v=30528 bfloat16",
    "embedding d=768 p=0.1 bfloat16",
    "lamb bfloat16 gradients",
)


def test_a_representative_of_each_operator_compiles_for_sm_90_as_well_as_recorded_and_attention_for_sm_80() -> None:
    check_table(
        ("--only", *REPRESENTATIVES, "--architectures", "sm_90"),
        ("--only", REPRESENTATIVES[1], "--architectures", "sm_80"),
    )


def test_the_representatives_hold_every_kernel_of_the_table() -> None:
    rows = recorded_rows()
    assert {row["kernel"] for row in rows if row["case"] in REPRESENTATIVES} == {row["kernel"] for row in rows}


def test_the_table_holds_both_compilers_and_all_architectures_and_no_kernel_that_spills() -> None:
    rows = recorded_rows()
    assert {(row["triton"], row["architecture"]) for row in rows} == {
        (triton, architecture) for triton in ("3.6.0", "3.7.1") for architecture in ("sm_80", "sm_90", "sm_100")
    }
    assert all(row["spills"] == row["stack_bytes"] == "0" for row in rows)


def test_a_figure_above_the_recorded_one_fails_the_check() -> None:
    script = (
        "from aot_table import *\n"
        "row = Row('3.6.0', 'sm_90', 'case', 'kernel', Figures(128, 0, 0, 65536, 8, 16, 1000, 500, 3))\n"
        "old = dict(registers='120', stack_bytes='0', spills='0', shared_bytes='65536', instructions='995')\n"
        "old['loop_instructions'] = '499'\n"
        "print(worse_figures(row, {row.key: old}))\n"
    )
    result = run_text(script, BENCHMARKS)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['registers rose from 120 to 128']"
