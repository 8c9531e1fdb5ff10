"""Run the tests that depend on DeepSpeed's inside against another release than the pinned one.

    python tests/campaign_deepspeed.py                    the newest release
    python tests/campaign_deepspeed.py --version 0.19.7   that one
    python tests/campaign_deepspeed.py --folder PATH      a source tree, or a folder that holds an unpacked wheel

A release is unpacked into a folder for this run alone, which stands first on PYTHONPATH: nothing that is installed is
changed. One row per run is appended to tests/results/deepspeed.jsonl: the release, how many tests passed, which failed.
Failures of test_ds_keys.py say that the release knows other settings, not that a step would be wrong; they are listed
apart. Exit code 1 where any other test failed. About 10 core minutes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests/results/deepspeed.jsonl"
TESTS = (
    *("test_lamb_zero.py", "test_parameter_layout.py", "test_deepspeed_names.py", "test_zero_limits.py"),
    *("test_train_loop.py", "test_checkpoints.py", "test_elastic.py", "test_ds_keys.py"),
)


def main() -> int:
    """Parse, unpack, test, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", help="release of DeepSpeed (default: the newest)")
    parser.add_argument("--folder", type=Path, help="use this DeepSpeed instead of a release")
    parser.add_argument("tests", nargs="*", default=list(TESTS), help="test files (default: all that depend on it)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or unpack(args.version, Path(temporary))
        row = run_tests(folder.resolve(), args.tests)
    row["newest"] = args.version is None and args.folder is None
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))
    return 1 if row["failed"] or not row["num_passed"] else 0


def unpack(version: str | None, folder: Path) -> Path:
    """Install a release, and nothing it depends on, into a folder of its own; return the folder."""
    release = f"deepspeed=={version}" if version else "deepspeed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), release]
    subprocess.run(command, check=True, env={**os.environ, "DS_BUILD_OPS": "0", "PYTHONPATH": ""})
    return folder


def run_tests(folder: Path, tests: list[str]) -> dict[str, Any]:
    """Run the test files on the DeepSpeed of a folder and return what is recorded."""
    paths = [str(folder), str(ROOT), str(ROOT / "kernels")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "DS_ACCELERATOR": "cpu"}
    ask = "import deepspeed; print(deepspeed.__version__, deepspeed.__file__)"
    told = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    version, place = told.stdout.split()[-2:]
    if not Path(place).is_relative_to(folder):
        raise SystemExit(f"{folder} holds no DeepSpeed: {place} was imported; wanted a folder with deepspeed/ in it")
    command = [sys.executable, "-m", "pytest", "--tb=short", "-rfE", "-m", "not campaign and not gpu"]
    done = subprocess.run(
        [*command, *(f"tests/{Path(test).name}" for test in tests)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    print(done.stdout[-6000:], done.stderr[-2000:], sep="\n")
    passed = re.search(r"(\d+) passed", done.stdout)
    failed = sorted(set(re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)))
    return {
        "deepspeed": version,
        "torch": importlib.metadata.version("torch"),
        "tests": tests,
        "num_passed": int(passed[1]) if passed else 0,
        "failed": [test for test in failed if not test.startswith("test_ds_keys.py")],
        "settings_failed": [test for test in failed if test.startswith("test_ds_keys.py")],
        "unix_s": int(time.time()),
    }


if __name__ == "__main__":
    sys.exit(main())
