"""Draw the recorded rows and put the pictures and the table of bars into kernels/README.md.

    python kernels/benchmarks/plot_results.py

Only rows of the newest GPU, versions and commit are drawn. Without any row the README says that there is none.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from bench_bars import CIRCUMSTANCES, Record, bars_table, newest
from bench_harness import RESULTS, read_rows
from matplotlib import pyplot

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
NOTHING = "No figure of a GPU has been recorded yet."


def draw_op(rows: Record, path: Path) -> None:
    """Draw the percent of the roofline of every provider at every shape, for forward and backward together."""
    rows = [row for row in rows if row["mode"] in ("both", "step")]
    percent = {(row["shape"], row["provider"]): float(row["roofline_percent"]) for row in rows}
    _draw(percent, path, f"{rows[0]['op']}, {rows[0]['mode']}: percent of the roofline")


def draw_steps(rows: Record, path: Path) -> None:
    """Draw the non-padding tokens per second of every provider on every batch."""
    tokens = {(f"{row['model']} {row['batch']}", row["provider"]): float(row["tokens_per_s"]) for row in rows}
    _draw(tokens, path, "training step: non-padding tokens per second")


def _draw(values: dict[tuple[str, str], float], path: Path, title: str) -> None:
    """Draw a group of bars for each first key, a bar for each second one; what was not measured has none."""
    groups, names = list(dict.fromkeys(key[0] for key in values)), list(dict.fromkeys(key[1] for key in values))
    figure, axes = pyplot.subplots(figsize=(9, 1.0 + 0.18 * len(groups) * (len(names) + 1)))
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [(g, values[group, name]) for g, group in enumerate(groups) if (group, name) in values]
        axes.barh([g + i * height for g, _ in places], [value for _, value in places], height, label=name)
    axes.set_yticks([g + 0.4 - height / 2 for g in range(len(groups))], groups)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.legend(fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Neither a date nor random ids: the same rows give the same file.
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def section(results: Path, folder: str) -> str:
    """Draw everything and return the README's section; `folder` is where the README finds the pictures."""
    ops, steps = newest(read_rows(results / "ops.csv")), newest(read_rows(results / "train_step.csv"))
    if not ops and not steps:
        return NOTHING
    lines = []
    for rows, command in ((ops, "bench_ops.py"), (steps, "bench_train_step.py")):
        if rows:
            about = ", ".join(f"{name} {rows[0][name]}" for name in CIRCUMSTANCES)
            lines += [f"`kernels/benchmarks/{command}`: {about}.", ""]
    lines += [*bars_table(ops, steps), ""]
    for op in dict.fromkeys(row["op"] for row in ops if row["mode"] in ("both", "step")):
        draw_op([row for row in ops if row["op"] == op], results / f"ops_{op}.svg")
        lines.append(f"![{op}]({folder}/ops_{op}.svg)")
    if steps:
        draw_steps(steps, results / "train_step.svg")
        lines.append(f"![training step]({folder}/train_step.svg)")
    return "\n".join(lines).rstrip()


def with_section(readme: str, text: str) -> str:
    """Return the README with the text between its two marks.

    Raises:
        ValueError: the marks are not there.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"the README must hold {BEGIN} and {END} once each")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    """Parse, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records and pictures")
    parser.add_argument("--readme", type=Path, default=README)
    args = parser.parse_args()
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "bert_kernels"
    folder = args.results.resolve().relative_to(args.readme.resolve().parent).as_posix()
    text = section(args.results, folder)
    args.readme.write_text(with_section(args.readme.read_text(), text))
    print(text)


if __name__ == "__main__":
    main()
