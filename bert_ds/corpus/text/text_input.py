"""Where a build gets its documents from, so that it can go on at any position."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from bert_ds.corpus.text.documents import Document, read_file
from bert_ds.corpus.text.input_files import InputFile


class Position(NamedTuple):
    """Where reading goes on: the index of the input file and the number of its documents that are done."""

    file_index: int
    num_documents: int


class TextInput(Protocol):
    """Documents that can be read from any position on."""

    @property
    def description(self) -> dict[str, Any]:
        """What is recorded in the manifest; equal descriptions mean equal documents. JSON only."""

    def read(self, start: Position) -> Iterator[tuple[Position, int, Document]]:
        """Yield each document from `start` on, with the position behind it and the bytes read before it or so."""


class FileInput:
    """The documents of files, see `find_input_files`."""

    def __init__(self, files: list[InputFile], *, text_field: str = "text") -> None:
        self._files = files
        self._text_field = text_field

    @property
    def description(self) -> dict[str, Any]:
        return {"files": [file.description for file in self._files], "text_field": self._text_field}

    @property
    def num_bytes(self) -> int:
        """Size of all files as they lie on disk."""
        return sum(file.num_bytes for file in self._files)

    def read(self, start: Position) -> Iterator[tuple[Position, int, Document]]:
        before = sum(file.num_bytes for file in self._files[: start.file_index])
        for index in range(start.file_index, len(self._files)):
            file = self._files[index]
            skipped = start.num_documents if index == start.file_index else 0
            inside = 0
            for number, document in enumerate(read_file(file, text_field=self._text_field), 1):
                inside += len(document.text)
                if number > skipped:
                    yield Position(index, number), before + min(inside, file.num_bytes), document
            before += file.num_bytes


class DocumentInput:
    """Documents made by a program: `read_all` is called once per build and gives the same documents every time."""

    def __init__(self, read_all: Callable[[], Iterable[Document]], *, description: dict[str, Any]) -> None:
        self._read_all = read_all
        self._description = description

    @property
    def description(self) -> dict[str, Any]:
        return self._description

    def read(self, start: Position) -> Iterator[tuple[Position, int, Document]]:
        num_bytes = 0
        for number, document in enumerate(self._read_all(), 1):
            num_bytes += len(document.text)
            if number > start.num_documents:
                yield Position(0, number), num_bytes, document
