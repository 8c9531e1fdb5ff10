"""The one gate for files that others may have written: regular, bounded in size, depth and time, text that is text.

Every reader of data, configurations, tokenizers, model folders and run folders comes through here, so that a FIFO, a
device, a file of terabytes or JSON without end is one sentence with the file's name. Standard library only.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

MAX_JSON_BYTES = 64 << 20
"""Of tokenizers, manifests and configurations of models: a vocabulary of a million pieces is smaller."""

_AT_ONCE = 1 << 20


def open_regular(path: str | Path, *, error: type[Exception] = ValueError, advice: str = "") -> BufferedReader:
    """Open a regular file for reading; nothing else is waited for.

    Args:
        path: of the file.
        error: raised with one sentence where the file cannot be read or is a FIFO, a device, a socket or a folder.
        advice: added to the sentence where the file cannot be opened.
    """
    try:
        # A FIFO without a writer would block an ordinary open.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as fault:
        raise error(f"{path}: {fault.strerror}{advice}") from None
    except ValueError as fault:
        raise error(f"{str(path)[:80]!r}: not a file name ({fault})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"{path}: not a regular file")
    return open(descriptor, "rb")


def read_bytes(
    path: str | Path, *, max_bytes: int = MAX_JSON_BYTES, error: type[Exception] = ValueError, advice: str = ""
) -> bytes:
    """Return the content of a regular file of at most `max_bytes`; see `open_regular`."""
    return b"".join(_pieces(path, max_bytes=max_bytes, error=error, advice=advice))


def read_text(
    path: str | Path,
    *,
    max_bytes: int = MAX_JSON_BYTES,
    error: type[Exception] = ValueError,
    encoding: str = "utf-8",
    advice: str = "",
) -> str:
    """Return the text of a regular file; bytes that are no text in this encoding are named by their place.

    A NUL is no text: what holds one is a binary file, a hole, or UTF-16 read as something else. It is found in the
    first piece, so that a large sparse file costs nothing.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) if encoding == "utf-16" else (b"",)
    parts: list[str] = []
    begin = 0  # of the piece, in bytes of the file
    for piece in _pieces(path, max_bytes=max_bytes, error=error, advice=advice):
        if begin == 0 and piece and not piece.startswith(marks):
            raise error(f'{path}: no byte order mark, wanted encoding "utf-16-le" or "utf-16-be"')
        pending = len(decoder.getstate()[0])
        try:
            part = decoder.decode(piece, not piece)
        except UnicodeDecodeError as fault:
            line = 1 + sum(one.count("\n") for one in parts) + fault.object[: fault.start].count(b"\n")
            place = begin - pending + fault.start
            raise error(f"{path}:{line}: byte {place} is no {encoding.upper()}{_hint(path, encoding)}") from None
        if "\0" in part:
            line = 1 + sum(one.count("\n") for one in parts) + part[: part.index("\0")].count("\n")
            raise error(f"{path}:{line}: holds a NUL byte, wanted text{_hint(path, encoding)}")
        parts.append(part)
        begin += len(piece)
    return "".join(parts)


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a regular file; OSError where it cannot be read or is none."""
    with open_regular(path, error=OSError) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split_lines(text: str) -> Iterator[str]:
    """Yield the lines of a text without their ends, one at a time; only \\n and \\r\\n end a line."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start)
        stop = len(text) if stop < 0 else stop
        yield text[start:stop].removesuffix("\r")
        start = stop + 1


def read_json(
    path: str | Path, *, max_bytes: int = MAX_JSON_BYTES, error: type[Exception] = ValueError, advice: str = ""
) -> Any:
    """Return the JSON value in a file; see `read_text` and `parse_json`."""
    return parse_json(read_text(path, max_bytes=max_bytes, error=error, advice=advice), where=path, error=error)


def parse_json(text: str, *, where: str | Path, error: type[Exception] = ValueError) -> Any:
    """Return a JSON value; text that is none, or nested without end, raises `error`."""
    try:
        return json.loads(text)
    except RecursionError:
        raise error(f"{where}: not JSON: nested too deeply") from None
    except ValueError as fault:
        raise error(f"{where}: not JSON: {fault}") from None


def refuse_link_out(path: Path, *, error: type[Exception] = ValueError) -> None:
    """Raise unless a file of a model folder lies in that folder.

    A link may lead to another place in the folder, or from a snapshot of the Hugging Face cache to the blobs beside the
    snapshots, which is how that cache is built. Any other link would carry a file of this machine into an export.
    """
    if not path.is_symlink():
        return
    try:
        folder, target = path.parent.resolve(), path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise error(f"{path} is a link that leads nowhere") from None
    caches = [parent.parent / "blobs" for parent in (folder, *folder.parents) if parent.name == "snapshots"]
    if not any(target.is_relative_to(place) for place in (folder, *caches)):
        raise error(f"{path} is a link out of its folder, to {target}: wanted the file itself")


@contextmanager
def time_limit(seconds: float, sentence: str, *, error: type[Exception] = ValueError) -> Iterator[None]:
    """Raise `error` with the sentence in the block once it has taken so long; in the main thread only.

    Python's `re` looks for signals while it matches, so this ends a match that would take years.
    """

    def ring(*_: object) -> NoReturn:
        raise error(sentence)

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _pieces(path: str | Path, *, max_bytes: int, error: type[Exception], advice: str) -> Iterator[bytes]:
    """Yield a file in pieces, an empty one at the end; it may grow while it is read."""
    with open_regular(path, error=error, advice=advice) as file:
        size = os.fstat(file.fileno()).st_size
        piece = b" "
        while piece:
            if size > max_bytes:
                raise error(f"{path} has {size} bytes, wanted at most {max_bytes}")
            try:
                piece = file.read(_AT_ONCE)
            except OSError as fault:
                raise error(f"{path}: {fault.strerror}") from None
            size = max(size, file.tell())
            yield piece


def _hint(path: str | Path, encoding: str) -> str:
    """Return which encoding a file that is not in this one may have, from its beginning."""
    with open_regular(path) as file:
        head = file.read(1 << 16)
    if not any(head):
        return " (a hole in a sparse file?)"
    return encoding_hint(head) if encoding in ("utf-8", "utf-8-sig") else ""


def encoding_hint(head: bytes) -> str:
    """Return which encoding text that is no UTF-8 may have, from bytes at its beginning; "" where none can be told."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return ' (encoding "utf-16"?)'
    if b"\0" in head:
        return ""
    try:
        codecs.getincrementaldecoder("gb18030")().decode(head)
    except UnicodeDecodeError:
        return ' (encoding "latin-1"?)'
    return ' (encoding "gb18030" or, of Western text, "latin-1"?)'
