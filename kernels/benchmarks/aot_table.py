"""Compile the shipped kernels for cards that are not here and write or check the table of their machine code.

    python kernels/benchmarks/aot_table.py                        print the table
    python kernels/benchmarks/aot_table.py --write                and write results/aot.csv
    python kernels/benchmarks/aot_table.py --check [--only TEXT ...]
        exit 1 where a rule is broken or a figure got worse

The rules for every kernel: no stack, no spills, shared memory within the card's limit, 16-byte loads, row offsets in
64 bits, and tensor-core instructions where it multiplies 16-bit matrices. A figure is compared
only with one of the same triton version.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from kernel_cases import Case, cases

from bert_kernels._launch import INTERPRETING, kernel_name, record_launches
from bert_kernels.compile_ahead import SHARED_LIMIT_BYTES, Figures, compile_launch

TABLE = Path(__file__).parent / "results" / "aot.csv"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# How far a figure may rise above the recorded one: other patch releases of ptxas move a few instructions.
_TOLERANCE = {
    "registers": 1.0,
    "stack_bytes": 1.0,
    "spills": 1.0,
    "shared_bytes": 1.0,
    "instructions": 1.02,
    "loop_instructions": 1.02,
}


@dataclass(frozen=True)
class Row:
    """One kernel of one case on one architecture."""

    triton: str
    architecture: str
    case: str
    kernel: str
    figures: Figures

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What identifies a row in the table."""
        return self.triton, self.architecture, self.case, self.kernel


def measure(case: Case, architecture: str) -> Iterator[Row]:
    """Compile the launches of a case."""
    with record_launches(architecture) as launches:
        case.run()
    for launch in launches:
        yield Row(
            triton.__version__, architecture, case.name, kernel_name(launch), compile_launch(launch, architecture)[0]
        )


def broken_rules(row: Row, case: Case) -> list[str]:
    """Return what the machine code of a kernel must not do."""
    figures, limit = row.figures, SHARED_LIMIT_BYTES[row.architecture]
    found = [
        (figures.stack_bytes > 0, f"{figures.stack_bytes} bytes of stack, none allowed"),
        (figures.spills > 0, f"{figures.spills} spills, none allowed"),
        (figures.shared_bytes > limit, f"{figures.shared_bytes} bytes of shared memory, the card has {limit}"),
        (case.multiplies and figures.tensor_core_ops == 0, "no tensor-core instruction"),
        (figures.loads_128 == 0, "no 16-byte load"),
        (figures.int64_products == 0, "no offset computed in 64 bits"),
    ]
    return [message for broken, message in found if broken]


def worse_figures(row: Row, recorded: dict[tuple[str, ...], dict[str, str]]) -> list[str]:
    """Return the figures that rose above the recorded ones of the same triton version."""
    old = recorded.get(row.key)
    if old is None:
        return [] if not any(key[0] == row.triton for key in recorded) else ["not in the table: run with --write"]
    return [
        f"{name} rose from {old[name]} to {value}"
        for name, value in asdict(row.figures).items()
        if name in _TOLERANCE and value > float(old[name]) * _TOLERANCE[name]
    ]


def read_table() -> dict[tuple[str, ...], dict[str, str]]:
    """Return the recorded rows by (triton, architecture, case, kernel)."""
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as file:
        return {(row["triton"], row["architecture"], row["case"], row["kernel"]): row for row in csv.DictReader(file)}


def write_table(rows: list[Row]) -> None:
    """Write the rows; those of other triton versions, and of cases that were not compiled now, stay."""
    measured, known = {row.case for row in rows}, {case.name for case in cases()}
    records = {
        key: old
        for key, old in read_table().items()
        if key[0] != triton.__version__ or (key[2] in known and key[2] not in measured)
    }
    for row in rows:
        names = dict(zip(("triton", "architecture", "case", "kernel"), row.key, strict=True))
        records[row.key] = names | {name: str(value) for name, value in asdict(row.figures).items()}
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(next(iter(records.values()))), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records.values())


def main() -> int:
    """Parse, compile, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--check", action="store_true", help="compare with the table")
    parser.add_argument("--only", nargs="+", default=[""], help="only the cases whose name holds one of these texts")
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=sorted(SHARED_LIMIT_BYTES))
    args = parser.parse_args()
    if INTERPRETING:
        raise SystemExit("TRITON_INTERPRET is set: kernels are Python there, unset it to compile them")
    recorded, rows, failures = read_table(), [], 0
    for case in (case for case in cases() if any(text in case.name for text in args.only)):
        for row in (row for architecture in args.architectures for row in measure(case, architecture)):
            rows.append(row)
            problems = broken_rules(row, case) + (worse_figures(row, recorded) if args.check else [])
            failures += len(problems)
            print(row.architecture, row.case, row.kernel, *asdict(row.figures).values(), *problems, sep=",", flush=True)
    if args.write:
        write_table(rows)
    return 1 if args.check and failures else 0


if __name__ == "__main__":
    sys.exit(main())
