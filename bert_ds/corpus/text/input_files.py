"""Which files an input path stands for, and reading them decompressed."""

from __future__ import annotations

import gzip
import io
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from bert_ds.basics.ranks import DataError

TextFormat = Literal["text", "jsonl", "csv", "parquet", "arrow"]
FORMATS: dict[str, TextFormat] = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
COMPRESSIONS = (".gz", ".zst")
KNOWN_NAMES = f"{', '.join(FORMATS)}, each also with {' or '.join(COMPRESSIONS)}"

_READ_AT_ONCE = 1 << 18
_UNPACKED_AT_ONCE = 1 << 11
"""Compressed bytes given to zstd at a time: it makes up to 32,768 times as many of them, all in memory."""


class InputFile(NamedTuple):
    """A file to read, and the name that is recorded for it: relative to the parent of the path the user gave."""

    path: Path
    name: str
    num_bytes: int
    text_format: TextFormat
    compression: str

    @property
    def description(self) -> dict[str, Any]:
        """Name and size, as recorded in a manifest."""
        return {"name": self.name, "bytes": self.num_bytes}


class InputFiles(NamedTuple):
    """Files to read in order, and the files of the given folders that are passed over."""

    files: list[InputFile]
    skipped: list[Path]


def find_input_files(paths: Iterable[str | os.PathLike[str]]) -> InputFiles:
    """List the input files of paths in the order given; a folder stands for its files, recursively, sorted by name.

    Raises:
        DataError: a path is missing, a named file has an unknown ending, a folder holds no file with a known one, or
            a file is listed twice.
    """
    files: list[InputFile] = []
    skipped: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [found for found in sorted(path.rglob("*")) if found.is_file() and not _is_hidden(found, path)]
            known = [found for found in inside if _format_of(found) is not None]
            if not known:
                raise DataError(f"folder {path} holds no file that ends in {KNOWN_NAMES}")
            skipped += [found for found in inside if _format_of(found) is None]
            top = path.resolve().name
            files += [_input_file(found, f"{top}/{found.relative_to(path).as_posix()}") for found in known]
        elif path.is_file():
            if _format_of(path) is None:
                raise DataError(f"{path} has an unknown ending; known are {KNOWN_NAMES}")
            files.append(_input_file(path, path.name))
        else:
            raise DataError(f"input {path} does not exist")
    _refuse_twice(files)
    return InputFiles(files, skipped)


@contextmanager
def open_decompressed(file: InputFile) -> Iterator[IO[bytes]]:
    """Open a file for reading plain bytes; damaged compressed data becomes a DataError that names the file."""
    try:
        with file.path.open("rb") as raw:
            if file.compression == ".gz":
                yield io.BufferedReader(gzip.GzipFile(fileobj=raw), _READ_AT_ONCE)  # type: ignore[arg-type]
            elif file.compression == ".zst":
                yield io.BufferedReader(_ZstdReader(raw, file.path), _READ_AT_ONCE)
            else:
                yield raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file.path} is damaged: {error}") from None
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error.strerror or error}") from None


@contextmanager
def open_seekable(file: InputFile) -> Iterator[IO[bytes]]:
    """Open a file for random access; a compressed one is unpacked to a temporary file on disk first."""
    with open_decompressed(file) as plain:
        if not file.compression:
            yield plain
            return
        with tempfile.TemporaryFile() as unpacked:
            _copy_bounded(file, plain, unpacked)
            unpacked.seek(0)
            yield unpacked


def _copy_bounded(file: InputFile, plain: IO[bytes], target: IO[bytes]) -> None:
    """Copy what is compressed already inside; more than a hundredfold of it is a bomb, not text."""
    limit = 100 * file.num_bytes + (1 << 26)
    while content := plain.read(_READ_AT_ONCE):
        target.write(content)
        if target.tell() > limit:
            raise DataError(f"{file.path} unpacks to more than {limit} bytes, a hundredfold: refused")


class _ZstdReader(io.RawIOBase):
    """Frames of a zstd file one after another; unlike the library's own reader it notices a file that ends early."""

    def __init__(self, raw: IO[bytes], path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{path} needs the package zstandard: pip install zstandard") from None
        self._library = zstandard
        self._raw = raw
        self._path = path
        self._frame: Any = None
        self._compressed = memoryview(b"")
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            if not self._compressed:
                self._compressed = memoryview(self._raw.read(_READ_AT_ONCE))
                if not self._compressed:
                    if self._frame is not None:
                        raise DataError(f"{self._path} is damaged: it ends inside a zstd frame")
                    return 0
            self._decompress()
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count

    def _decompress(self) -> None:
        if self._frame is None:
            self._frame = self._library.ZstdDecompressor().decompressobj()
        try:
            self._plain = memoryview(self._frame.decompress(self._compressed[:_UNPACKED_AT_ONCE]))
        except self._library.ZstdError as error:
            raise DataError(f"{self._path} is damaged: {error}") from None
        rest = self._compressed[_UNPACKED_AT_ONCE:]
        self._compressed = rest
        if self._frame.eof:
            self._compressed = memoryview(self._frame.unused_data + bytes(rest))
            self._frame = None


def _is_hidden(found: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in found.relative_to(folder).parts)


def _format_of(path: Path) -> TextFormat | None:
    name = path.name.lower()
    compression = _compression_of(path)
    return FORMATS.get(Path(name.removesuffix(compression)).suffix)


def _compression_of(path: Path) -> str:
    ending = path.suffix.lower()
    return ending if ending in COMPRESSIONS else ""


def _input_file(path: Path, name: str) -> InputFile:
    text_format = _format_of(path)
    assert text_format is not None
    return InputFile(path, name, path.stat().st_size, text_format, _compression_of(path))


def _refuse_twice(files: list[InputFile]) -> None:
    seen: set[Path] = set()
    for file in files:
        resolved = file.path.resolve()
        if resolved in seen:
            raise DataError(f"{file.path} is listed twice in the input")
        seen.add(resolved)
