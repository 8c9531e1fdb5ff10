"""Try the legal tiles of the kernels and print, or write into `_tiles.py`, the fastest for this GPU.

    python kernels/benchmarks/tune_tiles.py --list                                       the tables
    python kernels/benchmarks/tune_tiles.py --architecture sm_100 --tables "ATTENTION fwd/64"
    python kernels/benchmarks/tune_tiles.py --write                                      all tables, on the GPU at hand

Every tile is compiled first, which needs no GPU: those with stack, spills, too much shared memory or no tensor-core
instruction where one belongs are left out. The others are timed on a GPU of that architecture. Where there is none the
survivors are printed with their machine-code figures and no table is changed: figures do not tell speed.

For developers: nothing is tuned at run time. Run `aot_table.py --write` and the tests after a change of tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from bench_harness import time_cold
from kernel_cases import Case
from tile_source import rows_text, with_rows
from tile_subjects import MULTIPROCESSORS, Subject, subjects

from bert_kernels import _tiles
from bert_kernels._launch import ARCHITECTURES, INTERPRETING, Launch, kernel_name, record_launches, start
from bert_kernels._tiles import Tile
from bert_kernels.compile_ahead import SHARED_LIMIT_BYTES, Figures, compile_launch

_REGISTERS_OF_MULTIPROCESSOR, _MOST_WARPS = 65536, 64
# What a block takes beside what it asks for (CUDA programming guide).
_SHARED_RESERVE_BYTES = 1024


@contextmanager
def tile_in_table(subject: Subject, architecture: str, tile: Tile) -> Iterator[None]:
    """Let a table hold one tile for an architecture."""
    table = subject.table
    before = table.get(architecture)
    table[architecture] = ((1 << 62, tile),)
    try:
        yield
    finally:
        del table[architecture]
        if before is not None:
            table[architecture] = before


def launches_of(subject: Subject, case: Case, architecture: str, tile: Tile, *, run: bool) -> list[Launch]:
    """Return the launches that count of a case with a tile."""
    with tile_in_table(subject, architecture, tile), record_launches(architecture, run=run) as launches:
        case.run()
    return [launch for launch in launches if kernel_name(launch) in subject.kernels]


def resident_warps(figures: Figures, num_warps: int, architecture: str) -> int:
    """Return how many warps share a multiprocessor, by registers and shared memory."""
    by_registers = _REGISTERS_OF_MULTIPROCESSOR // (32 * num_warps * -(-figures.registers // 8) * 8)
    shared = SHARED_LIMIT_BYTES[architecture] + _SHARED_RESERVE_BYTES
    by_shared = shared // (figures.shared_bytes + _SHARED_RESERVE_BYTES)
    return num_warps * min(by_registers, by_shared, _MOST_WARPS // num_warps)


def fault(figures: Figures, case: Case, architecture: str) -> str | None:
    """Return why a tile is left out, or None."""
    limit = SHARED_LIMIT_BYTES[architecture]
    found = [
        (figures.stack_bytes > 0, f"{figures.stack_bytes} bytes of stack"),
        (figures.spills > 0, f"{figures.spills} spills"),
        (figures.shared_bytes > limit, f"{figures.shared_bytes} bytes of shared memory, the card has {limit}"),
        (case.multiplies and figures.tensor_core_ops == 0, "no tensor-core instruction"),
    ]
    return next((reason for broken, reason in found if broken), None)


def survivors(subject: Subject, size: int, case: Case, architecture: str) -> Iterator[tuple[Tile, list[Figures]]]:
    """Compile the legal tiles and yield those without a fault; the others are printed."""
    for tile in subject.tiles(architecture, size):
        try:
            launches = launches_of(subject, case, architecture, tile, run=False)
            figures = [compile_launch(launch, architecture)[0] for launch in launches]
        except (RuntimeError, ValueError, triton.CompilationError) as error:
            figures, reasons = [], [str(error).strip().splitlines()[0][:90]]
        else:
            reasons = [reason for each in figures if (reason := fault(each, case, architecture))]
        if figures and not reasons:
            yield tile, figures
        else:
            print(f"  {tile}: left out: {'; '.join(reasons) or 'its kernels are not launched'}", file=sys.stderr)


def seconds(subject: Subject, case: Case, architecture: str, tile: Tile, device: torch.device) -> float:
    """Return the time of the launches that count, each with a cold cache; on a CPU one run is timed."""
    with device:
        launches = launches_of(subject, case, architecture, tile, run=True)
    times = (
        time_cold(lambda launch=launch: start(launch), device, dry_run=device.type == "cpu") for launch in launches
    )
    return sum(time.p50 for time in times)


def tune(subject: Subject, architecture: str, *, has_gpu: bool) -> tuple[tuple[int, Tile], ...] | None:
    """Print the survivors of every bucket; return the table's rows, or None where nothing was timed."""
    rows = []
    for size, case in subject.buckets:
        print(f"{subject.name} {architecture} {case.name}", flush=True)
        timed: list[tuple[float, Tile]] = []
        for tile, figures in survivors(subject, size, case, architecture):
            warps = min(resident_warps(each, tile.num_warps, architecture) for each in figures)
            about = " + ".join(map(_figures_text, figures))
            if has_gpu:
                timed.append((seconds(subject, case, architecture, tile, torch.device("cuda")), tile))
                about += f", {1e6 * timed[-1][0]:.1f} us"
            print(f"  {tile}: {about}, {warps} warps resident", flush=True)
        if timed:
            rows.append((size, min(timed, key=lambda pair: pair[0])[1]))
    return tuple(rows) or None


def _figures_text(figures: Figures) -> str:
    code = f"{figures.instructions} instructions ({figures.loop_instructions} in the loop)"
    return f"{figures.registers} registers, {figures.shared_bytes} B, {code}"


def architecture_here() -> str | None:
    """Return the architecture of this machine's GPU, None without one."""
    return ARCHITECTURES.get(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def parse(arguments: list[str] | None) -> Any:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [subject.name for subject in subjects()]
    parser.add_argument("--list", action="store_true", help="print the names of the tables and end")
    parser.add_argument("--tables", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--architecture", default=architecture_here(), choices=list(MULTIPROCESSORS))
    parser.add_argument("--write", action="store_true", help="write the fastest tiles into _tiles.py")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Parse, compile, time, print or write."""
    args = parse(arguments)
    if args.list:
        print(*(subject.name for subject in subjects()), sep="\n")
        return 0
    if INTERPRETING:
        raise SystemExit("TRITON_INTERPRET is set: kernels are Python there, unset it to compile them")
    if args.architecture is None:
        raise SystemExit("no GPU of a known architecture here: say --architecture sm_80, sm_90 or sm_100")
    has_gpu = architecture_here() == args.architecture
    if args.write and not has_gpu:
        raise SystemExit(f"--write needs a GPU of {args.architecture}: tiles are chosen by their time, none is here")
    path = Path(_tiles.__file__)
    for subject in (subject for subject in subjects() if subject.name in args.tables):
        rows = tune(subject, args.architecture, has_gpu=has_gpu)
        if rows is None:
            print(f"{subject.name}: nothing timed, the table stays as it is")
            continue
        print(f'{subject.name}: "{args.architecture}": {rows_text(rows)},')
        if args.write:
            path.write_text(with_rows(path.read_text(), subject.path, args.architecture, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
