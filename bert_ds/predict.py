"""Answer texts with a fine-tuned folder, or the ONNX file of one: labels, entities, answers or vectors.

    bert-ds predict --model runs/sst2/hf --input reviews.csv --columns text=review --output labels.csv
    cat questions.jsonl | bert-ds predict --model runs/squad2/hf --input_format jsonl > answers.jsonl

Each row has an answer, with its number: a row that cannot be answered an empty one and the reason. A prediction into a
file that was interrupted is continued by the same command. Exit codes: 0 done, 2 configuration, 3 data, 4 checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from bert_ds.launch.command_line import answer_early, run_main, show_progress
from bert_ds.launch.verb_arguments import predict_arguments

if __name__ == "__main__":
    answer_early(predict_arguments)

# Nothing here may reach for the network; transformers reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

from bert_ds.basics.ranks import DataError
from bert_ds.basics.whole_files import write_json
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.downstream.rows.asked_rows import answer_lines, format_of, read_rows
from bert_ds.downstream.tuning.predictor import ASKED, Predictor

ROWS_AT_ONCE = 1024
"""Rows of like length are sought among so many."""


def main() -> None:
    args = predict_arguments()
    columns = dict(word.split("=", 1) for word in args.columns)
    output = Output(args)
    predictor = Predictor(args.model)
    kind = args.input_format or format_of(args.input, default="txt")
    if kind == "txt" and predictor.kind in ASKED:
        wanted = " and ".join(ASKED[predictor.kind])
        raise ConfigError(f"--input {args.input}: {predictor.kind} wants rows with {wanted}: CSV or JSON lines")
    num_faults = 0
    try:
        with opened(args.input) as stream, show_progress("predicting", total=num_lines(args.input)) as report:
            rows = read_rows(stream, kind, columns=columns, name=args.input)
            for _ in itertools.islice(rows, output.num_rows):
                pass  # answered before
            while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
                answers = predictor(chunk, batch_size=args.batch_size)
                num_faults += sum("error" in answer for answer in answers)
                output.add(answers, predictor.fields)
                report(output.num_rows, f"{output.num_rows:,} rows")
        output.finish()
    except OSError as error:
        raise DataError(f"{error.filename or args.output}: {error.strerror or error}") from None
    told = f", {num_faults:,} of them could not be answered, see their error" * bool(num_faults)
    print(f"{output.num_rows:,} rows ({predictor.kind}) into {args.output}{told}", file=sys.stderr)


class Output:
    """The file of the answers, or standard output; a file beside it says how far it is until all is done."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.num_rows = self._num_bytes = 0
        self._kind = args.output_format or format_of(args.output, default="jsonl")
        self._path = None if args.output == "-" else Path(args.output)
        self._facts = {"model": str(args.model.absolute()), "input": _identity(args.input), "columns": args.columns}
        if self._path is None:
            return
        self._note = self._path.with_name(f".{self._path.name}.predicting")
        if self._path.exists():
            self._take_up(self._path)
        try:
            self._save("", self._path)
        except OSError as error:
            raise ConfigError(f"--output {self._path} cannot be written: {error.strerror or error}") from None

    def add(self, answers: list[dict[str, Any]], fields: tuple[str, ...]) -> None:
        """Write answers and say so."""
        has_begun = bool(self.num_rows)
        text = answer_lines(answers, self.num_rows, kind=self._kind, fields=fields, with_header=not has_begun)
        self.num_rows += len(answers)
        if self._path is None:
            sys.stdout.write(text)
            sys.stdout.flush()
        else:
            self._save(text, self._path)

    def finish(self) -> None:
        """Take away what says that the file is not whole."""
        if self._path is not None:
            self._note.unlink()

    def _take_up(self, path: Path) -> None:
        try:
            told = json.loads(self._note.read_bytes())
        except (OSError, ValueError):
            raise ConfigError(f"--output {path} is there already, and nothing was touched: wanted a new name") from None
        if told["facts"] != self._facts:
            raise ConfigError(f"--output {path} was begun with another model, input or columns: wanted a new name")
        self.num_rows, self._num_bytes = told["rows"], told["bytes"]

    def _save(self, text: str, path: Path) -> None:
        added = text.encode("utf-8")
        with path.open("ab") as file:
            file.truncate(self._num_bytes)
            file.write(added)
            file.flush()
            os.fsync(file.fileno())
        self._num_bytes += len(added)
        write_json(self._note, {"facts": self._facts, "rows": self.num_rows, "bytes": self._num_bytes})


def opened(name: str) -> TextIO:
    """Open the input; bytes that are no UTF-8 become marks in the text of their row."""
    if name == "-":
        return open(sys.stdin.fileno(), encoding="utf-8", errors="replace", newline="", closefd=False)
    return open(name, encoding="utf-8", errors="replace", newline="")


def num_lines(name: str) -> int | None:
    """Return the lines of a file, for the progress bar; None for standard input."""
    if name == "-":
        return None
    with open(name, "rb") as file:
        return sum(piece.count(b"\n") for piece in _pieces(file))


def _pieces(file: Any) -> Iterator[bytes]:
    while piece := file.read(1 << 20):
        yield piece


def _identity(name: str) -> list[Any]:
    if name == "-":
        return ["-"]
    found = os.stat(name)
    return [os.path.abspath(name), found.st_size, found.st_mtime_ns]


if __name__ == "__main__":
    run_main(main)
