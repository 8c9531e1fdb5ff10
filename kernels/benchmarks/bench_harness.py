"""What the benchmarks share: cold-cache timing, ceilings measured in the same run, and rows appended to a record."""

from __future__ import annotations

import csv
import importlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
# Tokens of an example at 20 evenly spaced quantiles. English Wikipedia: 669 long articles, BERT's uncased vocabulary,
# examples of whole sentences of one article, short_seq_prob 0.1. Half full: evenly spread, mean 256.
WIKIPEDIA_512 = (60, 173, 291, 404, 458, 472, 479, 483, 487, 491, 493, 496, 498, 500, 502, 504, 506, 508, 510, 512)
WIKIPEDIA_128 = (36, 60, 78, 87, 93, 98, 101, 105, 107, 110, 112, 114, 116, 118, 120, 121, 123, 125, 126, 128)
HALF_FULL_512 = (13, 38, 64, 90, 115, 141, 166, 192, 218, 243, 269, 294, 320, 346, 371, 397, 422, 448, 474, 499)


_CIRCUMSTANCES = ("gpu", "torch", "triton", "commit")


class Quantiles(NamedTuple):
    """Times of one thing, seconds."""

    p20: float
    p50: float
    p80: float


class Ceilings(NamedTuple):
    """What this device reached in this run."""

    bytes_per_s: float
    """Copy of a tensor much larger than the cache, read and written bytes."""
    flops_per_s: float
    """Product of two large bf16 matrices."""


class Work(NamedTuple):
    """What an operation cannot do without."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Row:
    """One line of a record: who did what how fast, under which circumstances."""

    time: str
    gpu: str
    torch: str
    triton: str
    commit: str
    op: str
    shape: str
    provider: str
    mode: str
    p20_us: str
    p50_us: str
    p80_us: str
    bytes: str
    flops: str
    roofline_percent: str
    copy_bytes_per_s: str
    gemm_flops_per_s: str


@dataclass(frozen=True)
class GreenRow:
    """One line of the record of tests: those of an operator passed under these circumstances."""

    time: str
    gpu: str
    torch: str
    triton: str
    commit: str
    op: str


class Budget:
    """Wall-clock time that a command may take."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60.0 * minutes

    def allows(self, seconds: float) -> bool:
        """Return whether something that takes this long still fits."""
        return time.monotonic() + seconds <= self._end


def roofline_s(work: Work, ceilings: Ceilings) -> float:
    """Return the shortest time in which the work can be done."""
    return max(work.bytes / ceilings.bytes_per_s, work.flops / ceilings.flops_per_s)


def time_cold(function: Callable[[], Any], device: torch.device, *, dry_run: bool, rep_ms: int = 100) -> Quantiles:
    """Return the time of a call whose inputs are not in the GPU's cache; a CPU's is as it is. A dry run calls once."""
    if dry_run or device.type == "cpu":
        times = [_seconds(function) for _ in range(1 if dry_run else 12)]
        # The first two warm up.
        return Quantiles(*np.quantile(times[2:] or times, [0.2, 0.5, 0.8]).tolist())
    milliseconds = triton.testing.do_bench(function, warmup=25, rep=rep_ms, quantiles=[0.2, 0.5, 0.8])
    return Quantiles(*(1e-3 * each for each in milliseconds))


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_ceilings(device: torch.device, *, dry_run: bool) -> Ceilings:
    """Time a copy and a matrix product."""
    size = 64 if dry_run else 8192 if device.type == "cuda" else 2048
    source = torch.empty(size * size * (1 if dry_run else 8), dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copy = time_cold(lambda: target.copy_(source), device, dry_run=dry_run)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    gemm = time_cold(lambda: a @ b, device, dry_run=dry_run)
    return Ceilings(2 * source.numel() * source.element_size() / copy.p50, 2.0 * size**3 / gemm.p50)


def red_ops(ops: Sequence[str], facts: dict[str, str], results: Path) -> list[str]:
    """Run the tests of operators on this device, all at once, and return those whose tests fail.

    What passed is recorded; under the same circumstances it is not run again.
    """
    path = results / "tests_green.csv"
    waiting = [op for op in ops if (op,) not in recorded(path, facts, ("op",))]
    red = []
    with ExitStack() as stack:
        outputs = {op: stack.enter_context(tempfile.TemporaryFile("w+")) for op in waiting}
        running = {op: _start_tests(op, output) for op, output in outputs.items()}
        for op, process in running.items():
            if process.wait() == 0:
                append_rows(path, [GreenRow(**facts, op=op)])
                continue
            outputs[op].seek(0)
            print(outputs[op].read()[-4000:], file=sys.stderr)
            red.append(op)
    return red


def _start_tests(op: str, output: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not campaign and not gpu", f"tests/test_kernel_{op}.py"]
    return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)


def circumstances(device: torch.device, commit: str | None = None) -> dict[str, str]:
    """Return what a reader must know to repeat a measurement; the commit as git says where it is None."""
    found = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "gpu": _device_name(device)}
    return found | {"torch": torch.__version__, "triton": triton.__version__, "commit": commit or _commit()}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"cpu {models[0] if models else platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _commit() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if commit.returncode != 0:
        return "unknown"
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "kernels/*.py", "bert_ds"], cwd=ROOT)
    return commit.stdout.strip() + ("+" if changed.returncode else "")


def recorded(path: Path, facts: Mapping[str, str], columns: Sequence[str]) -> set[tuple[str, ...]]:
    """Return the values of columns of a record's rows of these circumstances; none of a commit with changes."""
    if not path.exists() or facts["commit"] == "unknown" or facts["commit"].endswith("+"):
        return set()
    return {
        tuple(row[column] for column in columns)
        for row in read_rows(path)
        if all(row[name] == facts[name] for name in _CIRCUMSTANCES)
    }


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a record, none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_rows(path: Path, rows: Sequence[Any]) -> None:
    """Append dataclasses to a record, which is never edited; a new file begins with the names of the columns.

    Raises:
        ValueError: the file has other columns.
    """
    if not rows:
        return
    names = [field.name for field in fields(rows[0])]
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    if not is_new:
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != names:
            raise ValueError(f"{path} has the columns {found}, wanted {names}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def lengths_of(histogram: tuple[int, ...], num_sequences: int) -> list[int]:
    """Return the lengths of num_sequences sequences spread over a histogram, longest first."""
    return sorted((histogram[i * len(histogram) // num_sequences] for i in range(num_sequences)), reverse=True)


def reason(error: Exception) -> str:
    """Return the beginning of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]


def importable(name: str) -> Any | None:
    """Return a module that need not be installed, or None; one that is broken counts as not installed."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return None
