"""What a word is, for whole-word masking: what the tokenizer says, or for Chinese a segmenter or a list."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from bert_ds.basics.input_gate import read_text
from bert_ds.configuration.recipe.run_config import ConfigError, MaskingConfig
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer
from bert_ds.corpus.tokenizer.word_begins import is_chinese

Segmenter = Callable[[str], list[int]]
"""Chinese text without spaces -> lengths of its words, which sum to the length of the text."""


class WordJoiner:
    """Tells which pieces belong to the word of the piece before them.

    The tokenizer says it. BERT makes every Chinese character a piece of its own; with a segmenter, the pieces of a
    stretch of Chinese characters are joined into words as well (as in BERT-wwm, Cui et al. 2021).
    """

    def __init__(self, tokenizer: TextTokenizer, config: MaskingConfig) -> None:
        """Prepare the segmenter.

        Raises:
            ConfigError: the segmenter is not installed, the word list is unusable, or the tokenizer does not split
                Chinese characters.
        """
        self._continues = tokenizer.continues
        self._segment: Segmenter | None = None
        if config.word_segmenter == "wordpiece":
            return
        if not tokenizer.stands_alone:
            how = "with tokenize_chinese_chars false" if tokenizer.kind == "wordpiece" else f"as {tokenizer.kind}"
            raise ConfigError(
                f'masking.word_segmenter "{config.word_segmenter}" joins Chinese characters, '
                f"but this tokenizer does not split them: it was made {how}"
            )
        self._pieces = tokenizer.pieces
        self._is_chinese = np.array([_is_character(piece) for piece in tokenizer.pieces])
        self._segment = _jieba_segmenter() if config.word_segmenter == "jieba" else _list_segmenter(config.word_list)

    def continues(self, ids: np.ndarray) -> np.ndarray:
        """Whether each piece goes on with the word of the piece before it.

        Args:
            ids: int32 [n], sequences end to end; special pieces separate words.

        Returns:
            bool [n].
        """
        continues = self._continues(ids)
        if self._segment is None:
            return continues
        edges = np.flatnonzero(np.diff(self._is_chinese[ids], prepend=False, append=False))
        for start, stop in edges.reshape(-1, 2).tolist():
            sizes = self._segment("".join(self._pieces[piece] for piece in ids[start:stop].tolist()))
            continues[start:stop] = True
            continues[start + np.cumsum([0, *sizes[:-1]])] = False
        return continues


def longest_match(words: set[str]) -> Segmenter:
    """Return the segmenter that takes at each place the longest word of a set, or a single character."""
    longest = max(map(len, words), default=1)

    def segment(text: str) -> list[int]:
        sizes: list[int] = []
        at = 0
        while at < len(text):
            tries = range(min(longest, len(text) - at), 1, -1)
            sizes.append(next((size for size in tries if text[at : at + size] in words), 1))
            at += sizes[-1]
        return sizes

    return segment


def _is_character(piece: str) -> bool:
    return len(piece) == 1 and is_chinese(piece)


def _jieba_segmenter() -> Segmenter:
    try:
        import jieba
    except ImportError:
        raise ConfigError(
            'masking.word_segmenter "jieba" needs the package jieba, which is not installed: '
            'install the extra "zh", or give a masking.word_list'
        ) from None
    jieba.setLogLevel(logging.WARNING)
    jieba.initialize()
    return lambda text: [len(word) for word in jieba.cut(text)]


def _list_segmenter(path: str | None) -> Segmenter:
    assert path is not None, "MaskingConfig wants a word_list for this segmenter"
    try:
        lines = read_text(path).split("\n")
    except ValueError as error:
        raise ConfigError(f"masking.word_list {error}; wanted a UTF-8 file with one word per line") from None
    words = {word for line in lines if (word := line.strip())}
    if not any(len(word) > 1 and all(map(is_chinese, word)) for word in words):
        raise ConfigError(f"masking.word_list {path}: found no Chinese word of two or more characters")
    return longest_match(words)
