"""The tuner of tiles: what it leaves out without a GPU, and how it rewrites the source of the tables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from forked_verbs import run_text, run_verb

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "kernels/benchmarks"


def compiled(*command: str) -> subprocess.CompletedProcess[str]:
    """Run in a process of its own: the one of the tests may have bound the kernels to the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = (os.environ.get("PYTHONPATH", ""), str(ROOT / "kernels"), str(BENCHMARKS))
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def test_a_tile_that_spills_is_left_out_and_without_a_gpu_no_table_changes() -> None:
    script = """
from dataclasses import replace
from tune_tiles import *
subject = next(subject for subject in subjects() if subject.name == "ATTENTION dkdv/64")
tiles = [Tile(128, 64, 8, 1), Tile(32, 64, 8, 2)]
before = dict(subject.table)
assert tune(replace(subject, tiles=lambda architecture, size: iter(tiles)), "sm_80", has_gpu=False) is None
assert subject.table == before
"""
    result = compiled("-c", script)
    assert result.returncode == 0, result.stderr
    assert "Tile(block_m=128, block_n=64, num_warps=8, num_stages=1, max_registers=None): left out: " in result.stderr
    assert "bytes of stack" in result.stderr
    assert result.stdout.count("Tile(block_m=32, block_n=64, num_warps=8, num_stages=2") == 1
    assert "warps resident" in result.stdout and " us" not in result.stdout


def test_the_launches_that_count_are_timed_with_the_tile_that_is_tried() -> None:
    script = """
import kernel_cases
kernel_cases.NUM_TOKENS = 8
from tune_tiles import *
subject = next(subject for subject in subjects() if subject.name == "GEGLU bwd")
case, tile, cpu = kernel_cases.geglu_case(40, "none", has_bias=True), Tile(2, 16, 1, 1), torch.device("cpu")
with cpu:
    launches = launches_of(subject, case, "sm_90", tile, run=True)
assert [kernel_name(launch) for launch in launches] == ["geglu_bwd"] and launches[0].tile == tile
assert seconds(subject, case, "sm_90", tile, cpu) > 0
"""
    result = run_text(script, BENCHMARKS)
    assert result.returncode == 0, result.stderr


def test_what_cannot_be_tuned_is_refused() -> None:
    without_gpu = compiled(str(BENCHMARKS / "tune_tiles.py"), "--write", "--architecture", "sm_80")
    assert without_gpu.returncode != 0 and "--write needs a GPU of sm_80" in without_gpu.stderr
    unknown = run_verb(BENCHMARKS / "tune_tiles.py", "--tables", "ATTENTION fwd/65")
    assert unknown.returncode != 0 and "invalid choice: 'ATTENTION fwd/65'" in unknown.stderr


def test_every_table_of_the_package_can_be_rewritten_and_nothing_else_changes() -> None:
    script = """
from pathlib import Path
from bert_kernels import _tiles
from bert_kernels._tiles import Tile
from tile_source import with_rows
from tile_subjects import subjects

def tables(source):
    module = {"__name__": "bert_kernels._tiles"}
    exec(compile(source, "_tiles.py", "exec"), module)
    named = {("ATTENTION", key): table for key, table in module["ATTENTION"].items()}
    named |= {("GEGLU", key): table for key, table in module["GEGLU"].items()}
    return named | {(name,): module[name] for name in ("LAYER_NORM", "ROTARY", "BIAS_GELU", "MLM_CROSS_ENTROPY")}

source = Path(_tiles.__file__).read_text()
rows = ((77, Tile(64, 128, 4, 3)), (1 << 62, Tile(32, 64, 8, 2, 128)))
paths = [subject.path for subject in subjects()]
assert len(paths) == 17, paths
for path in paths:
    for architecture in ("sm_80", "sm_90", "sm_100", "default"):
        text = with_rows(source, path, architecture, rows)
        def plain(table):
            return {name: tuple((size, repr(tile)) for size, tile in value) for name, value in table.items()}
        expected = {name: plain(table) for name, table in tables(source).items()}
        expected[path] |= {architecture: tuple((size, repr(tile)) for size, tile in rows)}
        assert {name: plain(table) for name, table in tables(text).items()} == expected, (path, architecture)
        assert source.count("#") == text.count("#")
try:
    with_rows(source, ("ATTENTION", "fwd/65"), "sm_90", rows)
except ValueError as error:
    assert "no table ATTENTION fwd/65" in str(error)
else:
    raise AssertionError
"""
    result = run_text(script, BENCHMARKS)
    assert result.returncode == 0, result.stderr
