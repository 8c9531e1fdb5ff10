"""Token shards on disk: what the folder holds, how it is read, how it is verified.

A shard is three raw little-endian files that are memory-mapped as they are:

    train-00000.tokens      ids of its documents, one after another: uint16 while the vocabulary allows, else uint32
    train-00000.sentences   uint32 number of tokens of each sentence, at least 1
    train-00000.documents   uint32 number of sentences of each document, at least 1

`manifest.json`, written last, lists the shards of the splits "train" and "validation" in order with the size, sha256
and counts of every file, and the fingerprint of the tokenizer, a copy of which lies in `tokenizer/`.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from bisect import bisect_right
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from bert_ds.basics.input_gate import read_json
from bert_ds.basics.ranks import DataError
from bert_ds.corpus.tokenizer.text_tokenizer import SpecialIds
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer

MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
COUNT_DTYPE = np.dtype("<u4")

Split = Literal["train", "validation"]
Kind = Literal["tokens", "sentences", "documents"]
KINDS: tuple[Kind, ...] = ("tokens", "sentences", "documents")
SPLITS: tuple[Split, ...] = ("train", "validation")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileRecord(_Record):
    """Size and sha256 of one file."""

    bytes: int
    sha256: str


class ShardRecord(_Record):
    """One shard: `{name}.tokens`, `{name}.sentences`, `{name}.documents`."""

    name: str
    num_documents: int
    num_sentences: int
    num_tokens: int
    num_unknown: int = 0
    files: dict[Kind, FileRecord]


class SplitRecord(_Record):
    """The shards of one split, in order, and their sums."""

    num_documents: int
    num_sentences: int
    num_tokens: int
    num_unknown: int = 0
    shards: list[ShardRecord]


class Manifest(_Record):
    """Everything that must be known to trust and to read a shard folder."""

    format: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    tokenizer_fingerprint: str
    special_ids: dict[str, int]
    input: dict[str, Any]
    settings: dict[str, Any]
    splits: dict[Split, SplitRecord]


class ShardSplit:
    """One split of a shard folder, read-only and memory-mapped; cheap to send to another process.

    Token positions count from 0 over all shards of the split. Every array holds whole, validated counts.
    """

    def __init__(self, folder: str | os.PathLike[str], split: Split, manifest: Manifest) -> None:
        self.folder = Path(folder)
        self.split = split
        self.fingerprint = manifest.tokenizer_fingerprint
        self.vocab_size = manifest.vocab_size
        self.special_ids = SpecialIds(**manifest.special_ids)
        self.dtype = np.dtype("<u2" if manifest.dtype == "uint16" else "<u4")
        record = manifest.splits[split]
        self.num_documents = record.num_documents
        self.num_sentences = record.num_sentences
        self.num_tokens = record.num_tokens
        self._shards = record.shards
        self._manifest = manifest
        self._first_tokens = [0, *np.cumsum([shard.num_tokens for shard in record.shards]).tolist()]
        self._maps: list[np.ndarray | None] = [None] * len(record.shards)

    def sentence_lengths(self) -> np.ndarray:
        """Return the number of tokens of each sentence: uint32 [num_sentences]."""
        return self._counts("sentences")

    def sentence_starts(self) -> np.ndarray:
        """Return the token position where each sentence starts, and the end: int64 [num_sentences + 1]."""
        return _starts(self.sentence_lengths())

    def document_starts(self) -> np.ndarray:
        """Return the sentence index where each document starts, and the end: int64 [num_documents + 1]."""
        return _starts(self._counts("documents"))

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return the ids of token positions [start, stop); a read-only view unless they cross shard files."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.folder} {self.split}, which has {self.num_tokens}")
        if start == stop:
            return np.empty(0, dtype=self.dtype)
        index = bisect_right(self._first_tokens, start) - 1
        first = self._first_tokens[index]
        if stop <= self._first_tokens[index + 1]:
            return self._mapped(index)[start - first : stop - first]
        parts = []
        while start < stop:
            first, end = self._first_tokens[index], self._first_tokens[index + 1]
            parts.append(self._mapped(index)[start - first : min(stop, end) - first])
            start, index = end, index + 1
        return np.concatenate(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSplit, (self.folder, self.split, self._manifest)

    def _mapped(self, index: int) -> np.ndarray:
        mapped = self._maps[index]
        if mapped is None:
            mapped = _map_file(self.folder / f"{self._shards[index].name}.tokens", self.dtype)
            self._maps[index] = mapped
        return mapped

    def _counts(self, kind: str) -> np.ndarray:
        parts = [_map_file(self.folder / f"{shard.name}.{kind}", COUNT_DTYPE) for shard in self._shards]
        return np.concatenate(parts) if parts else np.empty(0, dtype=COUNT_DTYPE)


def open_shards(
    folder: str | os.PathLike[str], split: Split = "train", *, fingerprint: str | None = None
) -> ShardSplit:
    """Open one split of a finished shard folder.

    Args:
        folder: folder with manifest.json.
        split: "train" or "validation".
        fingerprint: fingerprint of the tokenizer that the ids must belong to; None asks for none.

    Raises:
        DataError: the folder is unfinished or damaged as far as sizes tell, or belongs to another tokenizer.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    manifest = verify_shards(folder, "sizes", fingerprint=fingerprint)
    return ShardSplit(folder, split, manifest)


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read and check manifest.json; DataError where it is missing or not what this version writes."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise DataError(f"{path} is missing: {folder} is no shard folder, or its build did not finish")
    try:
        content = read_json(path, error=DataError)
        if isinstance(content, dict) and content.get("format") != 1:
            raise DataError(f"{path} has format {repr(content.get('format'))[:60]}, wanted 1: build the shards again")
        manifest = Manifest.model_validate(content)
        SpecialIds(**manifest.special_ids)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: {where}: {first['msg']}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise error if isinstance(error, DataError) else DataError(f"{path} cannot be read: {error}") from None
    _check_sums(path, manifest)
    return manifest


def verify_shards(
    folder: str | os.PathLike[str],
    level: Literal["sizes", "sha256"] = "sizes",
    *,
    fingerprint: str | None = None,
) -> Manifest:
    """Check a shard folder against its manifest and return the manifest.

    Level "sizes" looks at names and sizes only. Level "sha256" reads everything: checksums, the sums of the counts,
    the largest id, and the tokenizer beside the shards.

    Raises:
        DataError: names the first file that is missing, truncated, altered or foreign.
    """
    if level not in ("sizes", "sha256"):
        raise ValueError(f"level {level!r} is not one of sizes, sha256")
    manifest = read_manifest(folder)
    if fingerprint is not None and fingerprint != manifest.tokenizer_fingerprint:
        raise DataError(
            f"{Path(folder) / MANIFEST}: the shards were built with the tokenizer {manifest.tokenizer_fingerprint}, "
            f"not with {fingerprint}"
        )
    for split in SPLITS:
        for shard in manifest.splits[split].shards:
            verify_shard(Path(folder), shard, manifest, level)
    if level == "sha256":
        found = load_tokenizer(Path(folder) / TOKENIZER_FOLDER).fingerprint
        if found != manifest.tokenizer_fingerprint:
            raise DataError(
                f"{Path(folder) / TOKENIZER_FOLDER} has the fingerprint {found}, the manifest says "
                f"{manifest.tokenizer_fingerprint}"
            )
    return manifest


def verify_shard(folder: Path, shard: ShardRecord, manifest: Manifest, level: str) -> None:
    """Check the three files of one shard; DataError names the one that is not as recorded."""
    for kind in KINDS:
        path = folder / f"{shard.name}.{kind}"
        wanted = shard.files[kind]
        if not path.is_file():
            raise DataError(f"{path} is missing")
        if path.stat().st_size != wanted.bytes:
            raise DataError(f"{path} has {path.stat().st_size} bytes, wanted {wanted.bytes}")
        if level == "sha256" and file_sha256(path) != wanted.sha256:
            raise DataError(f"{path} is damaged: its sha256 is not the recorded one")
    if level == "sha256":
        _check_content(folder, shard, manifest)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_content(folder: Path, shard: ShardRecord, manifest: Manifest) -> None:
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    tokens = _map_file(folder / f"{shard.name}.tokens", dtype)
    sentences = _map_file(folder / f"{shard.name}.sentences", COUNT_DTYPE)
    documents = _map_file(folder / f"{shard.name}.documents", COUNT_DTYPE)
    largest = int(tokens.max())
    if largest >= manifest.vocab_size:
        raise DataError(f"{folder / shard.name}.tokens holds the id {largest}, the vocabulary {manifest.vocab_size}")
    for kind, counts, total in (("sentences", sentences, len(tokens)), ("documents", documents, len(sentences))):
        if int(counts.sum(dtype=np.int64)) != total or int(counts.min()) < 1:
            raise DataError(f"{folder / shard.name}.{kind} does not add up to the {total} it counts")


def _check_sums(path: Path, manifest: Manifest) -> None:
    itemsize = np.dtype(manifest.dtype).itemsize
    for split in SPLITS:
        record = manifest.splits.get(split)
        if record is None:
            raise DataError(f"{path} lacks the split {split}")
        for kind in KINDS:
            total = sum(getattr(shard, f"num_{kind}") for shard in record.shards)
            if total != getattr(record, f"num_{kind}"):
                raise DataError(f"{path}: {split}: num_{kind} {getattr(record, f'num_{kind}')} is not the sum {total}")
            size = itemsize if kind == "tokens" else COUNT_DTYPE.itemsize
            for shard in record.shards:
                if set(shard.files) != set(KINDS) or shard.files[kind].bytes != size * getattr(shard, f"num_{kind}"):
                    raise DataError(f"{path}: {shard.name}: the size of its .{kind} file is not {size} per entry")
                if Path(shard.name).name != shard.name:
                    raise DataError(f"{path}: {shard.name!r} is not a plain file name")


def _map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    try:
        with path.open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=dtype)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be mapped: {error}") from None


def _starts(counts: np.ndarray) -> np.ndarray:
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts
