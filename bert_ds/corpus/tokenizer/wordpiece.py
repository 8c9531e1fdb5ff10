"""WordPiece: a BERT vocabulary, published or our own, that turns sentences into ids.

The arithmetic is that of `tokenizers` with BERT's normaliser, which is what Hugging Face's `BertTokenizer` runs. Ids
are cached per word: whitespace, ASCII punctuation and Chinese characters always separate words, so encoding the parts
between them one by one gives the ids of the whole text, several times faster.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from bert_ds.configuration.families.marks import BERT_MARKS
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer

SPECIAL_PIECES = BERT_MARKS.pieces
"""In the order of the ids that a newly trained vocabulary gives them."""

_CHINESE = "\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0002a6df"
_PUNCTUATION = r"!-/:-@\[-`{-~"
_PARTS_CHINESE_ALONE = re.compile(f"[{_CHINESE}{_PUNCTUATION}]|[^ {_CHINESE}{_PUNCTUATION}]+")
_PARTS = re.compile(f"[{_PUNCTUATION}]|[^ {_PUNCTUATION}]+")
_MAX_CACHED_PARTS = 1 << 18


class TextRules(NamedTuple):
    """What happens to text before it is cut into pieces."""

    lowercase: bool = True
    strip_accents: bool = True
    tokenize_chinese_chars: bool = True


class WordPieceTokenizer(TextTokenizer):
    """WordPiece after BERT's text rules.

    Attributes:
        rules: text rules.
        is_continuation: bool [vocab_size], true for "##" pieces.
    """

    kind = "wordpiece"

    def __init__(self, pieces: list[str], rules: TextRules) -> None:
        ids = {piece: index for index, piece in enumerate(pieces)}
        facts = {"pieces": pieces, "rules": rules._asdict()}
        super().__init__(pieces, BERT_MARKS, build_backend(ids, rules), facts=facts)
        self.rules = rules
        self.stands_alone = rules.tokenize_chinese_chars
        self.is_continuation = np.array([piece.startswith("##") and len(piece) > 2 for piece in pieces])
        self._parts = _PARTS_CHINESE_ALONE if rules.tokenize_chinese_chars else _PARTS
        self._cache = _PartCache(super().encode)

    def encode(self, sentence: str) -> bytes:
        """As `TextTokenizer.encode`."""
        parts = _PARTS if sentence.isascii() else self._parts
        return b"".join(map(self._cache.__getitem__, parts.findall(sentence)))

    def encode_part(self, text: str, *, spaced: bool) -> bytes:
        """As `encode`: what a piece is does not depend on a space in front of its word."""
        return self.encode(text)

    def continues(self, ids: np.ndarray) -> np.ndarray:
        """As `TextTokenizer.continues`: "##" pieces do."""
        return self.is_continuation[ids]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """As `TextTokenizer.save`, with vocab.txt."""
        super().save(folder)
        (Path(folder) / "vocab.txt").write_text("".join(f"{piece}\n" for piece in self.pieces), encoding="utf-8")

    def _hf_facts(self) -> dict[str, Any]:
        return {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.rules.lowercase,
            "strip_accents": self.rules.strip_accents,
            "tokenize_chinese_chars": self.rules.tokenize_chinese_chars,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return WordPieceTokenizer, (self.pieces, self.rules)


def build_backend(ids: dict[str, int], rules: TextRules) -> Tokenizer:
    """Return the `tokenizers` pipeline of BERT for a vocabulary: normaliser, words, pieces, [CLS] and [SEP]."""
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=rules.tokenize_chinese_chars,
        strip_accents=rules.strip_accents,
        lowercase=rules.lowercase,
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    if "[CLS]" in ids and "[SEP]" in ids:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS]:0 $A:0 [SEP]:0",
            pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
            special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
        )
    backend.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIAL_PIECES if piece in ids])
    return backend


class _PartCache(dict[str, bytes]):
    """Ids of the parts of text seen so far; bounded, and what it forgets is only computed again."""

    def __init__(self, encode: Callable[[str], bytes]) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, part: str) -> bytes:
        if len(self) >= _MAX_CACHED_PARTS:
            self.clear()
        self[part] = found = self._encode(part)
        return found
