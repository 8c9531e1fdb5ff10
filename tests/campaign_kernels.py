"""Run the full matrix of kernel tests and check the machine code, and record what passed under which versions.

    python tests/campaign_kernels.py                                  with the triton that is installed
    PYTHONPATH=DIR python tests/campaign_kernels.py --only attention  with the one in DIR

A part is one test file, or the table of machine code. Each appends a line to tests/results/kernels.jsonl; a part that
passed with these versions, kernels and tests is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests/results/kernels.jsonl"
MACHINE_CODE = "machine code"
OPS = (
    "dropout_mask",
    "bias_gelu",
    "geglu",
    "rotary",
    "lamb",
    "layer_norm",
    "layer_norm_autocast",
    "mlm_cross_entropy",
    "embedding",
    "attention",
)


def main() -> int:
    """Run the parts that are left; return 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[*OPS, MACHINE_CODE], choices=[*OPS, MACHINE_CODE])
    args = parser.parse_args()
    facts = {"triton": triton.__version__, "torch": torch.__version__, "sources": sources()}
    failed = 0
    for part in args.only:
        if facts | {"part": part, "passed": True} in [_without_numbers(row) for row in read_results()]:
            print(f"{part}: passed already")
            continue
        start = time.time()
        passed, counts = run(part)
        row: dict[str, Any] = {**facts, "part": part, "passed": passed, **counts, "seconds": round(time.time() - start)}
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        failed += not passed
    return int(failed > 0)


def run(part: str) -> tuple[bool, dict[str, int]]:
    """Run a part; return whether it passed, and how many tests or kernels there were."""
    if part == MACHINE_CODE:
        return _run([str(ROOT / "kernels/benchmarks/aot_table.py"), "--check"], r"(?m)^sm_\d+,", "kernels")
    return _run(["-m", "pytest", "-q", "-m", "not gpu", f"tests/test_kernel_{part}.py"], None, "tests")


def _run(arguments: list[str], line: str | None, what: str) -> tuple[bool, dict[str, int]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = (os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "kernels"))
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-2000:], file=sys.stderr)
    found = re.findall(line, done.stdout) if line else _dots(done.stdout)
    return done.returncode == 0 and len(found) > 0, {what: len(found)}


def _dots(output: str) -> list[str]:
    """Return the marks of passed tests in pytest's lines of progress."""
    return [mark for text in re.findall(r"(?m)^([.sxFE]+)\s", output) for mark in text if mark == "."]


def read_results() -> list[dict[str, Any]]:
    """Return the recorded rows."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def _without_numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("triton", "torch", "sources", "part", "passed")}


def sources() -> str:
    """Return a digest of what is tested and of the tests, which no commit that changes other files changes."""
    digest = hashlib.sha256()
    tests = (ROOT / f"tests/test_kernel_{op}.py" for op in OPS)
    for path in (*sorted((ROOT / "kernels/bert_kernels").glob("*.py")), *tests):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
