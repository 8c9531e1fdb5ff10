"""Word vectors in word2vec's text form, for the pieces of a vocabulary: `N D`, then a word and D numbers a line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bert_ds.basics.input_gate import open_regular
from bert_ds.basics.ranks import DataError
from bert_ds.configuration.reading.config_problems import describe
from bert_ds.configuration.vector_file import LONGEST_LINE, read_sizes
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer


class WordVectors(NamedTuple):
    """What a file has for a vocabulary."""

    ids: np.ndarray
    """int64 [n], the pieces with a vector, ascending."""
    vectors: np.ndarray
    """fp32 [n, D]."""
    num_words: int
    """Of the file."""
    num_pieces: int
    """Of the vocabulary, without the special ones."""

    @property
    def text(self) -> str:
        """Both counts, for the log."""
        without = self.num_pieces - len(self.ids)
        return (
            f"word vectors of {self.num_words:,} words: {len(self.ids):,} of {self.num_pieces:,} pieces have one, "
            f"{without:,} have none and start as without"
        )


def read_word_vectors(path: Path, tokenizer: TextTokenizer, *, width: int) -> WordVectors:
    """Return the vectors of the words that are a single piece; of words that are the same piece the first counts.

    Words are read as the tokenizer reads them, behind a space, by its rules of case and accents. Numbers of words that
    are no piece are counted and not looked at.

    Args:
        path: of the file, UTF-8; it is read once, in bounded memory.
        tokenizer: of the model.
        width: D of the word embedding.

    Raises:
        DataError: with file, line, what was found and what is wanted.
    """
    found: dict[int, list[float]] = {}
    special = {*tokenizer.special_ids}
    with open_regular(path, error=DataError) as file:
        try:
            num_words = read_sizes(file, path, width=width)
        except ValueError as error:
            raise DataError(str(error)) from None
        for number in range(2, num_words + 2):
            word, *numbers = file.readline(LONGEST_LINE).rstrip(b" \t\r\n").split(b" ")
            if len(numbers) != width:
                raise DataError(_other_line(path, number, word, len(numbers), width, num_words))
            ids = np.frombuffer(tokenizer.encode_part(_text(word, path, number), spaced=True), dtype=tokenizer.dtype)
            if len(ids) == 1 and int(ids[0]) not in special and int(ids[0]) not in found:
                found[int(ids[0])] = [_finite(one, path, number) for one in numbers]
        if file.readline(LONGEST_LINE).strip():
            raise DataError(f"{path}:{num_words + 2}: another word, wanted the end behind the {num_words} of line 1")
    if not found:
        raise DataError(f"{path}: none of its {num_words} words is a piece of the tokenizer, wanted one at least")
    ids = np.array(sorted(found), dtype=np.int64)
    vectors = np.array([found[one] for one in ids.tolist()], dtype=np.float32)
    return WordVectors(ids, vectors, num_words, tokenizer.vocab_size - len(special))


def _other_line(path: Path, number: int, word: bytes, found: int, width: int, num_words: int) -> str:
    if not word and not found:
        return f"{path}:{number}: nothing, wanted a word: {num_words} follow by line 1, and {number - 2} were there"
    return f"{path}:{number}: {found} numbers behind {describe(word.decode(errors='replace'))}, wanted {width}"


def _text(word: bytes, path: Path, number: int) -> str:
    try:
        return word.decode()
    except UnicodeDecodeError:
        raise DataError(f"{path}:{number}: the word is no UTF-8, wanted text") from None


def _finite(number: bytes, path: Path, line: int) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not abs(value) <= float(np.finfo(np.float32).max):
        text = describe(number.decode(errors="replace"))
        raise DataError(f"{path}:{line}: {text} is no number that fp32 can hold, wanted one")
    return value
