"""All that one GPU can measure in a few minutes: the operators, whole steps, and the bars they are to reach.

    python kernels/benchmarks/bench_gpu.py                     9 minutes; run it again to go on where it stopped
    python kernels/benchmarks/bench_gpu.py --minutes 20 --results out
    TRITON_INTERPRET=1 python kernels/benchmarks/bench_gpu.py --dry_run    everything once at tiny sizes, writes nothing

Needs torch, triton, pytest, and for the whole steps transformers and pydantic; DeepSpeed is not needed. Where pydantic
is missing, `pip install --target DIR pydantic` elsewhere and DIR on PYTHONPATH do.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from bench_bars import bars_table
from bench_harness import RESULTS, ROOT, importable, read_rows

# The operators get this part of the time, the steps what is left.
_SHARE_OF_OPERATORS = 0.55


def run(script: str, *arguments: str) -> bool:
    """Run a benchmark in a process of its own, whose memory is free again afterwards; return whether it passed."""
    environment = dict(os.environ)
    paths = (str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    return subprocess.run(command, env=environment).returncode == 0


def main() -> int:
    """Parse, run both benchmarks, print the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--commit", help="what the rows say in a copy of the files that git does not know")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="tiny sizes on any device, writes nothing")
    args = parser.parse_args()
    start = time.monotonic()
    common = ["--results", str(args.results), *(["--dry_run"] if args.dry_run else [])]
    common += ["--commit", args.commit] if args.commit else []
    passed = run("bench_ops.py", *common, "--minutes", f"{args.minutes * _SHARE_OF_OPERATORS:.2f}")
    missing = [name for name in ("pydantic", "transformers") if importable(name) is None]
    if missing:
        print(f"no whole step: {' and '.join(missing)} cannot be imported", file=sys.stderr)
    else:
        minutes = args.minutes - (time.monotonic() - start) / 60.0
        passed &= run("bench_train_step.py", *common, "--minutes", f"{minutes:.2f}")
    print(*bars_table(read_rows(args.results / "ops.csv"), read_rows(args.results / "train_step.csv")), sep="\n")
    return 0 if passed and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
