"""Say how a run went, from its folder: in a line or two, or as one HTML page with figures.

    python bert_ds/report.py --run_dir runs/default
    python bert_ds/report.py --run_dir runs/default --html

--html writes report.html, which needs no other file, and the same pictures as figures/*.png: losses, rates, gradient
norm, speed, evaluations and, with LAMB, the trust ratios and update norms of every kind of layer. It needs matplotlib.

--require_below_unigram NATS ends with exit code 5 unless the last validation loss at [MASK] is that far below the
cross-entropy of a model that knows only how frequent each piece is: a run above that line has not learned from context.
Exit code 3 where there is no such figure, as in a run that an earlier version has finished; it says how to get one.
"""

from __future__ import annotations

import os
from pathlib import Path

from bert_ds.basics.ranks import DivergedError
from bert_ds.basics.whole_files import write_text
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.folders.kept_files import keeping_files
from bert_ds.folders.output_folders import claim_run_folder, open_run_folder
from bert_ds.launch.command_line import run_main
from bert_ds.launch.verbs import verb_parser
from bert_ds.reporting.run_figures import draw_figures
from bert_ds.reporting.run_history import RunHistory, below_unigram, read_history, summary_lines
from bert_ds.reporting.run_page import is_page, render_page

PAGE = "report.html"


def main() -> None:
    parser = verb_parser("report")
    parser.add_argument("--run_dir", type=Path, required=True, help="folder of the run")
    parser.add_argument("--html", action="store_true", help="write report.html and figures/*.png into the folder")
    parser.add_argument("--require_below_unigram", type=float, metavar="NATS", help="fail unless this far below")
    args = parser.parse_args()
    if args.html:
        claim_run_folder(args.run_dir)
        if os.path.lexists(page := args.run_dir / PAGE) and not is_page(page):
            raise ConfigError(f"{page} is not a page of report.py: give it another name; nothing was touched")
    history = read_history(args.run_dir)
    for line in summary_lines(history):
        print(line)
    if args.html:
        print(write_report(history))
    wanted = args.require_below_unigram
    if wanted is not None and not (below := below_unigram(history)) >= wanted:  # NaN is no loss below anything
        raise DivergedError(
            f"the validation loss at [MASK] is {below:.3f} nats below the unigram cross-entropy, wanted at "
            f"least {wanted}"
        )


def write_report(history: RunHistory) -> Path:
    """Write page and pictures into the run folder and return the path of the page."""
    pictures, run_dir = draw_figures(history), history.run_dir
    files = {f"figures/{picture.name}.png": picture.png for picture in pictures}
    open_run_folder(run_dir)
    with keeping_files(run_dir, [*files, PAGE]):
        (run_dir / "figures").mkdir(exist_ok=True)
        for name, png in files.items():
            (run_dir / name).write_bytes(png)
        write_text(run_dir / PAGE, render_page(history, pictures))
    return run_dir / PAGE


if __name__ == "__main__":
    run_main(main)
