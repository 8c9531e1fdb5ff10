"""The benchmark of unpad goes through every cell, and what it compares is the same model on the same batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels/benchmarks"))

import bench_unpad as bench


@pytest.mark.parametrize("call", bench.CALLS)
def test_a_cell_measures_both_ways_and_says_how_many_tokens_are_real(call: str) -> None:
    cell = bench.Cell("small", "even spread to 128", call, "fp32")
    facts = {name: "x" for name in ("time", "gpu", "torch", "triton", "commit")}
    rows = bench.measure(cell, torch.device("cpu"), facts, rounds=2, tiny=True)
    assert [row.way for row in rows] == ["plain", "unpad"]
    assert {(row.real_tokens, row.padded_tokens) for row in rows} == {(3 + 67, 256)}
    assert rows[0].ratio == "1.00" and float(rows[1].ratio_low) <= float(rows[1].ratio) <= float(rows[1].ratio_high)


def test_the_mix_of_short_texts_has_the_mean_of_its_source() -> None:
    lengths = bench.MIXES["short texts, padded to 128"][0]
    assert sum(lengths) / len(lengths) == pytest.approx(13.1)
