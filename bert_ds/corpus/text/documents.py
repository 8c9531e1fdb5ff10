"""Text files to documents, one at a time: plain text, JSON lines, CSV, parquet and Arrow, each also gzip or zstd."""

from __future__ import annotations

import csv
import html
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

from bert_ds.basics.input_gate import encoding_hint
from bert_ds.basics.ranks import DataError
from bert_ds.corpus.text.input_files import InputFile, find_input_files, open_decompressed, open_seekable

MAX_DOCUMENT_BYTES = 1 << 26
"""A larger document is taken for a mistake, such as a file without blank lines; memory use stays bounded by it."""

_DOC_START = re.compile(r"<doc\b.*>\s*$")
_DOC_TITLE = re.compile(r'\btitle="(.*)"[^"]*>\s*$')
_PARQUET_ROWS_AT_ONCE = 8
"""A dictionary lets a small file hold many rows of the largest size: each is a copy of its own in memory."""
_ARROW_FILE = b"ARROW1"
_LINE_OVERHEAD = 64
"""Bytes that a line takes in memory beside its characters: a document may consist of empty lines."""
_LONGEST_TAG = 4096
_CONVERT = ": raw text is read as UTF-8 alone, iconv -f ENCODING -t utf-8 converts it"


class Document(NamedTuple):
    """A text and where it came from (for messages only)."""

    source: str
    text: str
    title: str = ""
    """Of extracts, whose tags say it."""


class DocumentTexts:
    """The texts of input paths, in order; starts over whenever it is iterated."""

    def __init__(self, paths: Iterable[str | os.PathLike[str]], *, text_field: str = "text") -> None:
        self._paths = list(paths)
        self._text_field = text_field

    def __iter__(self) -> Iterator[str]:
        return (document.text for document in read_documents(self._paths, text_field=self._text_field))


def read_documents(paths: Iterable[str | os.PathLike[str]], *, text_field: str = "text") -> Iterator[Document]:
    """Yield the non-empty documents of files and folders, in order and in constant memory.

    Plain text holds documents separated by blank lines, or `<doc ...>` ... `</doc>` extracts if its first line is such
    a tag; the other formats hold one document per row in `text_field`.

    Raises:
        DataError: names the file, and the line or byte where it is not what its ending says.
    """
    for file in find_input_files(paths).files:
        yield from read_file(file, text_field=text_field)


def read_file(file: InputFile, *, text_field: str = "text") -> Iterator[Document]:
    """Yield the non-empty documents of one file."""
    if file.text_format in ("parquet", "arrow"):
        documents = _read_columns(file, text_field)
    elif file.text_format == "csv":
        documents = _read_csv(file, text_field)
    elif file.text_format == "jsonl":
        documents = _read_jsonl(file, text_field)
    else:
        documents = _read_text(file)
    for document in documents:
        text = document.text.strip()
        if text:
            yield document._replace(text=text)


def _lines(file: InputFile, stream: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end); bad UTF-8 is named by its byte in the decompressed file."""
    start = 0
    number = 0
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        if len(line) > MAX_DOCUMENT_BYTES:
            raise DataError(f"{file.path}, line {number}: longer than {MAX_DOCUMENT_BYTES} bytes")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            place = f"byte {start + error.start} (line {number}){encoding_hint(line)}"
            raise DataError(f"{file.path} is not UTF-8 at {place}{_CONVERT}") from None
        if 3 * line.count(0) > len(line):
            raise DataError(f'{file.path}, line {number}: holds NUL bytes (encoding "utf-16"?){_CONVERT}')
        start += len(line)
        yield number, (text.removeprefix("\ufeff") if number == 1 else text).rstrip("\r\n")


def _read_text(file: InputFile) -> Iterator[Document]:
    with open_decompressed(file) as stream:
        lines = _lines(file, stream)
        for number, line in lines:
            if line.strip():
                is_extract = _DOC_START.match(line) is not None
                documents = _extracts if is_extract else _blank_line_separated
                yield from documents(file, number, line, lines)


def _blank_line_separated(
    file: InputFile, number: int, line: str, lines: Iterator[tuple[int, str]]
) -> Iterator[Document]:
    first, block = number, [line]
    size = len(line)
    for number, line in lines:
        if line.strip():
            first = first if block else number
            block.append(line)
            size = _bounded(file, first, size + len(line) + _LINE_OVERHEAD)
        elif block:
            yield Document(f"{file.path}, line {first}", "\n".join(block))
            block, size = [], 0
    if block:
        yield Document(f"{file.path}, line {first}", "\n".join(block))


def _extracts(file: InputFile, number: int, line: str, lines: Iterator[tuple[int, str]]) -> Iterator[Document]:
    first, tag, block, size = number, line, list[str](), 0
    is_open = True
    for number, line in lines:
        if is_open and line.startswith("</doc>"):
            yield Document(f"{file.path}, line {first}", *_text_and_title(tag, block))
            is_open = False
        elif is_open:
            block.append(line)
            size = _bounded(file, first, size + len(line) + _LINE_OVERHEAD)
        elif _DOC_START.match(line):
            first, tag, block, size, is_open = number, line, [], 0, True
        elif line.strip():
            raise DataError(f"{file.path}, line {number}: text outside of <doc ...> and </doc>")
    if is_open:
        raise DataError(f"{file.path}, line {first}: <doc> is never closed by </doc>")


def _text_and_title(tag: str, block: list[str]) -> tuple[str, str]:
    """Extracts repeat the title as the first line, which is no prose."""
    found = _DOC_TITLE.search(tag) if len(tag) <= _LONGEST_TAG else None
    title = html.unescape(found.group(1)).strip() if found else ""
    if found and block and block[0].strip() == title:
        block = block[1:]
    return "\n".join(block), title


def _bounded(file: InputFile, first: int, size: int) -> int:
    if size > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{file.path}, line {first}: a document of more than {MAX_DOCUMENT_BYTES} bytes starts here; "
            "separate documents by blank lines"
        )
    return size


def _read_jsonl(file: InputFile, text_field: str) -> Iterator[Document]:
    with open_decompressed(file) as stream:
        for number, line in _lines(file, stream):
            if line.strip():
                source = f"{file.path}, line {number}"
                yield Document(source, _text_of(source, line, text_field))


def _text_of(source: str, line: str, text_field: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: invalid JSON, one object per line is wanted: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{source}: a JSON {type(row).__name__}, one object per line is wanted")
    if text_field not in row:
        raise DataError(f'{source}: no field "{text_field}"; there are {", ".join(map(repr, row)) or "none"}')
    text = row[text_field]
    if not isinstance(text, str):
        raise DataError(f'{source}: field "{text_field}" is {type(text).__name__}, wanted a string')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f'{source}: field "{text_field}" holds half a character at {error.start}') from None
    return text


def _read_csv(file: InputFile, text_field: str) -> Iterator[Document]:
    """Yield the rows of a file with a header; a quoted text may hold line ends."""
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    column: int | None = None
    with open_decompressed(file) as stream:
        reader = csv.reader((f"{line}\n" for _, line in _lines(file, stream)), strict=True)
        try:
            for row in reader:
                source = f"{file.path}, line {reader.line_num}"
                if column is None:
                    names = [name.strip() for name in row]
                    if text_field not in names:
                        raise DataError(f'{file.path}: no column "{text_field}"; there are {names}')
                    column = names.index(text_field)
                elif row and len(row) != len(names):
                    raise DataError(f"{source}: found {len(row)} columns, wanted {len(names)}")
                elif row:
                    yield Document(source, row[column])
        except csv.Error as error:
            raise DataError(f"{file.path}, line {reader.line_num}: {error}") from None


def _read_columns(file: InputFile, text_field: str) -> Iterator[Document]:
    """Yield the rows of a parquet or an Arrow file, the latter as a stream (Hugging Face datasets) or as a file."""
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{file.path} needs the package pyarrow: pip install pyarrow") from None
    with open_seekable(file) as stream:
        try:
            schema, batches = _parquet_batches(stream, text_field) if file.text_format == "parquet" else _arrow(stream)
            if text_field not in schema.names:
                raise DataError(f'{file.path}: no column "{text_field}"; there are {schema.names}')
            kind = schema.field(text_field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise DataError(f'{file.path}: column "{text_field}" is {kind}, wanted string')
            row = 0
            for batch in batches:
                for value in batch.column(text_field):
                    row, text = row + 1, value.as_py()
                    if text is not None and len(text) > MAX_DOCUMENT_BYTES:
                        raise DataError(f"{file.path}, row {row}: longer than {MAX_DOCUMENT_BYTES} bytes")
                    if text is None:
                        raise DataError(f'{file.path}, row {row}: column "{text_field}" is null, wanted a string')
                    yield Document(f"{file.path}, row {row}", text)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{file.path} is damaged: {error}") from None


def _parquet_batches(stream: IO[bytes], text_field: str) -> tuple[Any, Iterable[Any]]:
    from pyarrow import parquet

    table = parquet.ParquetFile(stream, buffer_size=1 << 20)
    return table.schema_arrow, table.iter_batches(batch_size=_PARQUET_ROWS_AT_ONCE, columns=[text_field])


def _arrow(stream: IO[bytes]) -> tuple[Any, Iterable[Any]]:
    from pyarrow import ipc

    is_file = stream.read(len(_ARROW_FILE)) == _ARROW_FILE
    stream.seek(0)
    if not is_file:
        return (reader := ipc.open_stream(stream)).schema, reader
    table = ipc.open_file(stream)
    return table.schema, (table.get_batch(index) for index in range(table.num_record_batches))
