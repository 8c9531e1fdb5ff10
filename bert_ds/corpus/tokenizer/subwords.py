"""Byte-level BPE (Radford et al. 2019; RoBERTa, arXiv 1907.11692) and Unigram (Kudo 2018, arXiv 1804.10959).

The pipelines are built here from a vocabulary and a few rules, as `tokenizers` runs them; of a folder whose
tokenizer.json says anything else the difference is named. A space belongs to the word behind it, so what a text is cut
into depends on whether it has one in front: `encode_part` is told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from bert_ds.configuration.families.marks import BERT_MARKS, Marks
from bert_ds.corpus.tokenizer.text_tokenizer import EncodedText, TextTokenizer
from bert_ds.corpus.tokenizer.word_begins import WordBegins

SPACE_MARK = "▁"
"""What a space is in the pieces of Unigram."""


class SubwordRules(NamedTuple):
    """What a text goes through before it is cut."""

    space_first: bool = True
    """Whether a text that begins without a space gets one, so that its first word is like any other."""
    nfc: bool = False
    """Whether characters are composed first; of BPE alone."""


class SpacedTokenizer(TextTokenizer):
    """What both kinds share: pieces that carry their text, spaces included."""

    def __init__(
        self, pieces: list[str], marks: Marks, backend: Tokenizer, *, bare: Tokenizer, facts: dict[str, Any]
    ) -> None:
        super().__init__(pieces, marks, backend, facts={"kind": self.kind, "marks": marks, **facts})
        self._bare = bare
        self._bare.encode_special_tokens = True
        self._begins = WordBegins([b"" if piece in marks.pieces else self._text_of(piece) for piece in pieces])

    def encode_part(self, text: str, *, spaced: bool) -> bytes:
        """As `TextTokenizer.encode_part`."""
        return self._raw(self._bare, f" {text}" if spaced and text else text)

    def encode_with_offsets(self, text: str) -> EncodedText:
        """As `TextTokenizer.encode_with_offsets`; a piece that is nothing but space has no characters."""
        found = super().encode_with_offsets(text)
        return found._replace(stops=np.where(self._begins.is_blank[found.ids], found.starts, found.stops))

    def continues(self, ids: np.ndarray) -> np.ndarray:
        """As `TextTokenizer.continues`."""
        return self._begins.continues(ids)

    def _hf_facts(self) -> dict[str, Any]:
        segments = ["token_type_ids"] if self.marks == BERT_MARKS else []
        names = ["input_ids", *segments, "attention_mask"]
        return {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": names}

    def _text_of(self, piece: str) -> bytes:
        """Return the UTF-8 that a piece stands for, or its part of it."""
        raise NotImplementedError


class BpeTokenizer(SpacedTokenizer):
    """Byte-level BPE: any text has pieces, and a piece may be part of a character."""

    kind = "bpe"

    def __init__(self, pieces: list[str], merges: list[tuple[str, str]], marks: Marks, rules: SubwordRules) -> None:
        self.merges, self.rules = merges, rules
        ids = {piece: index for index, piece in enumerate(pieces)}
        self._byte_of = {character: code for code, character in enumerate(byte_alphabet())}
        bare = bpe_backend(ids, merges, marks, rules._replace(space_first=False))
        facts = {"pieces": pieces, "merges": merges, "rules": rules._asdict()}
        super().__init__(pieces, marks, bpe_backend(ids, merges, marks, rules), bare=bare, facts=facts)

    def _text_of(self, piece: str) -> bytes:
        return bytes(self._byte_of[character] for character in piece)

    def _hf_facts(self) -> dict[str, Any]:
        return {**super()._hf_facts(), "add_prefix_space": self.rules.space_first}

    def __reduce__(self) -> tuple[Any, ...]:
        return BpeTokenizer, (self.pieces, self.merges, self.marks, self.rules)


class UnigramTokenizer(SpacedTokenizer):
    """Unigram over normalised text; a word with a character outside the alphabet holds an unknown piece."""

    kind = "unigram"

    def __init__(self, scored: list[tuple[str, float]], marks: Marks) -> None:
        self.scored = scored
        pieces = [piece for piece, _ in scored]
        bare = unigram_backend(scored, marks, space_first=False)
        super().__init__(pieces, marks, unigram_backend(scored, marks), bare=bare, facts={"scored": scored})
        # The model would find special pieces in a text: there a space stands behind their first character.
        first, rest = marks.mask[0], "|".join(re.escape(piece[1:]) for piece in marks.pieces)
        apart = normalizers.Replace(Regex(f"{re.escape(first)}(?={rest})"), f"{first} ")
        for backend in (self._of_text, self._bare):
            backend.normalizer = normalizers.Sequence([unigram_normalizer(), apart])

    def _text_of(self, piece: str) -> bytes:
        return piece.replace(SPACE_MARK, " ").encode()

    def __reduce__(self) -> tuple[Any, ...]:
        return UnigramTokenizer, (self.scored, self.marks)


def byte_alphabet() -> list[str]:
    """Return the character that stands for each byte in the pieces of byte-level BPE (GPT-2's `bytes_to_unicode`)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(code if code in printable else next(others)) for code in range(0x100)]


def bpe_backend(ids: Mapping[str, int], merges: list[tuple[str, str]], marks: Marks, rules: SubwordRules) -> Tokenizer:
    """Return the pipeline of RoBERTa's tokenizer, or of ModernBERT's, for a vocabulary."""
    backend = Tokenizer(models.BPE(vocab=dict(ids), merges=merges))
    if rules.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=rules.space_first)
    backend.decoder = decoders.ByteLevel()
    return _with_marks(backend, ids, marks)


def unigram_backend(scored: list[tuple[str, float]], marks: Marks, *, space_first: bool = True) -> Tokenizer:
    """Return the pipeline of a Unigram vocabulary: NFKC, one space for several, the space in front of its word."""
    ids = {piece: index for index, (piece, _) in enumerate(scored)}
    backend = Tokenizer(models.Unigram(scored, unk_id=ids.get(marks.unk)))
    backend.normalizer = unigram_normalizer()
    scheme = "always" if space_first else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE_MARK, prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(SPACE_MARK, prepend_scheme=scheme)
    return _with_marks(backend, ids, marks)


def unigram_normalizer() -> normalizers.Normalizer:
    """Return what a text goes through first."""
    several = normalizers.Replace(Regex(" {2,}"), " ")
    return normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), several])


def _with_marks(backend: Tokenizer, ids: Mapping[str, int], marks: Marks) -> Tokenizer:
    """Add special pieces and what stands around one text and around two, where the vocabulary has them."""
    # A space in front of the gap is part of the word that is wanted there.
    known = [piece for piece in marks.pieces if piece in ids]
    backend.add_special_tokens([AddedToken(piece, lstrip=piece == marks.mask, special=True) for piece in known])
    if marks.cls in ids and marks.sep in ids:
        between = " ".join([f"{marks.sep}:0"] * marks.seps_between)
        segment = 1 if marks == BERT_MARKS else 0
        backend.post_processor = processors.TemplateProcessing(
            single=f"{marks.cls}:0 $A:0 {marks.sep}:0",
            pair=f"{marks.cls}:0 $A:0 {between} $B:{segment} {marks.sep}:{segment}",
            special_tokens=[(piece, ids[piece]) for piece in (marks.cls, marks.sep)],
        )
    return backend
