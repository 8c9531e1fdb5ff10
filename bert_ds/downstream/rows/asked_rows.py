"""Rows to be answered, one at a time: a line each, JSON lines, CSV; and their answers as JSON lines or CSV.

A row that cannot be read is a `Fault`, so that one of them never ends the reading of a file.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.reading.config_problems import did_you_mean

FORMATS = {".txt": "txt", ".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv"}


class Fault(NamedTuple):
    """In place of a row that could not be read."""

    text: str


def format_of(name: str, *, default: str) -> str:
    """Return the format that the ending of a file stands for; the default for "-" and what is unknown."""
    return FORMATS.get(Path(name).suffix.lower(), default)


def read_rows(stream: TextIO, kind: str, *, columns: Mapping[str, str], name: str) -> Iterator[Any]:
    """Yield every row as a text, an object of fields, or a `Fault`.

    Args:
        stream: text, opened with newline="".
        kind: txt (a text a line), jsonl (an object or a text a line) or csv (with a header).
        columns: field -> column that holds it; a field that is not named has the column of its own name.
        name: of the file, for messages.

    Raises:
        DataError: a CSV has no column that was named.
    """
    if kind == "csv":
        yield from _csv_rows(stream, columns, name)
        return
    for line in stream:
        line = line.rstrip("\r\n")
        yield line if kind == "txt" else _json_row(line, columns)


def answer_lines(
    answers: Sequence[Mapping[str, Any]], first: int, *, kind: str, fields: Sequence[str], with_header: bool
) -> str:
    """Return answers as the text that is added to a file.

    Args:
        answers: of the rows from number `first` on, counted from 0.
        first: see above.
        kind: jsonl or csv.
        fields: of an answer, the columns of a CSV; `error` is one more.
        with_header: the CSV begins here.
    """
    rows = [{"row": first + number, **answer} for number, answer in enumerate(answers)]
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    names = ("row", *fields, "error")
    if with_header:
        writer.writerow(names)
    writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
    return text.getvalue()


def _csv_rows(stream: TextIO, columns: Mapping[str, str], name: str) -> Iterator[Any]:
    csv.field_size_limit(1 << 26)
    reader = csv.reader(stream, strict=True)
    header: list[str] | None = None
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except (csv.Error, UnicodeDecodeError) as error:
            yield Fault(f"not CSV: {error}")
            continue
        if header is None:
            header = [column.strip().removeprefix("\ufeff") for column in row]
            for column in columns.values():
                if column not in header:
                    raise DataError(f'{name}: no column "{column}"; there are {header}{did_you_mean(column, header)}')
        elif row and len(row) != len(header):
            yield Fault(f"found {len(row)} columns, wanted {len(header)}")
        elif row:
            yield _named(dict(zip(header, row, strict=True)), columns)


def _json_row(line: str, columns: Mapping[str, str]) -> Any:
    if not line.strip():
        return Fault("the line is empty")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Fault(f"not JSON: {error}")
    return _named(value, columns) if isinstance(value, dict) else value


def _named(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return a row under the names of the fields."""
    renamed = {field: values[column] for field, column in columns.items() if column in values}
    return {**{name: value for name, value in values.items() if name not in columns.values()}, **renamed}


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)
