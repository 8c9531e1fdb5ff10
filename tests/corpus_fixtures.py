"""Tiny shard folders whose every token is chosen by the test."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np

from bert_ds.configuration.families.marks import ROBERTA_MARKS
from bert_ds.corpus.shards.shard_folder import COUNT_DTYPE, MANIFEST, ShardSplit, file_sha256, open_shards
from bert_ds.corpus.tokenizer.subwords import UnigramTokenizer
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer
from bert_ds.corpus.tokenizer.wordpiece import SPECIAL_PIECES, TextRules, WordPieceTokenizer

Documents = list[list[list[int]]]
"""Documents of sentences of token ids."""

FIRST_TEXT_ID = len(SPECIAL_PIECES)


@cache
def tiny_tokenizer(num_words: int = 995, extra: tuple[str, ...] = ()) -> WordPieceTokenizer:
    """Special pieces 0 to 4, then words w5, w6, ..., then the extra pieces."""
    words = [f"w{index}" for index in range(FIRST_TEXT_ID, FIRST_TEXT_ID + num_words)]
    return WordPieceTokenizer([*SPECIAL_PIECES, *words, *extra], TextRules())


@cache
def tiny_unigram(num_words: int = 995) -> UnigramTokenizer:
    """As `tiny_tokenizer`, with RoBERTa's special pieces."""
    special = [(piece, 0.0) for piece in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")]
    words = [(f"▁w{index}", -1.0) for index in range(FIRST_TEXT_ID, FIRST_TEXT_ID + num_words)]
    return UnigramTokenizer([*special, *words], ROBERTA_MARKS)


def write_shards(
    folder: Path,
    train: Documents,
    validation: Documents | None = None,
    *,
    tokenizer: TextTokenizer | None = None,
    documents_per_shard: int = 3,
) -> Path:
    """Write a shard folder with a few documents in each shard."""
    tokenizer = tokenizer or tiny_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "tokenizer")
    splits = {"train": train, "validation": validation or []}
    manifest = {
        "format": 1,
        "dtype": "uint16",
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "special_ids": tokenizer.special_ids._asdict(),
        "input": {},
        "settings": {},
        "splits": {name: _write_split(folder, name, docs, documents_per_shard) for name, docs in splits.items()},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def open_train(folder: Path, train: Documents) -> ShardSplit:
    """Write the documents and open them."""
    return open_shards(write_shards(folder, train), "train")


def counting_documents(lengths: list[list[int]]) -> Documents:
    """Documents with sentences of these lengths, whose tokens count up from 5 over the whole corpus."""
    ids = iter(range(FIRST_TEXT_ID, FIRST_TEXT_ID + sum(map(sum, lengths))))
    return [[[next(ids) for _ in range(length)] for length in document] for document in lengths]


def random_documents(num_documents: int, *, seed: int = 0) -> Documents:
    """Documents of 1 to 12 sentences of 1 to 30 random words."""
    rng = np.random.default_rng(seed)

    def sentence() -> list[int]:
        return rng.integers(FIRST_TEXT_ID, 1000, rng.integers(1, 31)).tolist()

    return [[sentence() for _ in range(rng.integers(1, 13))] for _ in range(num_documents)]


def _write_split(folder: Path, split: str, documents: Documents, per_shard: int) -> dict:
    groups = [documents[first : first + per_shard] for first in range(0, len(documents), per_shard)]
    shards = [_write_shard(folder, f"{split}-{index:05d}", group) for index, group in enumerate(groups)]
    counts = ("num_documents", "num_sentences", "num_tokens")
    return {count: sum(shard[count] for shard in shards) for count in counts} | {"shards": shards}


def _write_shard(folder: Path, name: str, documents: Documents) -> dict:
    sentences = [sentence for document in documents for sentence in document]
    arrays = {
        "tokens": np.array([piece for sentence in sentences for piece in sentence], dtype="<u2"),
        "sentences": np.array([len(sentence) for sentence in sentences], dtype=COUNT_DTYPE),
        "documents": np.array([len(document) for document in documents], dtype=COUNT_DTYPE),
    }
    files = {}
    for kind, array in arrays.items():
        path = folder / f"{name}.{kind}"
        array.tofile(path)
        files[kind] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    counts = {f"num_{kind}": len(array) for kind, array in arrays.items()}
    return {"name": name, "files": files, **counts}
