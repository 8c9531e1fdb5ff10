"""The first line of a file of word vectors in word2vec's text form: how many words, and how many numbers for each.

Standard library only, so that a login node finds another width before a job is queued.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from bert_ds.basics.input_gate import open_regular
from bert_ds.configuration.reading.config_problems import describe

LONGEST_LINE = 1 << 20
"""Bytes; more numbers than any embedding has."""


def read_sizes(file: BinaryIO, path: Path, *, width: int) -> int:
    """Read the first line of an open file and return how many words follow.

    Args:
        file: at its beginning.
        path: of it, for a message.
        width: of the word embedding that the vectors are for.

    Raises:
        ValueError: it is another line, or the vectors have another width.
    """
    line = file.readline(LONGEST_LINE).decode(errors="replace").strip()
    parts = line.split()
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise ValueError(
            f"{path}:1: found {describe(line)}, wanted the number of words and of numbers for each of them"
        )
    if int(parts[1]) != width:
        raise ValueError(f"{path}:1: vectors of {parts[1]} numbers, wanted {width}, the width of the word embedding")
    return int(parts[0])


def vectors_problem(path: Path, *, width: int) -> str | None:
    """Say what keeps a file from having word vectors of a width, as far as its first line tells."""
    try:
        with open_regular(path) as file:
            read_sizes(file, path, width=width)
    except ValueError as error:
        return str(error)
    return None
