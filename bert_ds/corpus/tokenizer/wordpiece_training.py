"""Training a WordPiece vocabulary, the same one every time.

`tokenizers` numbers the characters of its alphabet in the order of a hash map, and that order decides ties between
merges, so two trainings on one text differ. Giving it the whole alphabet beforehand, sorted, once as it is and once as
"##" pieces, under the name of special tokens, leaves nothing to chance.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, trainers

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.corpus.tokenizer.wordpiece import SPECIAL_PIECES, TextRules, WordPieceTokenizer, build_backend
from bert_ds.folders.replaced_folders import new_folder

CHARACTER_COVERAGE = 0.9999
"""The most frequent characters that make up this share of the text get a piece; words with others become [UNK]."""

MIN_PAIR_COUNT = 2
"""Two pieces are merged only where they meet at least this often."""

_COUNTED_AT_ONCE = 1 << 22


def train_wordpiece(
    texts: Iterable[str],
    *,
    vocab_size: int,
    lowercase: bool,
    output: str | os.PathLike[str],
    report: Callable[[int, str], None] | None = None,
) -> WordPieceTokenizer:
    """Train a vocabulary of exactly `vocab_size` pieces and write the tokenizer folder `output`.

    Args:
        texts: documents; they are read twice, so a list or another object that starts over when it is iterated again.
        vocab_size: number of pieces, the five special ones included.
        lowercase: uncased: lower case and without accents.
        output: folder that does not exist yet, or is empty.
        report: called now and then with the characters read so far (of both readings) and what is being done.

    Raises:
        ConfigError: `vocab_size` is smaller than the alphabet needs or larger than the text yields, or `output` is
            neither new nor empty or cannot be written; the latter two before the text is read.
        DataError: there is no text.
    """
    refuse_read_once(texts)
    rules = TextRules(lowercase=lowercase, strip_accents=lowercase, tokenize_chinese_chars=True)
    with new_folder(Path(output)) as folder:
        tokenizer = _learn(texts, vocab_size, rules, progress=Progress(report))
        tokenizer.save(folder)
    return tokenizer


def _learn(texts: Iterable[str], vocab_size: int, rules: TextRules, *, progress: Progress) -> WordPieceTokenizer:
    normalise = build_backend({"[UNK]": 0}, rules).normalizer.normalize_str
    kept, dropped = frequent_characters(progress.through(texts, "counting characters"), normalise)
    forced = _forced_pieces(kept, rules)
    if vocab_size < len(forced):
        raise too_small(vocab_size, f"the {len(kept)} characters of this text", needed=len(forced))
    pieces = _train(progress.through(texts, "learning pieces"), forced, dropped, rules, vocab_size)
    if len(pieces) != vocab_size:
        raise too_large(vocab_size, found=len(pieces))
    return WordPieceTokenizer(pieces, rules)


class Progress:
    """Tells now and then how many characters were read, over all readings."""

    def __init__(self, report: Callable[[int, str], None] | None) -> None:
        self._report = report
        self._done = 0

    def through(self, texts: Iterable[str], text: str) -> Iterator[str]:
        """Yield the documents; `text` says what is being done with them."""
        for index, document in enumerate(texts):
            self._done += len(document)
            if self._report is not None and index % 64 == 0:
                self._report(self._done, text)
            yield document


def _count_characters(texts: Iterable[str]) -> Counter[str]:
    totals = np.zeros(0x110000, dtype=np.int64)

    def add(waiting: list[str]) -> None:
        codes = np.frombuffer("".join(waiting).encode("utf-32-le"), dtype="<u4")
        totals[:] += np.bincount(codes, minlength=len(totals))

    waiting: list[str] = []
    size = 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if size >= _COUNTED_AT_ONCE:
            add(waiting)
            waiting, size = [], 0
    add(waiting)
    return Counter({chr(code): int(totals[code]) for code in np.flatnonzero(totals)})


def frequent_characters(texts: Iterable[str], normalise: Callable[[str], str]) -> tuple[list[str], list[str]]:
    """Return the characters that get a piece, sorted, and the raw characters that are left out of the training text.

    The normaliser works character by character, so it is enough to normalise each distinct one.

    Raises:
        DataError: there is no text.
    """
    counts = _count_characters(texts)
    if not counts:
        raise DataError("there is no text to train a tokenizer on")
    normalised = {raw: normalise(raw).replace(" ", "") for raw in counts}
    totals: Counter[str] = Counter()
    for raw, count in counts.items():
        for character in normalised[raw]:
            totals[character] += count
    wanted = CHARACTER_COVERAGE * totals.total()
    kept: set[str] = set()
    covered = 0
    for character, count in sorted(totals.items(), key=lambda item: (-item[1], item[0])):
        if covered >= wanted:
            break
        kept.add(character)
        covered += count
    dropped = [raw for raw, text in normalised.items() if not kept.issuperset(text)]
    return sorted(kept), sorted(dropped)


def _forced_pieces(alphabet: list[str], rules: TextRules) -> list[str]:
    """Special pieces, then every character, then the "##" form of those that can stand inside a word."""
    backend = build_backend({"[UNK]": 0}, rules)

    def joins(character: str) -> bool:
        text = backend.normalizer.normalize_str(f"a{character}")
        return len(backend.pre_tokenizer.pre_tokenize_str(text)) == 1

    return [*SPECIAL_PIECES, *alphabet, *(f"##{character}" for character in alphabet if joins(character))]


def _train(texts: Iterable[str], forced: list[str], dropped: list[str], rules: TextRules, vocab_size: int) -> list[str]:
    backend: Tokenizer = build_backend({"[UNK]": 0}, rules)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_PAIR_COUNT,
        special_tokens=forced,
        limit_alphabet=0,
        show_progress=False,
    )
    # A word with a character outside the alphabet would be learned as if that character were not there.
    backend.train_from_iterator(without_characters(texts, dropped), trainer)
    ids = backend.get_vocab(with_added_tokens=False)
    return sorted(ids, key=ids.__getitem__)


def without_characters(texts: Iterable[str], dropped: list[str]) -> Iterable[str]:
    """Return the texts with a space for each of some characters."""
    if not dropped:
        return texts
    outside = re.compile("[" + "".join(map(re.escape, dropped)) + "]")
    return (text if text.isascii() else outside.sub(" ", text) for text in texts)


def refuse_read_once(texts: Iterable[str]) -> None:
    """Raise ValueError where texts cannot be read twice."""
    if iter(texts) is texts:
        raise ValueError("texts is an iterator that can be read once only; give a list or an object that starts over")


def too_small(vocab_size: int, alphabet: str, *, needed: int) -> ConfigError:
    """Return what is said of a vocabulary that has no room for its alphabet."""
    text = f"the special pieces and {alphabet} need {needed} pieces already"
    return ConfigError(f"vocab_size {vocab_size} is too small: {text}")


def too_large(vocab_size: int, *, found: int) -> ConfigError:
    """Return what is said of a vocabulary that the text is too short for."""
    return ConfigError(f"vocab_size {vocab_size} is too large: this text yields only {found} pieces")
