"""What the rest of the project asks of a tokenizer, of whatever kind: ids, characters, words, and the marks around.

A word is what stands between spaces, punctuation and Chinese characters, and each of these alone, as in BERT. Which
piece goes on with the word of the piece before it is asked of `TextTokenizer.continues` and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from bert_ds.configuration.families.marks import Marks

MODEL_MAX_LENGTH = 512
"""Written for Hugging Face, whose own default is no limit at all: longer inputs then crash in the position table."""


class SpecialIds(NamedTuple):
    """Ids of the five pieces that are never text."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int


class EncodedText(NamedTuple):
    """Pieces of a text and the characters that each was made of."""

    ids: np.ndarray
    """int32 [n]."""
    starts: np.ndarray
    """int32 [n]: piece i is made of the characters starts[i] to stops[i] - 1; several pieces may share a character."""
    stops: np.ndarray
    """int32 [n]."""


class TextTokenizer:
    """An immutable vocabulary with its text rules.

    Attributes:
        pieces: piece of each id.
        marks: names of the special pieces.
        special_ids: ids of the special pieces.
        between: ids of what stands between two texts.
        dtype: little-endian integer type that holds every id.
        fingerprint: sha256 over all that decides ids; equal exactly when every text gets the same ids.
        backend: the pipeline of `tokenizers` that transformers runs.
    """

    kind: ClassVar[str]
    """Name of the kind, as `train_tokenizer --kind` has it."""
    stands_alone: bool = False
    """Whether every Chinese character is a piece of its own."""

    def __init__(self, pieces: list[str], marks: Marks, backend: Tokenizer, *, facts: dict[str, Any]) -> None:
        self.pieces = pieces
        self.marks = marks
        self.vocab_size = len(pieces)
        ids = {piece: index for index, piece in enumerate(pieces)}
        self.special_ids = SpecialIds(*(ids[piece] for piece in marks.pieces))
        self.between = (self.special_ids.sep,) * marks.seps_between
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")
        content = json.dumps(facts, ensure_ascii=True, sort_keys=True)
        self.fingerprint = hashlib.sha256(content.encode("ascii")).hexdigest()
        self.backend = backend
        self._of_text = Tokenizer.from_str(backend.to_str())
        self._of_text.encode_special_tokens = True

    @property
    def identity(self) -> dict[str, Any]:
        """By what a model is told that it is its tokenizer: arguments of `check_tokenizer`."""
        return {"vocab_size": self.vocab_size, "fingerprint": self.fingerprint, "marks": self.marks}

    def encode(self, sentence: str) -> bytes:
        """Return the ids of one sentence, without special tokens, as raw bytes of `dtype`.

        "[MASK]" and the like inside the text are text here: they become brackets and letters, never special ids.
        """
        return self._raw(self._of_text, sentence)

    def encode_part(self, text: str, *, spaced: bool) -> bytes:
        """Return the ids of what stands behind other text, as `encode` does.

        Args:
            text: the part.
            spaced: whether a space parts it from what is before it.
        """
        raise NotImplementedError

    def encode_document(self, sentences: Sequence[str]) -> list[bytes]:
        """Return the ids of the sentences of a text, as `encode` does."""
        return [
            self.encode_part(sentence, spaced=True) if index else self.encode(sentence)
            for index, sentence in enumerate(sentences)
        ]

    def encode_sentences(self, sentences: list[str]) -> list[np.ndarray]:
        """Return the ids of each of some texts, without special tokens, as arrays of `dtype`."""
        return [np.frombuffer(self.encode(sentence), dtype=self.dtype) for sentence in sentences]

    def encode_with_offsets(self, text: str) -> EncodedText:
        """Return the ids of `encode`, and where in the text each comes from, spaces left out; nothing is cached."""
        found = self._of_text.encode(text, add_special_tokens=False)
        offsets = np.array([_trimmed(text, *span) for span in found.offsets], dtype=np.int32).reshape(-1, 2)
        return EncodedText(np.array(found.ids, dtype=np.int32), offsets[:, 0], offsets[:, 1])

    def continues(self, ids: np.ndarray) -> np.ndarray:
        """Whether each piece goes on with the word of the piece before it.

        Args:
            ids: int32 [n], sequences end to end; special pieces separate words.

        Returns:
            bool [n].
        """
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """Return readable text for ids; special pieces stay visible."""
        return self.backend.decode(ids, skip_special_tokens=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files of `TOKENIZER_FILES` that this kind has, as `transformers.AutoTokenizer` wants them."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        names = zip(SpecialIds._fields, self.marks.pieces, strict=True)
        config = {
            **self._hf_facts(),
            "model_max_length": MODEL_MAX_LENGTH,
            **{f"{name}_token": piece for name, piece in names},
        }
        (target / "tokenizer.json").write_text(self.backend.to_str(pretty=True) + "\n", encoding="utf-8")
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _hf_facts(self) -> dict[str, Any]:
        """Return what tokenizer_config.json says first: the class that opens the folder, and the text rules."""
        raise NotImplementedError

    def _raw(self, backend: Tokenizer, text: str) -> bytes:
        return np.array(backend.encode(text, add_special_tokens=False).ids, dtype=self.dtype).tobytes()


def _trimmed(text: str, start: int, stop: int) -> tuple[int, int]:
    """Return the characters start to stop - 1 without the white space at both ends."""
    while start < stop and text[start].isspace():
        start += 1
    while start < stop and text[stop - 1].isspace():
        stop -= 1
    return start, stop
