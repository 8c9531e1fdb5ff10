"""Words of a text that nobody has cut: letters and digits together, each mark and each Chinese character by itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.reading.config_problems import describe

_CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CHINESE}]|[^\W{_CHINESE}]+(?:['’][^\W\d_]+)?|[^\w\s]")


class Word(NamedTuple):
    """A word and where it stands."""

    text: str
    start: int
    """First character in the source."""
    end: int
    """Past the last one."""
    source: str


def split_words(text: str) -> list[Word]:
    """Return the words of a text, in order."""
    return [Word(found[0], found.start(), found.end(), text) for found in _WORD.finditer(text)]


def joined_words(words: Any) -> list[Word]:
    """Return words that were cut already, placed in the text that they make with a space between two of them.

    Raises:
        DataError: it is no list of texts.
    """
    if not isinstance(words, Sequence) or isinstance(words, str) or not all(isinstance(word, str) for word in words):
        raise DataError(f"words is {describe(words)}, wanted a list of texts")
    source, found, start = " ".join(words), [], 0
    for word in words:
        found.append(Word(word, start, start + len(word), source))
        start += len(word) + 1
    return found
