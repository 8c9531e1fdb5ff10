"""Documents and a tokenizer to a folder of token shards.

The result is a pure function of the input, the tokenizer and the settings: not of the number of workers, nor of how
often the build was killed and started again. Memory use depends on none of them but the number of workers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import NamedTuple

from bert_ds.basics.ranks import DataError
from bert_ds.basics.whole_files import sync
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.corpus.shards.build_folder import (
    claim_build_folder,
    enter,
    nothing_left_of_nothing,
    only_builder,
    refuse_foreign_files,
    refuse_other_build,
)
from bert_ds.corpus.shards.encode_documents import Batch, Encoder, encode_in_order
from bert_ds.corpus.shards.segments import (
    EncodedBatch,
    SegmentRecord,
    SegmentWriter,
    finished_segments,
    remove_our_files,
    write_durably,
)
from bert_ds.corpus.shards.shard_folder import (
    MANIFEST,
    SPLITS,
    TOKENIZER_FOLDER,
    Manifest,
    Split,
    SplitRecord,
    read_manifest,
    verify_shards,
)
from bert_ds.corpus.text.text_input import Position, TextInput
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer

BUILD_RULES = 1
"""Raised whenever the same text would give other shards, so that no build is continued under other rules."""

MIN_DOCUMENTS = 2
"""Per split: the random next sentence comes from another document."""

MIN_TRAIN_TOKENS = 128
MAX_UNKNOWN_FRACTION = 0.5

_BATCH_CHARACTERS = 1 << 19
_BATCH_DOCUMENTS = 1 << 12

Report = Callable[[int, str], None]


class BuildSettings(NamedTuple):
    """What decides the result besides input and tokenizer."""

    validation_fraction: float = 0.01
    tokens_per_shard: int = 1 << 26


DEFAULT_SETTINGS = BuildSettings()


def build_shards(
    text_input: TextInput,
    tokenizer_folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    settings: BuildSettings = DEFAULT_SETTINGS,
    workers: int = 1,
    report: Report | None = None,
) -> Manifest:
    """Build a shard folder, continue an interrupted build, or find that it is built already.

    Args:
        text_input: the documents; `FileInput` or `DocumentInput`.
        tokenizer_folder: tokenizer whose ids are stored.
        output: folder that is new, empty, or of a build with the same input, tokenizer and settings.
        settings: validation_fraction in [0, 0.5) and tokens_per_shard.
        workers: processes that encode; 1 encodes in this process.
        report: called after each batch with the input bytes done and a text.

    Raises:
        ConfigError: a setting is out of range, or the folder belongs to another build.
        DataError: the input is unreadable or too small, or the folder is damaged or cannot be written.
    """
    _check_settings(settings, workers)
    folder = Path(output)
    if not (folder / MANIFEST).is_file():  # a finished build may lie where nobody can write any more
        claim_build_folder(folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    intended = _empty_manifest(text_input, tokenizer, settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with only_builder(folder):
            if (folder / MANIFEST).is_file():
                return _reuse(folder, intended)
            enter(folder, intended)
            with nothing_left_of_nothing(folder):
                records = finished_segments(folder, intended)
                batches = _batches(text_input, records[-1].position if records else Position(0, 0))
                results = encode_in_order(batches, Encoder(tokenizer, settings.validation_fraction), workers=workers)
                records += _write_segments(folder, len(records), results, settings, tokenizer, report)
                return _finish(folder, intended, records, tokenizer)
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be written: {error.strerror or error}") from None


def _check_settings(settings: BuildSettings, workers: int) -> None:
    if not 0.0 <= settings.validation_fraction < 0.5:
        raise ConfigError(f"validation_fraction is {settings.validation_fraction}, wanted 0 or more and less than 0.5")
    if settings.tokens_per_shard < 1:
        raise ConfigError(f"tokens_per_shard is {settings.tokens_per_shard}, wanted 1 or more")
    if workers < 1:
        raise ConfigError(f"workers is {workers}, wanted 1 or more")


def _empty_manifest(text_input: TextInput, tokenizer: TextTokenizer, settings: BuildSettings) -> Manifest:
    nothing = SplitRecord(num_documents=0, num_sentences=0, num_tokens=0, shards=[])
    return Manifest(
        dtype="uint16" if tokenizer.dtype.itemsize == 2 else "uint32",
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        special_ids=tokenizer.special_ids._asdict(),
        input=json.loads(json.dumps(text_input.description)),
        settings={"build_rules": BUILD_RULES, **settings._asdict()},
        splits={split: nothing for split in SPLITS},
    )


def _reuse(folder: Path, intended: Manifest) -> Manifest:
    refuse_other_build(folder, intended, read_manifest(folder).model_dump())
    manifest = verify_shards(folder, "sizes")
    kept = {f"{shard.name}.{kind}" for s in manifest.splits.values() for shard in s.shards for kind in shard.files}
    refuse_foreign_files(folder, finished=kept)
    remove_our_files(folder, except_for=kept | {MANIFEST})
    return manifest


def _batches(text_input: TextInput, start: Position) -> Iterator[Batch]:
    """Group documents; depends on nothing but the documents behind `start`."""
    texts: list[str] = []
    size = 0
    position, num_bytes = start, 0
    for position, num_bytes, document in text_input.read(start):
        texts.append(document.text)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS or len(texts) >= _BATCH_DOCUMENTS:
            yield Batch(position, num_bytes, texts)
            texts, size = [], 0
    if texts:
        yield Batch(position, num_bytes, texts)


def _write_segments(
    folder: Path,
    index: int,
    results: Generator[tuple[Batch, EncodedBatch]],
    settings: BuildSettings,
    tokenizer: TextTokenizer,
    report: Report | None,
) -> list[SegmentRecord]:
    records: list[SegmentRecord] = []
    writer = SegmentWriter(folder, index, tokenizer.dtype)
    position: Position | None = None
    num_tokens = 0
    try:
        for batch, encoded in results:
            writer.add(encoded)
            position = batch.position
            if report is not None:
                report(batch.num_bytes, f"{num_tokens + writer.num_tokens:,} tokens")
            if writer.num_tokens >= settings.tokens_per_shard:
                num_tokens += writer.num_tokens
                records.append(writer.finish(position))
                writer, position = SegmentWriter(folder, index + len(records), tokenizer.dtype), None
        if position is not None:
            records.append(writer.finish(position))
    finally:
        writer.abandon()
        results.close()
    return records


def _finish(folder: Path, intended: Manifest, records: list[SegmentRecord], tokenizer: TextTokenizer) -> Manifest:
    splits = {split: _sum_of(records, split) for split in SPLITS}
    manifest = intended.model_copy(update={"splits": splits})
    try:
        _refuse_too_little(manifest)
    except DataError:
        remove_our_files(folder, except_for=set())
        raise
    tokenizer.save(folder / TOKENIZER_FOLDER)
    for path in (folder / TOKENIZER_FOLDER).iterdir():
        sync(path)
    sync(folder / TOKENIZER_FOLDER)
    write_durably(folder / MANIFEST, manifest.model_dump())
    return _reuse(folder, intended)


def _sum_of(records: list[SegmentRecord], split: Split) -> SplitRecord:
    shards = [record.shards[split] for record in records if split in record.shards]
    return SplitRecord(
        num_documents=sum(shard.num_documents for shard in shards),
        num_sentences=sum(shard.num_sentences for shard in shards),
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_unknown=sum(shard.num_unknown for shard in shards),
        shards=shards,
    )


def _refuse_too_little(manifest: Manifest) -> None:
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    found = f"found {train.num_documents} training documents with {train.num_tokens} tokens"
    if train.num_documents < MIN_DOCUMENTS or train.num_tokens < MIN_TRAIN_TOKENS:
        raise DataError(
            f"too little text: {found}, at least {MIN_DOCUMENTS} documents with {MIN_TRAIN_TOKENS} tokens are needed"
        )
    fraction = manifest.settings["validation_fraction"]
    if fraction > 0 and validation.num_documents < MIN_DOCUMENTS:
        raise DataError(
            f"too few documents for a validation split: {found}, and validation_fraction {fraction} left "
            f"{validation.num_documents} for validation where {MIN_DOCUMENTS} are needed"
        )
    unknown, total = (getattr(train, name) + getattr(validation, name) for name in ("num_unknown", "num_tokens"))
    if unknown > MAX_UNKNOWN_FRACTION * total:
        raise DataError(f"{unknown} of {total} tokens are [UNK]: the tokenizer was not made for this text")
