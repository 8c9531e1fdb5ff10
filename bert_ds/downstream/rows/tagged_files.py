"""Sentences whose words carry tags, one word a line: CoNLL's columns and the treebanks' CoNLL-U."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from bert_ds.basics.input_gate import split_lines
from bert_ds.basics.ranks import DataError
from bert_ds.configuration.reading.config_problems import describe
from bert_ds.configuration.task.task_data_config import DataFile

_WORD_ID = re.compile("[0-9]+")
_NO_WORD_ID = re.compile(r"[0-9]+[-.][0-9]+")
CONLLU_COLUMNS = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")


def read_conll(path: Path, text: str, file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the first line and the columns of every sentence, as lists by column number.

    Columns are separated by one tab where the line has one, else by spaces. Sentences end at an empty line; document
    marks of CoNLL-2003 are skipped. With strips_last_character the last character of a word, a digit, is cut off.
    """
    for first, lines in _sentences(text):
        rows = [(number, line.split("\t") if "\t" in line else line.split()) for number, line in lines]
        if rows[0][1][0] == "-DOCSTART-":
            continue
        for number, row in rows:
            if len(row) != len(rows[0][1]):
                raise DataError(f"{path}:{number}: found {len(row)} columns, wanted {len(rows[0][1])}")
            if file.strips_last_character:
                row[0] = _stripped(row[0], where=f"{path}:{number}")
        yield (
            first,
            {str(index): list(column) for index, column in enumerate(zip(*(row for _, row in rows), strict=True))},
        )


def read_conllu(path: Path, text: str, file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the first line and the ten columns of every sentence, as lists by their names.

    Ranges ("1-2", which spell a contraction) and empty nodes ("8.1") are no words and are skipped.
    """
    for first, lines in _sentences(text):
        rows = []
        for number, line in lines:
            if line.startswith("#"):
                continue
            row = line.split("\t")
            if len(row) != len(CONLLU_COLUMNS):
                raise DataError(f"{path}:{number}: found {len(row)} columns, wanted {len(CONLLU_COLUMNS)}")
            if _WORD_ID.fullmatch(row[0]):
                rows.append(row)
            elif not _NO_WORD_ID.fullmatch(row[0]):
                raise DataError(f"{path}:{number}: the id is {describe(row[0])}, wanted a number")
        if rows:
            yield first, dict(zip(CONLLU_COLUMNS, map(list, zip(*rows, strict=True)), strict=True))


def _sentences(text: str) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    lines: list[tuple[int, str]] = []
    for number, line in enumerate(chain(split_lines(text), [""]), start=1):
        if line.strip():
            lines.append((number, line))
        elif lines:
            yield lines[0][0], lines
            lines = []


def _stripped(word: str, *, where: str) -> str:
    if len(word) < 2 or word[-1] not in "0123456789":
        raise DataError(f"{where}: the word is {describe(word)}, wanted a character and a digit")
    return word[:-1]
