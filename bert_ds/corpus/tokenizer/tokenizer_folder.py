"""A tokenizer folder: our own, an exported one, or a published one. What is in it is read strictly and run by nobody.

Of tokenizer.json the vocabulary is taken and the rules that this project knows; the pipeline is then built by ours.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bert_ds.basics.input_gate import read_json, read_text, refuse_link_out
from bert_ds.basics.ranks import DataError
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.families.marks import MARKS, Marks
from bert_ds.configuration.model_folder import special_pieces_problem
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.corpus.tokenizer.subwords import (
    BpeTokenizer,
    SubwordRules,
    UnigramTokenizer,
    byte_alphabet,
    unigram_backend,
)
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer
from bert_ds.corpus.tokenizer.wordpiece import SPECIAL_PIECES, TextRules, WordPieceTokenizer

_CASED_FRACTION = 0.01
_HALF_CHARACTER = re.compile("[\\ud800-\\udfff]")
_MODELS = ("WordPiece", "BPE", "Unigram")
_BPE_MODEL: dict[str, tuple[Any, ...]] = {
    "dropout": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False,),
    "ignore_merges": (False,),
}
"""What the model of a byte-level BPE may say besides its vocabulary."""


def load_tokenizer(folder: str | os.PathLike[str]) -> TextTokenizer:
    """Load a tokenizer folder.

    The vocabulary is taken from tokenizer.json, or from vocab.txt where that is missing; the text rules of WordPiece
    from tokenizer_config.json, then tokenizer.json, then BERT's defaults (uncased). These are the rules of Hugging
    Face.

    Raises:
        DataError: a file is missing or damaged, a special piece is missing, a piece occurs twice, the two vocabularies
            differ, a vocabulary with capitals comes without a file that says it is cased, or the tokenizer is none
            that this project has.
    """
    path = Path(folder)
    whole = _read_json(path / "tokenizer.json")
    listed = _read_vocab(path / "vocab.txt")
    if whole is None and listed is None:
        raise DataError(f"{path} holds neither tokenizer.json nor vocab.txt: a tokenizer folder is wanted")
    kind = model_type(whole) if whole is not None else "WordPiece"
    if kind not in _MODELS:
        raise DataError(f"{path / 'tokenizer.json'} holds a {kind} model, wanted WordPiece, BPE or Unigram")
    if whole is not None and kind == "BPE":
        return _bpe_of(path / "tokenizer.json", whole)
    if whole is not None and kind == "Unigram":
        return _unigram_of(path / "tokenizer.json", whole)
    pieces = _pieces_of(path / "tokenizer.json", whole) if whole is not None else listed
    assert pieces is not None
    if listed is not None and listed != pieces:
        raise DataError(f"{path / 'vocab.txt'} and tokenizer.json hold different vocabularies: delete the wrong one")
    _check_pieces(path, pieces, MARKS["bert"])
    return WordPieceTokenizer(pieces, _rules_of(path, pieces, whole, _read_json(path / "tokenizer_config.json")))


def load_tokenizer_for(model: EncoderConfig, folder: Path) -> TextTokenizer:
    """As `load_tokenizer`; ConfigError where the model wants other special pieces or another id of the padding."""
    tokenizer = load_tokenizer(folder)
    ids = dict(zip(tokenizer.marks.pieces, tokenizer.special_ids, strict=True))
    if (text := special_pieces_problem(model, ids)) is not None:
        raise ConfigError(f"{folder}: {text}")
    return tokenizer


def model_type(whole: Mapping[str, Any]) -> str | None:
    """Return what kind of model a tokenizer.json says that it holds; the oldest do not, and hold WordPiece."""
    model = whole.get("model")
    return str(model.get("type", "WordPiece"))[:60] if isinstance(model, dict) else None


def _bpe_of(path: Path, whole: dict[str, Any]) -> BpeTokenizer:
    pieces = _pieces_of(path, whole)
    marks = _marks_of(path, pieces)
    _check_pieces(path, pieces, marks)
    model, cutter, normalizer = whole["model"], whole.get("pre_tokenizer"), whole.get("normalizer")
    wrong = [
        f"model.{name} {model[name]!r}" for name, known in _BPE_MODEL.items() if model.get(name, known[0]) not in known
    ]
    if not isinstance(cutter, dict) or cutter.get("type") != "ByteLevel" or cutter.get("use_regex", True) is not True:
        wrong.append(f"pre_tokenizer {_short(cutter)}")
    if normalizer not in (None, {"type": "NFC"}):
        wrong.append(f"normalizer {_short(normalizer)}")
    _refuse_other(path, wrong + _foreign_additions(whole, marks), wanted="byte-level BPE as RoBERTa has it")
    assert isinstance(cutter, dict)
    spelled = set(byte_alphabet())
    if missing := spelled - set(pieces):
        raise DataError(f"the vocabulary of {path} lacks {len(missing)} of the 256 bytes: wanted a piece for each")
    if foreign := [piece for piece in pieces if piece not in marks.pieces and not spelled.issuperset(piece)]:
        raise DataError(f"the vocabulary of {path} holds {foreign[0][:60]!r}, which spells no bytes")
    rules = SubwordRules(bool(cutter.get("add_prefix_space", True)), nfc=normalizer is not None)
    return BpeTokenizer(pieces, _merges_of(path, model, set(pieces)), marks, rules)


def _merges_of(path: Path, model: Mapping[str, Any], pieces: set[str]) -> list[tuple[str, str]]:
    """Return the pairs that are joined, the first ones first."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise DataError(f"{path}: model.merges is {_short(merges)}, wanted a list of pairs")
    found: list[tuple[str, str]] = []
    for number, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise DataError(f"{path}: model.merges.{number} is {_short(merge)}, wanted two pieces")
        if lacking := [part for part in (*pair, "".join(pair)) if part not in pieces]:
            raise DataError(f"{path}: model.merges.{number} wants the piece {lacking[0][:60]!r}, which is not there")
        found.append((pair[0], pair[1]))
    return found


def _unigram_of(path: Path, whole: dict[str, Any]) -> UnigramTokenizer:
    model = whole["model"]
    scored: list[tuple[str, float]] = []
    rows = model.get("vocab")
    for number, row in enumerate(rows if isinstance(rows, list) else ()):
        is_pair = isinstance(row, list) and len(row) == 2 and isinstance(row[0], str)
        if not is_pair or not isinstance(row[1], int | float) or not math.isfinite(row[1]):
            raise DataError(f"{path}: model.vocab.{number} is {_short(row)}, wanted a piece and its score")
        scored.append((row[0], float(row[1])))
    pieces = [piece for piece, _ in scored]
    marks = _marks_of(path, pieces)
    _check_pieces(path, pieces, marks)
    wanted = json.loads(unigram_backend(scored, marks).to_str())
    wrong = [
        f"{name} {_short(whole.get(name))}"
        for name in ("normalizer", "pre_tokenizer")
        if whole.get(name) != wanted[name]
    ]
    wrong += [
        f"model.{name} {_short(model.get(name))}"
        for name in ("unk_id", "byte_fallback")
        if model.get(name) != wanted["model"][name]
    ]
    _refuse_other(path, wrong + _foreign_additions(whole, marks), wanted="Unigram as train_tokenizer makes it")
    return UnigramTokenizer(scored, marks)


def _refuse_other(path: Path, wrong: list[str], *, wanted: str) -> None:
    if wrong:
        raise DataError(f"{path}: found {', '.join(wrong)}: wanted {wanted}")


def _foreign_additions(whole: Mapping[str, Any], marks: Marks) -> list[str]:
    """Return the pieces that are looked for in a text before all others, and are no special ones."""
    added = whole.get("added_tokens") or []
    names = [one.get("content") if isinstance(one, dict) else one for one in added] if isinstance(added, list) else []
    return [f"the added piece {_short(name)}" for name in names if name not in marks.pieces][:1]


def _marks_of(path: Path, pieces: list[str]) -> Marks:
    """Return the names of the special pieces of a vocabulary: those of which it has the most."""
    have = set(pieces)
    return max(MARKS.values(), key=lambda marks: len(have.intersection(marks.pieces)))


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
    model = whole["model"]
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


def _check_pieces(path: Path, pieces: list[str], marks: Marks) -> None:
    missing = [piece for piece in marks.pieces if piece not in pieces]
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


def _short(value: object) -> str:
    return repr(value)[:60]
