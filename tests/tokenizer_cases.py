"""A small tokenizer of each kind, trained on one text with accents, Chinese and emoji."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bert_ds.corpus.tokenizer.subword_training import train_subwords
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer
from bert_ds.corpus.tokenizer.wordpiece_training import train_wordpiece

TEXTS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Foxes were quicker than dogs; dogs are lazier than foxes!",
    "Über die Brücke liefen füchse, naïve façade, résumé. In the café - 12 5",
    "我爱北京天安门，天安门上太阳升。",
    "we like 😀 and 😀 and 👍 a lot (and the ❤️ too)",
]
KINDS = ("wordpiece", "bpe", "unigram")
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
_SIZES = {"wordpiece": 140, "bpe": 330, "unigram": 88}


def train(kind: str, output: Path, *, texts: list[str] = TEXTS * 3, vocab_size: int | None = None) -> TextTokenizer:
    """Train one of the kinds."""
    settings: dict[str, Any] = {"vocab_size": vocab_size or _SIZES[kind], "output": output}
    if kind == "wordpiece":
        return train_wordpiece(texts, lowercase=True, **settings)
    return train_subwords(texts, kind=kind, **settings)  # type: ignore[arg-type]


@cache
def small_tokenizer(kind: str) -> TextTokenizer:
    """Return the tokenizer of a kind."""
    with tempfile.TemporaryDirectory() as folder:
        return train(kind, Path(folder) / "t")
