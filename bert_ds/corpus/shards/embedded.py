"""The embedded default: tokenizer and shards from the docstrings that every machine already has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import EmbeddedCorpus
from bert_ds.corpus.shards.build import BuildSettings, build_shards
from bert_ds.corpus.shards.shard_folder import MANIFEST
from bert_ds.corpus.text.docstrings import docstring_documents
from bert_ds.corpus.text.documents import Document
from bert_ds.corpus.text.text_input import DocumentInput
from bert_ds.corpus.tokenizer.subword_training import train_subwords
from bert_ds.corpus.tokenizer.wordpiece_training import train_wordpiece

MIN_CHARACTERS = 500_000
"""Less text than this means that the installed packages carry no docstrings (`python -OO`, stripped images)."""


class CorpusFolders(NamedTuple):
    """Where a corpus lies."""

    tokenizer: Path
    shards: Path


def embedded_folders(config: EmbeddedCorpus, parent: Path) -> CorpusFolders:
    """Return where the embedded corpus of these settings lies below `parent`, whether it is built or not."""
    settings = config.model_dump(mode="json")
    if config.tokenizer_kind == "wordpiece":
        del settings["tokenizer_kind"]  # before the other kinds there was no such key
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = parent / f"embedded-{key}"
    return CorpusFolders(folder / "tokenizer", folder / "shards")


def build_embedded(config: EmbeddedCorpus, parent: Path, *, say: Callable[[str], None]) -> CorpusFolders:
    """Build the embedded corpus below `parent`, or find it built; one process does this while others wait.

    Args:
        config: of the recipe.
        parent: folder that holds the corpora of these and other settings.
        say: shown a line when a stage begins.

    Raises:
        DataError: too few docstrings are installed.
        ConfigError: the vocabulary is too large or too small for the text.
    """
    folders = embedded_folders(config, parent)
    if (folders.shards / MANIFEST).exists():
        return folders
    say("reading the docstrings of the installed packages")
    documents = list(docstring_documents(config.max_bytes))
    size = sum(len(document.text) for document in documents)
    if size < MIN_CHARACTERS:
        raise DataError(
            f"the docstrings of the installed packages hold {size:,} characters, at least {MIN_CHARACTERS:,} are "
            "needed: give a recipe with a corpus of your own (--run)"
        )
    say(f"training {config.vocab_size:,} word pieces on {len(documents):,} modules, {size:,} characters")
    if not folders.tokenizer.exists():
        texts, size = [document.text for document in documents], config.vocab_size
        if config.tokenizer_kind == "wordpiece":
            train_wordpiece(texts, vocab_size=size, lowercase=config.lowercase, output=folders.tokenizer)
        else:
            train_subwords(texts, kind=config.tokenizer_kind, vocab_size=size, output=folders.tokenizer)
    say("building shards")

    def read_all() -> Iterator[Document]:
        return iter(documents)

    text_input = DocumentInput(read_all, description={"embedded": "docstrings", "sha256": _sha256(documents)})
    settings = BuildSettings(validation_fraction=config.validation_fraction)
    build_shards(text_input, folders.tokenizer, folders.shards, settings=settings)
    return folders


def _sha256(documents: list[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.text.encode() + b"\0")
    return digest.hexdigest()
