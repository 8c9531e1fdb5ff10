"""Rows of data files as they are published: TSV, CSV, JSON lines, plain lines, XML. Nothing is repaired in silence."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from bert_ds.configuration.config_problems import describe, did_you_mean
from bert_ds.configuration.task_data_config import Column, DataFile
from bert_ds.downstream.squad_files import read_squad
from bert_ds.downstream.tagged_files import read_conll, read_conllu
from bert_ds.ranks import DataError

MAX_BYTES = 1 << 31


class Record(NamedTuple):
    """One row of a file."""

    where: str
    """File and line, for messages."""
    values: Mapping[str, Any]
    """Column -> content; a column without a name has its number, as text."""


def read_records(file: DataFile) -> list[Record]:
    """Read a data file.

    Raises:
        DataError: the file is missing, is not in its format or encoding, or holds no row; the message names the line.
    """
    path = Path(file.path)
    rows = _READERS[file.format](path, _read_text(path, file.encoding), file)
    records = [Record(f"{path}:{line}", {**values, **file.values}) for line, values in rows]
    if not records:
        raise DataError(f"{path} holds no row, wanted at least one")
    return records


def pick(record: Record, column: Column | tuple[Column, ...]) -> Any:
    """Return the content of a column, or of the first of several that the row has.

    Raises:
        DataError: the row has no such column.
    """
    values = record.values
    for name in column if isinstance(column, tuple) else (column,):
        if isinstance(name, str) and name in values:
            return values[name]
        if isinstance(name, int) and -len(values) <= name < len(values):
            return list(values.values())[name]
    raise DataError(
        f"{record.where} has no column {describe(column)}, it has {', '.join(map(describe, values))}"
        f"{did_you_mean(column, values)}"
    )


def _read_text(path: Path, encoding: str) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; --data names the folder that data files are in") from None
    if len(content) > MAX_BYTES:
        raise DataError(f"{path} has {len(content)} bytes, wanted at most {MAX_BYTES}")
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f'{path}:{line}: byte {error.start} is no UTF-8; a file of Western text wants encoding "latin-1"'
        ) from None


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield numbered lines that are not empty; only \\n and \\r\\n end a line."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _read_tsv(path: Path, text: str, file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = ((number, line.split("\t")) for number, line in _lines(text))
    return _named_columns(path, rows, file.has_header)


def _read_csv(path: Path, text: str, file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)

    def rows() -> Iterator[tuple[int, list[str]]]:
        try:
            for row in reader:
                if row:
                    yield reader.line_num, row
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: {error}") from None

    return _named_columns(path, rows(), file.has_header)


def _named_columns(
    path: Path, rows: Iterator[tuple[int, Sequence[str]]], has_header: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    names: list[str] | None = None
    for number, row in rows:
        if names is None:
            names = [name.strip() for name in row] if has_header else [str(index) for index in range(len(row))]
            if len(set(names)) != len(names):
                raise DataError(f"{path}:{number}: two columns have the same name in {', '.join(names)}")
            if has_header:
                continue
        if len(row) != len(names):
            raise DataError(f"{path}:{number}: found {len(row)} columns, wanted {len(names)} ({', '.join(names)})")
        yield number, dict(zip(names, row, strict=True))


def _read_jsonl(path: Path, text: str, file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(text):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: found {describe(row)}, wanted an object")
        yield number, row


def _read_lines(path: Path, text: str, file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    pattern = re.compile(file.pattern or "(?P<text>.*)")
    for number, line in _lines(text):
        found = pattern.fullmatch(line)
        if found is None:
            raise DataError(f"{path}:{number}: {describe(line)} does not match {file.pattern}")
        yield number, found.groupdict()


def _read_xml(path: Path, text: str, file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    if "<!ENTITY" in text:
        raise DataError(f"{path} declares entities, wanted XML without them")
    try:
        root = ElementTree.fromstring(re.sub(r"^\s*<\?xml[^>]*\?>", "", text))
    except ElementTree.ParseError as error:
        raise DataError(f"{path}:{error.position[0]}: not XML: {error}") from None
    for number, element in enumerate(root.iter(file.record), start=1):
        children = {child.tag: "".join(child.itertext()) for child in element}
        yield number, {**{f"@{name}": value for name, value in element.attrib.items()}, **children}


_READERS: dict[str, Callable[[Path, str, DataFile], Iterator[tuple[int | str, dict[str, Any]]]]] = {
    "tsv": _read_tsv,
    "csv": _read_csv,
    "jsonl": _read_jsonl,
    "lines": _read_lines,
    "xml": _read_xml,
    "conll": read_conll,
    "conllu": read_conllu,
    "squad": lambda path, text, file: read_squad(path, text),
}
