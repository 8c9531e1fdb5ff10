"""Writing shards so that a build can be killed at any moment.

A segment is a run of consecutive input documents; it becomes at most one shard of each split. Its files are written
under temporary names, synced and renamed; then a record with their checksums and the input position behind the last
document is written in the same way. What has a record is finished, what has none is removed on the next start.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from bert_ds.basics.input_gate import read_bytes
from bert_ds.basics.ranks import DataError
from bert_ds.basics.whole_files import sync, write_text
from bert_ds.corpus.shards.shard_folder import (
    COUNT_DTYPE,
    KINDS,
    SPLITS,
    FileRecord,
    Manifest,
    ShardRecord,
    Split,
    verify_shard,
)
from bert_ds.corpus.text.text_input import Position

_PARTIAL = ".partial"
_OUR_FILES = re.compile(
    r"((train|validation)-(?P<shard>\d{5,})\.(tokens|sentences|documents)|segment-(?P<record>\d{5,})\.json"
    r"|building\.json|manifest\.json)(\.partial)?"
)


class EncodedPart(NamedTuple):
    """Documents of one split as raw bytes of the three shard files."""

    tokens: bytes
    sentences: bytes
    documents: bytes
    num_unknown: int


EncodedBatch = dict[Split, EncodedPart]
"""What became of a batch of documents."""


class SegmentRecord(BaseModel):
    """A finished segment."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    file_index: int
    num_documents: int
    shards: dict[Split, ShardRecord]

    @property
    def position(self) -> Position:
        """Input position behind the segment."""
        return Position(self.file_index, self.num_documents)


class SegmentWriter:
    """Writes one segment; nothing of it counts before `finish`."""

    def __init__(self, folder: Path, index: int, token_dtype: np.dtype) -> None:
        self.num_tokens = 0
        self._folder = folder
        self._index = index
        self._token_dtype = token_dtype
        self._shards: dict[Split, _OpenShard] = {}

    def add(self, batch: EncodedBatch) -> None:
        """Append documents."""
        for split, part in batch.items():
            if split not in self._shards:
                self._shards[split] = _OpenShard(self._folder, f"{split}-{self._index:05d}", self._token_dtype)
            self._shards[split].add(part)
            self.num_tokens += len(part.tokens) // self._token_dtype.itemsize

    def finish(self, position: Position) -> SegmentRecord:
        """Make the segment durable and return its record; `position` is where reading goes on."""
        shards = {split: self._shards[split].finish() for split in SPLITS if split in self._shards}
        sync(self._folder)
        record = SegmentRecord(file_index=position.file_index, num_documents=position.num_documents, shards=shards)
        write_durably(_record_path(self._folder, self._index), record.model_dump())
        return record

    def abandon(self) -> None:
        """Close the files of an unfinished segment; their content does not count."""
        for shard in self._shards.values():
            shard.close()


def finished_segments(folder: Path, manifest: Manifest) -> list[SegmentRecord]:
    """Return the records of the finished segments, verified in full, and remove every other shard file.

    `manifest` gives the vocabulary and the dtype. A damaged segment and all behind it are built again.
    """
    records: list[SegmentRecord] = []
    while (path := _record_path(folder, len(records))).is_file():
        try:
            record = SegmentRecord.model_validate_json(read_bytes(path))
            for shard in record.shards.values():
                verify_shard(folder, shard, manifest, "sha256")
        except (DataError, ValueError):
            break
        records.append(record)
    kept = {f"{shard.name}.{kind}" for record in records for shard in record.shards.values() for kind in KINDS}
    kept |= {_record_path(folder, index).name for index in range(len(records))}
    kept.add("building.json")
    remove_our_files(folder, except_for=kept)
    return records


def remove_our_files(folder: Path, *, except_for: set[str]) -> None:
    """Remove what a build writes into its folder, tokenizer aside; see `foreign_file` for what has a name of ours.

    Records go last: until then they say that the shards are ours, should this be killed.
    """
    for path in sorted(folder.iterdir(), key=lambda path: path.name.startswith("segment-")):
        if _OUR_FILES.fullmatch(path.name) and path.name not in except_for:
            path.unlink()


def foreign_file(folder: Path, *, finished: set[str] | None = None) -> str | None:
    """Return the first file with a name of ours that no build of this folder can have written, None where all may be.

    A build is at work on one segment, the one behind those that have a record, which may be damaged; once it is
    finished there are no other shard files than the manifest lists.

    Args:
        folder: of a build that was begun.
        finished: the shard files that the manifest lists, None while there is no manifest.
    """
    names = {name: match for name in sorted(os.listdir(folder)) if (match := _OUR_FILES.fullmatch(name))}
    records = {name: int(match["record"]) for name, match in names.items() if _is_record(folder / name)}
    at_work = 1 + max(records.values(), default=-1)
    for name, match in names.items():
        number = match["shard"] or match["record"]
        if number is None or name in records:
            continue
        if int(number) > at_work if finished is None else name not in finished:
            return name
    return None


def _is_record(path: Path) -> bool:
    if path.suffix != ".json" or not path.name.startswith("segment-"):
        return False
    try:
        SegmentRecord.model_validate_json(read_bytes(path))
    except (OSError, ValueError):
        return False
    return True


def has_finished_segments(folder: Path) -> bool:
    """Whether a build has left anything in a folder that is worth keeping."""
    return _record_path(folder, 0).is_file()


def write_durably(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that the file is either absent, old, or whole, even after a power cut."""
    text = json.dumps(content, indent=1) + "\n"
    write_text(path, text, temporary=path.with_name(path.name + _PARTIAL))
    sync(path.parent)


class _OpenShard:
    def __init__(self, folder: Path, name: str, token_dtype: np.dtype) -> None:
        self._folder = folder
        self._name = name
        self._itemsizes = (token_dtype.itemsize, COUNT_DTYPE.itemsize, COUNT_DTYPE.itemsize)
        self._files = [(folder / f"{name}.{kind}{_PARTIAL}").open("wb") for kind in KINDS]
        self._hashes = [hashlib.sha256() for _ in KINDS]
        self._sizes = [0, 0, 0]
        self._num_unknown = 0

    def add(self, part: EncodedPart) -> None:
        for index, content in enumerate((part.tokens, part.sentences, part.documents)):
            self._files[index].write(content)
            self._hashes[index].update(content)
            self._sizes[index] += len(content)
        self._num_unknown += part.num_unknown

    def finish(self) -> ShardRecord:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        self.close()
        for kind in KINDS:
            path = self._folder / f"{self._name}.{kind}"
            os.replace(path.with_name(path.name + _PARTIAL), path)
        counts = [size // itemsize for size, itemsize in zip(self._sizes, self._itemsizes, strict=True)]
        return ShardRecord(
            name=self._name,
            num_documents=counts[2],
            num_sentences=counts[1],
            num_tokens=counts[0],
            num_unknown=self._num_unknown,
            files={
                kind: FileRecord(bytes=size, sha256=digest.hexdigest())
                for kind, size, digest in zip(KINDS, self._sizes, self._hashes, strict=True)
            },
        )

    def close(self) -> None:
        for file in self._files:
            file.close()


def _record_path(folder: Path, index: int) -> Path:
    return folder / f"segment-{index:05d}.json"
