"""WordPiece: load a BERT vocabulary, published or our own, and turn sentences into ids.

The arithmetic is that of `tokenizers` with BERT's normaliser, which is what Hugging Face's `BertTokenizer` runs. Ids
are cached per word: whitespace, ASCII punctuation and Chinese characters always separate words, so encoding the parts
between them one by one gives the ids of the whole text, several times faster.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from bert_ds.basics.input_gate import read_json, read_text, refuse_link_out
from bert_ds.basics.ranks import DataError

SPECIAL_PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""In the order of the ids that a newly trained vocabulary gives them."""

MODEL_MAX_LENGTH = 512
"""Written for Hugging Face, whose own default is no limit at all: longer inputs then crash in the position table."""

_CHINESE = "\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0002a6df"
_PUNCTUATION = r"!-/:-@\[-`{-~"
_PARTS_CHINESE_ALONE = re.compile(f"[{_CHINESE}{_PUNCTUATION}]|[^ {_CHINESE}{_PUNCTUATION}]+")
_PARTS = re.compile(f"[{_PUNCTUATION}]|[^ {_PUNCTUATION}]+")
_MAX_CACHED_PARTS = 1 << 18
_CASED_FRACTION = 0.01
_HALF_CHARACTER = re.compile("[\\ud800-\\udfff]")


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
    """int32 [n]: piece i is made of the characters starts[i] to stops[i] - 1."""
    stops: np.ndarray
    """int32 [n]."""


class TextRules(NamedTuple):
    """What happens to text before it is cut into pieces."""

    lowercase: bool = True
    strip_accents: bool = True
    tokenize_chinese_chars: bool = True


class WordPieceTokenizer:
    """An immutable vocabulary with its text rules.

    Attributes:
        pieces: piece of each id.
        rules: text rules.
        special_ids: ids of the special pieces.
        is_continuation: bool [vocab_size], true for "##" pieces.
        dtype: little-endian integer type that holds every id.
        fingerprint: sha256 over pieces and rules; equal exactly when every text gets the same ids.
    """

    def __init__(self, pieces: list[str], rules: TextRules) -> None:
        self.pieces = pieces
        self.rules = rules
        self.vocab_size = len(pieces)
        ids = {piece: index for index, piece in enumerate(pieces)}
        self.special_ids = SpecialIds(*(ids[piece] for piece in SPECIAL_PIECES))
        self.is_continuation = np.array([piece.startswith("##") and len(piece) > 2 for piece in pieces])
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")
        self.fingerprint = _fingerprint(pieces, rules)
        self.backend = build_backend(ids, rules)
        self._parts = _PARTS_CHINESE_ALONE if rules.tokenize_chinese_chars else _PARTS
        self._cache = _PartCache(self.backend, self.dtype)

    def encode(self, sentence: str) -> bytes:
        """Return the ids of one sentence, without special tokens, as raw bytes of `dtype`.

        "[MASK]" and the like inside the text are text here: they become brackets and letters, never special ids.
        """
        parts = _PARTS if sentence.isascii() else self._parts
        return b"".join(map(self._cache.__getitem__, parts.findall(sentence)))

    def encode_sentences(self, sentences: list[str]) -> list[np.ndarray]:
        """Return the ids of each sentence, without special tokens, as arrays of `dtype`."""
        return [np.frombuffer(self.encode(sentence), dtype=self.dtype) for sentence in sentences]

    def encode_with_offsets(self, text: str) -> EncodedText:
        """Return the ids of `encode`, and where in the text each comes from; slower, and nothing is cached."""
        found = self._cache.backend.encode(text, add_special_tokens=False)
        offsets = np.array(found.offsets, dtype=np.int32).reshape(-1, 2)
        return EncodedText(np.array(found.ids, dtype=np.int32), offsets[:, 0], offsets[:, 1])

    def decode(self, ids: list[int]) -> str:
        """Return readable text for ids; special pieces stay visible."""
        return self.backend.decode(ids, skip_special_tokens=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, vocab.txt and tokenizer_config.json as `transformers.AutoTokenizer` wants them."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.rules.lowercase,
            "strip_accents": self.rules.strip_accents,
            "tokenize_chinese_chars": self.rules.tokenize_chinese_chars,
            "model_max_length": MODEL_MAX_LENGTH,
            **{f"{piece[1:-1].lower()}_token": piece for piece in SPECIAL_PIECES},
        }
        (target / "tokenizer.json").write_text(self.backend.to_str(pretty=True) + "\n", encoding="utf-8")
        (target / "vocab.txt").write_text("".join(f"{piece}\n" for piece in self.pieces), encoding="utf-8")
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def __reduce__(self) -> tuple[Any, ...]:
        return WordPieceTokenizer, (self.pieces, self.rules)


def load_tokenizer(folder: str | os.PathLike[str]) -> WordPieceTokenizer:
    """Load a tokenizer folder: our own, an exported one, or a published one that holds just vocab.txt.

    The vocabulary is taken from tokenizer.json, or from vocab.txt where that is missing; the text rules from
    tokenizer_config.json, then tokenizer.json, then BERT's defaults (uncased). These are the rules of Hugging Face.

    Raises:
        DataError: a file is missing or damaged, a special piece is missing, a piece occurs twice, the two vocabularies
            differ, or a vocabulary with capitals comes without a file that says it is cased.
    """
    path = Path(folder)
    whole = _read_json(path / "tokenizer.json")
    config = _read_json(path / "tokenizer_config.json")
    listed = _read_vocab(path / "vocab.txt")
    if whole is None and listed is None:
        raise DataError(f"{path} holds neither tokenizer.json nor vocab.txt: a tokenizer folder is wanted")
    pieces = _pieces_of(path / "tokenizer.json", whole) if whole is not None else listed
    assert pieces is not None
    if listed is not None and listed != pieces:
        raise DataError(f"{path / 'vocab.txt'} and tokenizer.json hold different vocabularies: delete the wrong one")
    _check_pieces(path, pieces)
    return WordPieceTokenizer(pieces, _rules_of(path, pieces, whole, config))


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

    def __init__(self, backend: Tokenizer, dtype: np.dtype) -> None:
        super().__init__()
        self.backend = Tokenizer.from_str(backend.to_str())
        self.backend.encode_special_tokens = True
        self._dtype = dtype

    def __missing__(self, part: str) -> bytes:
        if len(self) >= _MAX_CACHED_PARTS:
            self.clear()
        ids = self.backend.encode(part, add_special_tokens=False).ids
        self[part] = found = np.array(ids, dtype=self._dtype).tobytes()
        return found


def _fingerprint(pieces: list[str], rules: TextRules) -> str:
    content = json.dumps({"pieces": pieces, "rules": rules._asdict()}, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(content.encode("ascii")).hexdigest()


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    refuse_link_out(path, error=DataError)
    content = read_json(path, error=DataError)
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, wanted an object")
    return content


def _read_vocab(path: Path) -> list[str] | None:
    if not path.exists():
        return None
    refuse_link_out(path, error=DataError)
    return read_text(path, error=DataError).removesuffix("\n").split("\n")


def _pieces_of(path: Path, whole: dict[str, Any]) -> list[str]:
    model = whole.get("model")
    kind = model.get("type", "WordPiece") if isinstance(model, dict) else None
    if kind != "WordPiece" or not isinstance(model, dict):
        raise DataError(f"{path} holds a {kind} model, wanted WordPiece")
    try:
        ids = dict(model["vocab"].items())
        for added in whole.get("added_tokens") or ():
            ids.setdefault(added["content"], added["id"])
        wrong = next((piece for piece, index in ids.items() if type(index) is not int or type(piece) is not str), None)
        if wrong is not None:
            raise DataError(f"{path}: the id of {str(wrong)[:60]!r} is {str(ids[wrong])[:60]}, wanted a whole number")
        is_whole = sorted(ids.values()) == list(range(len(ids)))
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no vocabulary of pieces and ids: {error!r}") from None
    if not is_whole:
        raise DataError(f"{path}: the ids of its {len(ids)} pieces are not 0..{len(ids) - 1}, each once")
    return sorted(ids, key=ids.__getitem__)


def _check_pieces(path: Path, pieces: list[str]) -> None:
    missing = [piece for piece in SPECIAL_PIECES if piece not in pieces]
    if missing:
        raise DataError(f"the vocabulary of {path} lacks {', '.join(missing)}")
    if len(set(pieces)) != len(pieces):
        seen: set[str] = set()
        twice = next(piece for piece in pieces if piece in seen or seen.add(piece))  # type: ignore[func-returns-value]
        raise DataError(f"the vocabulary of {path} holds {twice!r} twice")
    if "" in pieces:
        raise DataError(f"the vocabulary of {path} holds an empty piece at id {pieces.index('')}")
    halves = next((index for index, piece in enumerate(pieces) if _HALF_CHARACTER.search(piece)), None)
    if halves is not None:
        raise DataError(f"the vocabulary of {path} holds half a character at id {halves}: {pieces[halves]!r}")


def _rules_of(path: Path, pieces: list[str], whole: dict[str, Any] | None, config: dict[str, Any] | None) -> TextRules:
    normalizer = (whole or {}).get("normalizer") or {}
    if not isinstance(normalizer, dict):
        raise DataError(f"{path}: normalizer is {str(normalizer)[:60]!r}, wanted an object")
    config = config or {}
    lowercase = config.get("do_lower_case", normalizer.get("lowercase"))
    if lowercase is None:
        with_capitals = sum(piece != piece.lower() for piece in pieces if piece not in SPECIAL_PIECES)
        if with_capitals > _CASED_FRACTION * len(pieces):
            raise DataError(
                f"{path}: {with_capitals} of {len(pieces)} pieces have capitals, but no tokenizer_config.json says "
                'whether text is lowercased: add one with {"do_lower_case": false}'
            )
        lowercase = True
    strip_accents = config.get("strip_accents", normalizer.get("strip_accents"))
    chinese = config.get("tokenize_chinese_chars", normalizer.get("handle_chinese_chars", True))
    strip_accents = lowercase if strip_accents is None else strip_accents
    rules = {"do_lower_case": lowercase, "strip_accents": strip_accents, "tokenize_chinese_chars": chinese}
    for name, value in rules.items():
        if not isinstance(value, bool):
            raise DataError(f"{path}: {name} is {str(value)[:60]!r}, wanted true or false")
    return TextRules(bool(lowercase), bool(strip_accents), bool(chinese))
