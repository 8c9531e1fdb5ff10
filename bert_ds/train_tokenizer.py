"""Train a byte-level BPE or a Unigram tokenizer on text files; the same text always gives the same tokenizer.

Writes tokenizer.json and tokenizer_config.json, which transformers.AutoTokenizer loads. WordPiece: train_wordpiece.
"""

from __future__ import annotations

import argparse
import sys
import time

from bert_ds.corpus.text.documents import DocumentTexts
from bert_ds.corpus.text.input_files import KNOWN_NAMES, find_input_files
from bert_ds.corpus.tokenizer.subword_training import train_subwords
from bert_ds.launch.command_line import run_main, show_progress
from bert_ds.launch.verbs import verb_parser


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = verb_parser("train_tokenizer")
    add = parser.add_argument
    add("--kind", choices=["bpe", "unigram"], required=True, help="byte-level BPE, or Unigram over normalised text")
    add("--input", nargs="+", required=True, metavar="PATH", help=f"files or folders; {KNOWN_NAMES}")
    add("--output", required=True, metavar="DIR", help="tokenizer folder to make; new or empty")
    add("--vocab_size", type=int, required=True, metavar="N", help="number of pieces, the five special ones included")
    add("--marks", choices=["roberta", "bert"], default="roberta", help="special pieces: <s> </s>, or [CLS] [SEP]")
    add("--text_field", default="text", metavar="NAME", help="field of JSON lines, column of parquet (default text)")
    return parser.parse_args()


def main() -> None:
    """Train, and print what was trained."""
    args = parse_arguments()
    found = find_input_files(args.input)
    for path in found.skipped:
        print(f"skipped {path}", file=sys.stderr)
    texts = DocumentTexts(args.input, text_field=args.text_field)
    start, num_readings = time.monotonic(), 2 if args.kind == "unigram" else 1
    with show_progress("tokenizer", total=num_readings * sum(file.num_bytes for file in found.files)) as report:
        tokenizer = train_subwords(
            texts, kind=args.kind, vocab_size=args.vocab_size, marks=args.marks, output=args.output, report=report
        )
    print(
        f"{args.output}: {tokenizer.vocab_size:,} pieces in {time.monotonic() - start:.1f} s, "
        f"fingerprint {tokenizer.fingerprint}"
    )


if __name__ == "__main__":
    run_main(main)
