"""The bars and the pictures of the benchmarks, on rows that are made up here."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path

from forked_verbs import run_text, run_verb

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "kernels/benchmarks"
FACTS = {"time": "2020-01-02", "gpu": "made up", "torch": "1", "triton": "2", "commit": "abc"}
OPS = [
    # 4 * 64 * 512^2 * 12 * 64 FLOPs.
    ("attention", "N=64 S=512 H=12 K=64 p=0.0", "ours", "forward", 51539607552, 150.0, 40.0),
    ("attention", "N=64 S=512 H=12 K=64 p=0.1", "ours", "forward", 51539607552, 200.0, 30.0),
    ("attention", "N=64 S=512 H=12 K=64 p=0.1", "sdpa flash", "both", 180388626432, 700.0, 20.0),
    ("mlm_cross_entropy", "P=4915 V=30528 D=1024", "ours", "both", 0, 105.0, 50.0),
    ("mlm_cross_entropy", "P=4915 V=30528 D=1024", "gemms alone", "both", 0, 100.0, 55.0),
    ("lamb", "BERT-large E=3", "ours", "step", 0, 100.0, 85.0),
]
STEPS = [("large", "half_full_512", "ours", 240000), ("large", "half_full_512", "transformers compiled", 170000)]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def made_up(folder: Path) -> Path:
    """Write records, the first row of another commit, and return the folder."""
    results = folder / "results"
    results.mkdir()
    names = ("op", "shape", "provider", "mode", "flops", "p50_us", "roofline_percent")
    ops = [FACTS | dict(zip(names, map(str, row), strict=True)) for row in OPS]
    write(results / "ops.csv", [ops[0] | {"time": "2020-01-01", "commit": "old", "p50_us": "1.0"}, *ops])
    names = ("model", "batch", "provider", "tokens_per_s")
    write(results / "train_step.csv", [FACTS | dict(zip(names, map(str, row), strict=True)) for row in STEPS])
    return results


def plot(results: Path, readme: Path) -> subprocess.CompletedProcess[str]:
    return run_verb(BENCHMARKS / "plot_results.py", "--results", results, "--readme", readme)


def test_rows_become_pictures_and_a_table_of_bars_between_the_marks(tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", made_up(tmp_path)
    readme.write_text("before\n<!-- figures -->\nstale\n<!-- end of figures -->\nafter\n")
    for _ in range(2):
        assert plot(results, readme).returncode == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- figures -->\n`kernels/benchmarks/bench_ops.py`: gpu made up, torch 1,")
    assert text.endswith("\n<!-- end of figures -->\nafter\n") and "stale" not in text
    for line in (
        "| attention N=64 S=512 H=12 K=64 p=0.0 forward | at least 330 TFLOP/s | 343.6 | holds |",
        "| attention N=64 S=512 H=12 K=64 p=0.1 forward | at least 270 TFLOP/s | 257.7 | missed |",
        "| attention N=64 S=512 H=12 K=64 p=0.1 both | at least 230 TFLOP/s |  | not measured |",
        "| lamb BERT-large step | at least 85 % of 42 bytes per parameter | 85 | holds |",
        "| mlm_cross_entropy P=4915 D=1024, time of its GEMMs | at most 1.1 x | 1.05 | holds |",
        "| BERT-large step, S=512, mean 256 | at least 232,000 tokens/s | 240,000 | holds |",
        "| BERT-large step, against compiled transformers | at least 1.5 x | 1.412 | missed |",
    ):
        assert line in text, line
    pictures = {path.name for path in results.glob("*.svg")}
    assert pictures == {"ops_attention.svg", "ops_mlm_cross_entropy.svg", "ops_lamb.svg", "train_step.svg"}
    assert all(f"(results/{name})" in text for name in pictures)
    assert "gemms alone" in (results / "ops_mlm_cross_entropy.svg").read_text()


def test_without_rows_the_section_says_so(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- figures -->\n<!-- end of figures -->\n")
    assert plot(tmp_path, readme).returncode == 0
    assert readme.read_text() == (
        "<!-- figures -->\nNo figure of a GPU has been recorded yet.\n<!-- end of figures -->\n"
    )


def test_a_readme_without_the_marks_is_refused(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n")
    result = plot(tmp_path, readme)
    assert (
        result.returncode != 0 and "must hold <!-- figures --> and <!-- end of figures --> once each" in result.stderr
    )
    assert readme.read_text() == "nothing\n"


def test_the_section_of_the_shipped_readme_is_what_the_shipped_records_give(tmp_path: Path) -> None:
    script = """
from plot_results import *
text = README.read_text()
assert with_section(text, section(RESULTS, "benchmarks/results")) == text
"""
    result = run_text(script, BENCHMARKS)
    assert result.returncode == 0, result.stderr
