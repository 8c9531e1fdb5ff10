"""Training byte-level BPE and Unigram, the same vocabulary every time.

The alphabet of byte-level BPE is known beforehand and its merges are whole numbers: `tokenizers` gives the same bytes
whatever it is run with. Unigram sums probabilities in the order of a hash map and of its threads, so that scores differ
in their last digits from run to run. They are rounded, and the pieces put in the order of score and name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.families.marks import BERT_MARKS, MARKS, Marks
from bert_ds.corpus.tokenizer.subwords import (
    SPACE_MARK,
    BpeTokenizer,
    SubwordRules,
    UnigramTokenizer,
    bpe_backend,
    byte_alphabet,
    unigram_normalizer,
)
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer
from bert_ds.corpus.tokenizer.wordpiece_training import (
    MIN_PAIR_COUNT,
    Progress,
    frequent_characters,
    refuse_read_once,
    too_large,
    too_small,
    without_characters,
)
from bert_ds.folders.replaced_folders import new_folder

SCORE_DIGITS = 4
"""Digits behind the point that a score of Unigram keeps."""

RARE_STEP = 1e-4
"""Between the scores that `tokenizers` gives to characters that it must keep and has learned nothing of."""

SubwordKind = Literal["bpe", "unigram"]


def train_subwords(
    texts: Iterable[str],
    *,
    kind: SubwordKind,
    vocab_size: int,
    marks: str = "roberta",
    output: str | os.PathLike[str],
    report: Callable[[int, str], None] | None = None,
) -> TextTokenizer:
    """Train a vocabulary of exactly `vocab_size` pieces, capitals and accents kept, and write the folder `output`.

    Args:
        texts: documents; Unigram reads them twice, so a list or another object that starts over.
        kind: "bpe" or "unigram".
        vocab_size: number of pieces, the five special ones included.
        marks: a name of `MARKS`: how the special pieces are called.
        output: folder that does not exist yet, or is empty.
        report: called now and then with the characters read so far (of all readings) and what is being done.

    Raises:
        ConfigError: `vocab_size` is smaller than the alphabet needs or larger than the text yields, or `output` is
            neither new nor empty or cannot be written; the latter two before the text is read.
        DataError: there is no text.
    """
    refuse_read_once(texts)
    learn = {"bpe": _learn_bpe, "unigram": _learn_unigram}[kind]
    with new_folder(Path(output)) as folder:
        tokenizer = learn(texts, vocab_size, MARKS[marks], progress=Progress(report))
        if tokenizer.vocab_size != vocab_size:
            raise too_large(vocab_size, found=tokenizer.vocab_size)
        tokenizer.save(folder)
    return tokenizer


def _first_pieces(marks: Marks) -> list[str]:
    """Return the special pieces in the order of their ids, which is the one of the published vocabularies."""
    return list(marks.pieces if marks == BERT_MARKS else (marks.cls, marks.pad, marks.sep, marks.unk, marks.mask))


def _learn_bpe(texts: Iterable[str], vocab_size: int, marks: Marks, *, progress: Progress) -> TextTokenizer:
    special, alphabet = _first_pieces(marks), byte_alphabet()
    if vocab_size < (needed := len(special) + len(alphabet)):
        raise too_small(vocab_size, "the 256 bytes", needed=needed)
    rules = SubwordRules()
    backend = bpe_backend({}, [], marks, rules)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_PAIR_COUNT,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    size = 0

    def counted() -> Iterable[str]:
        nonlocal size
        for text in progress.through(texts, "learning pieces"):
            size += len(text)
            yield text

    backend.train_from_iterator(counted(), trainer)
    if not size:
        raise DataError("there is no text to train a tokenizer on")
    model = json.loads(backend.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [(first, second) for first, second in model["merges"]]
    return BpeTokenizer(pieces, merges, marks, rules)


def _learn_unigram(texts: Iterable[str], vocab_size: int, marks: Marks, *, progress: Progress) -> TextTokenizer:
    special, normalizer = _first_pieces(marks), unigram_normalizer()
    kept, dropped = frequent_characters(progress.through(texts, "counting characters"), normalizer.normalize_str)
    if vocab_size < (needed := len({*special, *kept, SPACE_MARK})):
        raise too_small(vocab_size, f"the {len(kept)} characters of this text", needed=needed)
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE_MARK, prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token=marks.unk, show_progress=False
    )
    backend.train_from_iterator(without_characters(progress.through(texts, "learning pieces"), dropped), trainer)
    learned = [(str(piece), float(score)) for piece, score in json.loads(backend.to_str())["model"]["vocab"]]
    return UnigramTokenizer(learned[: len(special)] + _in_one_order(learned[len(special) :]), marks)


def _in_one_order(learned: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Return pieces and scores without what differs from run to run.

    Characters that training has thrown out come back with the lowest score and steps of RARE_STEP above it, in the
    order of a hash map: here in their own.
    """
    lowest = min((score for _, score in learned), default=0.0)
    steps = {piece: (score - lowest) / RARE_STEP for piece, score in learned if len(piece) == 1}
    rare = {piece for piece, step in steps.items() if abs(step - round(step)) < 1e-6}
    scores = sorted(score for piece, score in learned if piece in rare)
    found = {**dict(learned), **dict(zip(sorted(rare), scores, strict=True))}
    rounded = {piece: round(score, SCORE_DIGITS) for piece, score in found.items()}
    return sorted(rounded.items(), key=lambda row: (-row[1], row[0]))
