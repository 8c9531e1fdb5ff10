"""Pairs of texts that belong together, out of raw text: what stands next to each other, or a title and its text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from bert_ds.corpus.text.documents import Document, read_documents
from bert_ds.corpus.text.sentences import split_sentences

LEAST_CHARACTERS = 20
"""Of a neighbour: shorter lines are headings and marks."""


def mined_rows(path: Path, pairs: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield where each pair stands, and the pair as the columns text and text_pair.

    Args:
        path: a file or folder of text, as shards are built from.
        pairs: "paragraphs" (lines of a document) or "sentences": each with the next one; "titles": each with its text.

    Raises:
        DataError: the text cannot be read.
    """
    for document in read_documents([path]):
        for number, (text, partner) in enumerate(_pairs(document, pairs), start=1):
            yield f"{document.source}, pair {number}", {"text": text, "text_pair": partner}


def _pairs(document: Document, pairs: str) -> Iterator[tuple[str, str]]:
    if pairs == "titles":
        return iter([(document.title, document.text)] if document.title else [])
    units = split_sentences(document.text) if pairs == "sentences" else map(str.strip, document.text.splitlines())
    return pairwise(unit for unit in units if len(unit) >= LEAST_CHARACTERS)
