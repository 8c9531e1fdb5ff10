"""Rows of data files as they are published: TSV, CSV, JSON lines, plain lines, XML. Nothing is repaired in silence."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from bert_ds.basics.input_gate import parse_json, read_text, split_lines, time_limit
from bert_ds.basics.ranks import DataError
from bert_ds.configuration.reading.config_problems import describe, did_you_mean
from bert_ds.configuration.task.task_data_config import MINED_FORMATS, Column, DataFile
from bert_ds.downstream.rows.neighbours import mined_rows
from bert_ds.downstream.rows.squad_files import read_squad
from bert_ds.downstream.rows.tagged_files import read_conll, read_conllu

MAX_BYTES = 1 << 31
MAX_XML_DEPTH = 64
PATTERN_S = 5.0
"""For matching a file with a pattern, and a microsecond for each of its characters: ten times what it takes."""


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
    if file.format in MINED_FORMATS:
        mined = [Record(where, {**values, **file.values}) for where, values in mined_rows(path, file.format)]
        return _not_empty(path, mined)
    advice = "; --data names the folder that data files are in"
    text = read_text(path, max_bytes=MAX_BYTES, error=DataError, encoding=file.encoding, advice=advice)
    rows = _READERS[file.format](path, text.removeprefix("\ufeff"), file)
    return _not_empty(path, [Record(f"{path}:{line}", {**values, **file.values}) for line, values in rows])


def _not_empty(path: Path, records: list[Record]) -> list[Record]:
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


def _lines(text: str, *, keep_empty: bool = False) -> Iterator[tuple[int, str]]:
    """Yield numbered lines; those that are empty only where an empty line is a row, and never at the end."""
    for number, line in enumerate(split_lines(text.rstrip("\r\n")), start=1):
        if keep_empty or line.strip():
            yield number, line


def _read_tsv(path: Path, text: str, file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    # With one column an empty line is a row: left out, the rows behind it would change their numbers.
    has_one_column = "\t" not in next(split_lines(text), "")
    rows = ((number, line.split("\t")) for number, line in _lines(text, keep_empty=has_one_column))
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
                raise DataError(f"{path}:{number}: two columns have the same name in {', '.join(names)[:300]}")
            if has_header:
                continue
        if len(row) != len(names):
            raise DataError(
                f"{path}:{number}: found {len(row)} columns, wanted {len(names)} ({', '.join(names)[:300]})"
            )
        yield number, dict(zip(names, row, strict=True))


def _read_jsonl(path: Path, text: str, file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(text):
        row = parse_json(line, where=f"{path}:{number}", error=DataError)
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: found {describe(row)}, wanted an object")
        yield number, row


def _read_lines(path: Path, text: str, file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    pattern = re.compile(file.pattern or "(?P<text>.*)")
    seconds = PATTERN_S + len(text) / 1e6
    sentence = (
        f"{path}: matching {file.pattern} takes more than {seconds:.1f} s, wanted a pattern without nested repeats"
    )
    with time_limit(seconds, sentence, error=DataError):
        rows = [(number, line, pattern.fullmatch(line)) for number, line in _lines(text, keep_empty=True)]
    for number, line, found in rows:
        if found is None:
            raise DataError(f"{path}:{number}: {describe(line)} does not match {file.pattern}")
        yield number, found.groupdict()


def _read_xml(path: Path, text: str, file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    # Both make much of little: an entity wherever it is named, a default of an attribute in every element.
    if "<!ENTITY" in text or "<!ATTLIST" in text:
        raise DataError(f"{path} declares entities or attributes, wanted XML without them")
    parser = ElementTree.XMLParser(target=_BoundedTree(str(path)))
    try:
        root = ElementTree.fromstring(re.sub(r"^\s*<\?xml[^>]*\?>", "", text), parser)
    except ElementTree.ParseError as error:
        raise DataError(f"{path}:{error.position[0]}: not XML: {error}") from None
    for number, element in enumerate(root.iter(file.record), start=1):
        children = {child.tag: "".join(child.itertext()) for child in element}
        yield number, {**{f"@{name}": value for name, value in element.attrib.items()}, **children}


class _BoundedTree(ElementTree.TreeBuilder):
    """Builds a tree of bounded depth: a million levels take seconds to build and hold every text a million times."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where
        self._depth = 0

    def start(self, tag: Any, attrs: Any) -> ElementTree.Element:  # type: ignore[override]
        self._depth += 1
        if self._depth > MAX_XML_DEPTH:
            raise DataError(f"{self._where}: more than {MAX_XML_DEPTH} elements in each other")
        return super().start(tag, attrs)

    def end(self, tag: Any) -> ElementTree.Element:
        self._depth -= 1
        return super().end(tag)


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
