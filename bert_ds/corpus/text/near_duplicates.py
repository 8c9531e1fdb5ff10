"""Which documents have been seen before, exactly or nearly: an index on disk, of which little is in memory.

Nearly is a Jaccard similarity of runs of five words. Each document has a MinHash signature (Broder 1997) of 128
numbers, by rensa; bands of them are looked up (Leskovec et al., Mining of Massive Datasets, 3.4), and the signatures of
what has a band in common are compared. So similarities are estimates, with a deviation of about 0.04, and a pair that
is 0.8 similar is missed once in twenty times. SQLite keeps the index; Chinese characters are words each.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bert_ds.basics.ranks import DataError

NUM_HASHES = 128
SHINGLE_WORDS = 5
_SEED = 1
_CACHE_KIB = 64 * 1024
_WORD = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")
_TABLES = """
create table if not exists exact (hash blob primary key, source text) without rowid;
create table if not exists near (number integer primary key, signature blob, source text);
create table if not exists bands (hash blob, number integer, primary key (hash, number)) without rowid;
create table if not exists state (name text primary key, value text) without rowid;
"""


class Seen(NamedTuple):
    """A document that a new one repeats."""

    source: str
    similarity: float
    """Estimated; 1.0 where the words are the same."""
    is_exact: bool


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, each Chinese character one; marks and white space are left out."""
    return _WORD.findall(text.lower())


def shingles_of(words: Sequence[str], length: int = SHINGLE_WORDS) -> list[str]:
    """Return all runs of so many words; the whole text where it is shorter."""
    return [" ".join(words[at : at + length]) for at in range(max(1, len(words) - length + 1))]


class DuplicateIndex:
    """What has been kept so far. Nothing lasts before `commit`.

    Args:
        path: file of the database.
        threshold: similarity from which on a document is nearly another; 1.0 looks for equal words alone.

    Raises:
        DataError: rensa is missing, or another process holds the index.
    """

    def __init__(self, path: Path, threshold: float) -> None:
        self._threshold = threshold
        # Bands of four or eight numbers: half of all pairs 0.42 or 0.71 similar share one of 32 or 16.
        self._rows = 8 if threshold >= 0.75 else 4
        if threshold < 1.0:
            try:
                import rensa  # noqa: F401  (looked for before any work)
            except ImportError:
                raise DataError("near duplicates need the package rensa: pip install rensa") from None
        self._database = sqlite3.connect(path, isolation_level=None, timeout=1.0)
        try:
            for pragma in ("locking_mode=exclusive", "journal_mode=wal", f"cache_size=-{_CACHE_KIB}"):
                self._database.execute(f"pragma {pragma}")
            self._database.executescript(_TABLES)
            self._database.execute("begin exclusive")
        except sqlite3.OperationalError as error:
            raise DataError(f"{path} cannot be used: {error}; is another process at it?") from None

    def find_or_add(self, source: str, words: Sequence[str]) -> Seen | None:
        """Return what a document repeats, or keep it for those to come and return None.

        Args:
            source: where the document is, for the list.
            words: of the document, see `words_of`.
        """
        digest = hashlib.blake2b(" ".join(words).encode("utf-8"), digest_size=16).digest()
        known = self._database.execute("select source from exact where hash = ?", (digest,)).fetchone()
        if known is not None:
            return Seen(known[0], 1.0, is_exact=True)
        if self._threshold < 1.0:
            signature = _signature(shingles_of(words))
            bands = self._bands(signature)
            if (seen := self._nearest(signature, bands)) is not None:
                return seen
            self._add(source, signature, bands)
        self._database.execute("insert into exact values (?, ?)", (digest, source))
        return None

    def read_state(self, name: str) -> str | None:
        """Return what was last committed under a name."""
        found = self._database.execute("select value from state where name = ?", (name,)).fetchone()
        return None if found is None else str(found[0])

    def commit(self, state: dict[str, str]) -> None:
        """Make everything last, with the caller's own state, all or nothing."""
        self._database.executemany("replace into state values (?, ?)", state.items())
        self._database.execute("commit")
        self._database.execute("begin exclusive")

    def close(self) -> None:
        """Forget what was not committed."""
        self._database.close()

    def _bands(self, signature: np.ndarray) -> list[bytes]:
        rows = signature.reshape(-1, self._rows)
        return [hashlib.blake2b(bytes([band]) + row.tobytes(), digest_size=8).digest() for band, row in enumerate(rows)]

    def _nearest(self, signature: np.ndarray, bands: Sequence[bytes]) -> Seen | None:
        places = ",".join("?" * len(bands))
        found = self._database.execute(
            f"select signature, source from near where number in (select number from bands where hash in ({places}))"
            " order by number",
            bands,
        )
        best: Seen | None = None
        for other, source in found:
            similarity = float(np.mean(np.frombuffer(other, dtype=np.uint32) == signature))
            if similarity >= max(self._threshold, best.similarity + 1e-9 if best else 0.0):
                best = Seen(source, similarity, is_exact=False)
        return best

    def _add(self, source: str, signature: np.ndarray, bands: Sequence[bytes]) -> None:
        values = (signature.tobytes(), source)
        number = self._database.execute("insert into near (signature, source) values (?, ?)", values).lastrowid
        self._database.executemany("insert or ignore into bands values (?, ?)", [(band, number) for band in bands])


def _signature(shingles: Sequence[str]) -> np.ndarray:
    """Return uint32 [NUM_HASHES]."""
    from rensa import RMinHash

    sketch = RMinHash(NUM_HASHES, _SEED)
    sketch.update(shingles)
    return np.array(sketch.digest(), dtype=np.uint32)
