"""Where words begin in a stream of pieces that carry their text, as byte-level BPE and Unigram do.

A piece may be part of a character, or hold several, and may begin with the space in front of its word. So the text of
the stream is put together byte by byte, and each piece is judged by the character that it begins with and the one
before. It goes on with the word of the piece before it where it

    begins in the middle of a character, or with a mark that belongs to the character before (an accent, a skin tone);
    stands behind a joiner, as in an emoji of several, or behind a piece that is nothing but space;
    begins with a letter or a digit that follows one. Chinese characters stand alone, as in BERT.

All is numpy: a global batch has a million pieces.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np

CHINESE_RANGES = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2FA1F))
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_JOINER_CODE = 0x200D
_ALONE, _LETTER, _MARK, _JOINER, _SPACE = range(5)


class WordBegins:
    """The text of the pieces of a vocabulary, b"" for those that are never text.

    Attributes:
        is_blank: bool [vocab_size], true for pieces that are nothing but space.
    """

    def __init__(self, texts: Sequence[bytes]) -> None:
        self._bytes = np.frombuffer(b"".join(texts), dtype=np.uint8)
        self._sizes = np.array([len(text) for text in texts], dtype=np.int64)
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self.is_blank = np.array([text.isspace() for text in texts])

    def continues(self, ids: np.ndarray) -> np.ndarray:
        """Whether each piece goes on with the word of the piece before it, bool [n]; see `TextTokenizer.continues`."""
        sizes = self._sizes[ids]
        is_text = sizes > 0
        if not is_text.any():
            return is_text
        stops = np.cumsum(sizes)
        starts = stops - sizes
        content = self._bytes[np.repeat(self._firsts[ids] - starts, sizes) + np.arange(stops[-1])]
        is_lead = (content & 0xC0) != 0x80
        kinds = _kinds(_code_points(content))
        # The first byte of the character that each byte is part of.
        lead_of = np.maximum.accumulate(np.where(is_lead, np.arange(len(content)), 0))
        first = np.minimum(starts, len(content) - 1)
        last_kind = kinds[lead_of[np.maximum(stops, 1) - 1]]
        kind, before = kinds[first], np.roll(last_kind, 1)
        goes_on = ~is_lead[first] | np.isin(kind, (_MARK, _JOINER)) | (before == _JOINER)
        goes_on |= (kind == _LETTER) & np.isin(before, (_LETTER, _MARK))
        goes_on |= np.roll(self.is_blank[ids], 1) & (kind != _SPACE)
        is_inside = is_text & np.roll(is_text, 1)
        is_inside[0] = False
        return goes_on & is_inside


def is_chinese(character: str) -> bool:
    """Whether a character is one of those that BERT makes a piece of its own."""
    return any(low <= ord(character) <= high for low, high in CHINESE_RANGES)


def _code_points(content: np.ndarray) -> np.ndarray:
    """Return the code point that begins at each byte of UTF-8, int64 [n]; inside a character it has no meaning."""
    padded = np.pad(content, (0, 3)).astype(np.int64)
    lead, second, third, fourth = (padded[at : at + len(content)] & (0x3F if at else 0xFF) for at in range(4))
    two = (lead & 0x1F) << 6 | second
    three = (lead & 0x0F) << 12 | second << 6 | third
    four = (lead & 0x07) << 18 | second << 12 | third << 6 | fourth
    return np.select([lead < 0x80, lead < 0xE0, lead < 0xF0], [lead, two, three], np.minimum(four, 0x10FFFF))


def _kinds(codes: np.ndarray) -> np.ndarray:
    found, places = np.unique(codes, return_inverse=True)
    return np.array([_kind(code) for code in found.tolist()])[places]


@cache
def _kind(code: int) -> int:
    character = chr(code)
    if code == _JOINER_CODE:
        return _JOINER
    if character.isspace():
        return _SPACE
    category = unicodedata.category(character)
    if category[0] == "M" or category == "Cf" or code in _SKIN_TONES:
        return _MARK
    return _LETTER if category[0] in "LN" and not is_chinese(character) else _ALONE
