"""Batches of documents to ids, on one core or on many, always in document order."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from bert_ds.basics.ranks import DataError
from bert_ds.corpus.shards.segments import EncodedBatch, EncodedPart
from bert_ds.corpus.shards.shard_folder import COUNT_DTYPE, SPLITS, Split
from bert_ds.corpus.text.sentences import split_sentences
from bert_ds.corpus.text.text_input import Position
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer


class Batch(NamedTuple):
    """Consecutive documents, and where reading stands behind them."""

    position: Position
    num_bytes: int
    texts: list[str]


class Encoder:
    """Turns documents into ids and deals them to the two splits; carries no state that changes its results."""

    def __init__(self, tokenizer: TextTokenizer, validation_fraction: float) -> None:
        self._tokenizer = tokenizer
        self._validation_fraction = validation_fraction

    def __call__(self, texts: list[str]) -> EncodedBatch:
        """Encode documents; sentences and documents without tokens vanish."""
        parts = {split: _PartBuilder(self._tokenizer) for split in SPLITS}
        for text in texts:
            parts[split_of(text, self._validation_fraction)].add(text)
        return {split: part.finish() for split, part in parts.items() if part.documents}


def split_of(text: str, validation_fraction: float) -> Split:
    """Return the split of a document: a pure function of its words, so that duplicates are never divided."""
    digest = hashlib.blake2b(" ".join(text.split()).encode("utf-8"), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "big") < int(validation_fraction * 2.0**64) else "train"


def encode_in_order(
    batches: Iterator[Batch], encoder: Encoder, *, workers: int
) -> Generator[tuple[Batch, EncodedBatch]]:
    """Yield every batch with its ids, in order; at most two batches per worker are under way.

    With one worker everything happens in this process. The yielded batches carry no texts any more.
    """
    if workers == 1:
        for batch in batches:
            yield batch._replace(texts=[]), encoder(batch.texts)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (encoder,))
    waiting: deque[tuple[Batch, Future[EncodedBatch]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch._replace(texts=[]), pool.submit(_encode_in_worker, batch.texts)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, perhaps for want of memory: use fewer workers; "
            "started again, the build continues where it stopped"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


class _PartBuilder:
    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.documents: list[int] = []
        self._tokenizer = tokenizer
        self._tokens: list[bytes] = []
        self._sentences: list[int] = []

    def add(self, text: str) -> None:
        encoded = [ids for ids in self._tokenizer.encode_document(split_sentences(text)) if ids]
        if encoded:
            itemsize = self._tokenizer.dtype.itemsize
            self._tokens += encoded
            self._sentences += [len(ids) // itemsize for ids in encoded]
            self.documents.append(len(encoded))

    def finish(self) -> EncodedPart:
        tokens = b"".join(self._tokens)
        ids = np.frombuffer(tokens, dtype=self._tokenizer.dtype)
        return EncodedPart(
            tokens=tokens,
            sentences=np.array(self._sentences, dtype=COUNT_DTYPE).tobytes(),
            documents=np.array(self.documents, dtype=COUNT_DTYPE).tobytes(),
            num_unknown=int(np.count_nonzero(ids == self._tokenizer.special_ids.unk)),
        )


_worker_encoder: Encoder | None = None


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    # The main process decides when to stop; a worker that outlives a killed main process would wait for ever.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(texts: list[str]) -> EncodedBatch:
    assert _worker_encoder is not None
    return _worker_encoder(texts)
