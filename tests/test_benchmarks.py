"""The benchmark scripts: they run anywhere with --dry_run, write nothing there, and their arithmetic is right."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from forked_verbs import run_text, run_verb

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "kernels/benchmarks"


def start(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a benchmark in the interpreter."""
    paths = (os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "kernels"), str(BENCHMARKS))
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    return run_verb(BENCHMARKS / script, *arguments, env=environment)


def test_a_dry_run_calls_every_provider_of_every_operator_and_step_and_writes_nothing(tmp_path: Path) -> None:
    result = start("bench_gpu.py", "--dry_run", "--results", str(tmp_path))
    assert result.returncode == 0, result.stderr
    ops = ("attention", "rotary", "layer_norm", "bias_gelu", "geglu", "mlm_cross_entropy", "embedding", "lamb")
    ran = {
        tuple(line.split()[:: len(line.split()) - 1]) for line in result.stdout.splitlines() if line.endswith(" ran")
    }
    assert {(op, "ran") for op in (*ops, "tiny")} == ran
    for provider in ("torch eager", "torch compile", "sdpa math", "gemms alone", "ours compiled", "transformers eager"):
        assert provider in result.stdout, provider
    assert result.stdout.count("not measured") == 15
    assert list(tmp_path.iterdir()) == []


def test_the_references_run_on_a_cpu_at_small_sizes(tmp_path: Path) -> None:
    result = start("bench_ops.py", "--on_cpu", "--dry_run", "--results", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "torch padded sdpa" in result.stdout and "left out" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_host_time_of_every_operator_is_taken_of_two_versions_in_turns(tmp_path: Path) -> None:
    against = ("--against", "HEAD") if (ROOT / ".git").exists() else ()
    result = start("bench_host_time.py", "--dry_run", "--results", str(tmp_path), *against)
    assert result.returncode == 0, result.stderr
    launches = {}
    for line in result.stdout.splitlines():
        subject, mode, _commit, number, _, _time, _us = line.rsplit(maxsplit=6)
        launches.setdefault((subject.strip(), mode), []).append(int(number))
    assert {len(numbers) for numbers in launches.values()} == {2 if against else 1}
    ops = ("attention", "rotary", "layer_norm", "bias_gelu", "geglu", "mlm_cross_entropy", "embedding")
    assert {(op, mode) for op in ops for mode in ("forward", "backward")} <= set(launches)
    # Attention, two LayerNorms and a GELU; backward each of the last three adds partial sums up in a second one.
    assert launches["layer of bert", "forward"][-1] == 4 and launches["layer of bert", "backward"][-1] == 7
    assert list(tmp_path.iterdir()) == []


def test_the_most_important_cases_come_first_and_a_second_call_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    script = f"""
import itertools, time
from bench_ops import *
def case(op, priority):
    make, providers = (lambda: Inputs(())), {{"ours": lambda x: None, "other": lambda x: None}}
    return Case(op, "s", make, providers, Work(1, 0), Work(0, 0), priority, differentiable=False)
class TwoCases(Budget):
    def __init__(self):
        self.left = 2
    def allows(self, seconds):
        self.left -= 1
        return self.left >= 0
facts = {{"time": "t", "gpu": "g", "torch": "1", "triton": "2", "commit": "abc"}}
path, cases = Path({str(tmp_path)!r}) / "ops.csv", [case("b", 2), case("c", 3), case("a", 1)]
def bench(facts):
    known = recorded(path, facts, ("op", "shape", "provider"))
    return Bench(torch.device("cpu"), facts, Ceilings(1e9, 1e12), TwoCases(), known, False)
assert time_all(cases, bench(facts), path) == 1
from bench_harness import read_rows
assert [(row["op"], row["provider"]) for row in read_rows(path)] == [(o, p) for o in "ab" for p in ("ours", "other")]
assert time_all([case("c", 0), *cases[:1]], bench(facts), path) == 0
assert [row["op"] for row in read_rows(path)] == ["a", "a", "b", "b", "c", "c"]
# Of other circumstances, or of a commit with changes, nothing counts as done.
for other in ({{"gpu": "h"}}, {{"commit": "abd"}}, {{"commit": "abc+"}}, {{"commit": "unknown"}}):
    assert recorded(path, facts | other, ("op",)) == set()
"""
    result = run_text(script, BENCHMARKS)
    assert result.returncode == 0, result.stderr


def test_an_operator_whose_tests_fail_is_named_and_one_that_passed_is_not_tested_again(tmp_path: Path) -> None:
    script = f"""
from bench_harness import *
facts = {{"time": "t", "gpu": "g", "torch": "1", "triton": "2", "commit": "abc"}}
folder = Path({str(tmp_path)!r})
# There is tests/test_kernel_numerics.py, and no such file of the other.
assert red_ops(["numerics", "of_nothing"], facts, folder) == ["of_nothing"]
assert [row["op"] for row in read_rows(folder / "tests_green.csv")] == ["numerics"]
assert red_ops(["numerics"], facts, folder) == []
assert len(read_rows(folder / "tests_green.csv")) == 1
"""
    result = run_text(script, BENCHMARKS)
    assert result.returncode == 0, result.stderr
    assert "test_kernel_of_nothing.py" in result.stderr


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
    result = run_text(script, BENCHMARKS)
    assert result.returncode == 0, result.stderr
