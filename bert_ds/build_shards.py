"""Turn text files into token shards: memory-mapped ids, a validation split and a manifest with checksums.

An interrupted build is continued by the same command; a finished one is found and left as it is.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from bert_ds.corpus.shards.build import DEFAULT_SETTINGS, BuildSettings, build_shards
from bert_ds.corpus.text.input_files import KNOWN_NAMES, find_input_files
from bert_ds.corpus.text.text_input import FileInput
from bert_ds.launch.command_line import run_main, show_progress
from bert_ds.launch.verbs import verb_parser


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = verb_parser("build_shards")
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help=f"files or folders; {KNOWN_NAMES}")
    add("--tokenizer", required=True, metavar="DIR", help="tokenizer folder, see train_wordpiece.py")
    add("--output", required=True, metavar="DIR", help="shard folder to make or to continue")
    add("--validation_fraction", type=float, metavar="F", help="share of the documents held out (default %(default)s)")
    add(
        "--workers", type=int, metavar="N", help="processes; never changes the result (default: %(default)s, all cores)"
    )
    add("--text_field", default="text", metavar="NAME", help="field of JSON lines, column of parquet (default text)")
    add("--tokens_per_shard", type=int, metavar="N", help="a shard ends after so many tokens (default %(default)s)")
    parser.set_defaults(workers=len(os.sched_getaffinity(0)), **DEFAULT_SETTINGS._asdict())
    return parser.parse_args()


def main() -> None:
    """Build, and print what was built."""
    args = parse_arguments()
    found = find_input_files(args.input)
    for path in found.skipped:
        print(f"skipped {path}", file=sys.stderr)
    text_input = FileInput(found.files, text_field=args.text_field)
    settings = BuildSettings(args.validation_fraction, args.tokens_per_shard)
    start = time.monotonic()
    with show_progress("shards", total=text_input.num_bytes) as report:
        manifest = build_shards(
            text_input, args.tokenizer, args.output, settings=settings, workers=args.workers, report=report
        )
    duration_s = time.monotonic() - start
    for split, record in manifest.splits.items():
        print(
            f"{split}: {record.num_documents:,} documents, {record.num_sentences:,} sentences, "
            f"{record.num_tokens:,} tokens, {record.num_unknown:,} unknown"
        )
    print(f"{args.output}: {text_input.num_bytes / 1e6:,.1f} MB of input in {duration_s:.1f} s")


if __name__ == "__main__":
    run_main(main)
