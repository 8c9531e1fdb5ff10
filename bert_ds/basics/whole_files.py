"""Files that a reader finds old, whole or absent, never in part."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, see `write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str, *, temporary: Path | None = None, synced: bool = True) -> None:
    """Write a file so that a reader sees the old one or the whole new one; a link is replaced.

    Args:
        path: the file.
        text: its content.
        temporary: where it is written first, in the same folder; None takes a hidden name.
        synced: the content is on the disk before it has the name, so that this holds after a power cut too; `sync` of
            the folder makes the name last as well.

    Raises:
        OSError: it cannot be written; the temporary file is gone again.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}") if temporary is None else temporary
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if synced:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Force a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
