"""Remove from a text what it repeats, exactly or nearly, and what tasks are measured on.

    bert-ds clean_text --input corpus/ --output clean/
    bert-ds clean_text --input corpus/ --output clean/ --near 1.0 --against sst2 my_task.json --data DATA

clean/ is input for train_wordpiece and build_shards; clean/removed.tsv lists every document that was removed, why, and
which one it repeats. An interrupted cleaning is continued by the same command, a finished one is left as it is.
Exit codes: 0 done, 2 configuration, 3 data, among that a text of which nothing is left.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bert_ds.configuration.task.task_config import load_task
from bert_ds.corpus.text.cleaning import REMOVED, CleaningSettings, clean, row_shingles
from bert_ds.corpus.text.input_files import KNOWN_NAMES, find_input_files
from bert_ds.corpus.text.text_input import FileInput
from bert_ds.downstream.rows.records import read_records
from bert_ds.launch.command_line import run_main, show_progress
from bert_ds.launch.verbs import verb_parser


def main() -> None:
    parser = verb_parser("clean_text")
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help=f"files or folders; {KNOWN_NAMES}")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make or to continue")
    add("--text_field", default="text", metavar="NAME", help="field of JSON lines, column of tables (default text)")
    settings = CleaningSettings()
    near = "similarity from which on a document is nearly another, 1.0: equal words alone (default %(default)s)"
    add("--near", type=float, default=settings.near, metavar="S", help=near)
    add("--against", nargs="+", default=[], metavar="TASK", help="tasks whose rows may not be in the text")
    add("--data", type=Path, help="folder of the tasks' data files (default: that of each task file)")
    overlap = "words in a row that a document may not share with a row (default %(default)s)"
    add("--overlap_words", type=int, default=settings.overlap_words, metavar="N", help=overlap)
    args = parser.parse_args()
    settings = CleaningSettings(args.near, args.overlap_words)
    against, num_short = row_shingles(held_out_texts(args.against, args.data), settings.overlap_words)
    if args.against:
        print(f"{len(against):,} runs of {settings.overlap_words} words of the tasks; {num_short:,} texts are shorter")
    found = find_input_files(args.input)
    for path in found.skipped:
        print(f"skipped {path}", file=sys.stderr)
    text_input = FileInput(found.files, text_field=args.text_field)
    start = time.monotonic()
    with show_progress("cleaning", total=text_input.num_bytes) as report:
        counts = clean(text_input, args.output, settings=settings, against=against, report=report)
    print(
        f"{args.output}: {counts.kept:,} documents kept, {counts.kept_bytes / 1e6:,.1f} MB; removed {counts.exact:,} "
        f"equal to another, {counts.near:,} nearly, {counts.overlap:,} with words of a task, listed in {REMOVED}; "
        f"{time.monotonic() - start:.1f} s"
    )


def held_out_texts(tasks: list[str], data: Path | None) -> Iterator[str]:
    """Yield every text of the rows that tasks are measured on: of the training files too where some are held out."""
    for name in tasks:
        task = load_task(name, data=data)
        own = task.data.train if task.data.validation_fraction is not None else ()
        for file in (*own, *task.data.validation, *task.data.test):
            for record in read_records(file):
                for value in record.values.values():
                    if isinstance(value, str):
                        yield value
                    elif isinstance(value, list) and all(isinstance(item, str) for item in value):
                        yield " ".join(value)


if __name__ == "__main__":
    run_main(main)
