"""Text without what it repeats and without what a model is measured on: documents in, JSON lines and a list out.

The folder holds `text-00000.jsonl` and so on, `removed.tsv` (document, reason, of what, similarity) and, when all is
done, `CLEANED` with the counts. A killed cleaning goes on where it last committed: files are cut to what the index
knows, so that the result is the same bytes. Memory depends on the longest document and the rows of the tasks alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from bert_ds.basics.ranks import DataError
from bert_ds.basics.whole_files import write_json
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.reading.config_problems import printable
from bert_ds.corpus.text.near_duplicates import DuplicateIndex, shingles_of, words_of
from bert_ds.corpus.text.text_input import Position, TextInput
from bert_ds.folders.output_folders import claim

DONE = "CLEANED"
REMOVED = "removed.tsv"
_INDEX = ".index.sqlite"
_OURS = re.compile(rf"text-\d{{5}}\.jsonl|{DONE}|{re.escape(REMOVED)}|{re.escape(_INDEX)}(-wal|-shm|-journal)?")
_WANTED = "wanted a new or an empty folder, or that of an earlier cleaning"
_RULES = 1
"""Raised whenever the same text would give another result."""
_DOCUMENTS_AT_ONCE = 500
_FILE_BYTES = 1 << 30

Report = Callable[[int, str], None]


class CleaningSettings(NamedTuple):
    """What decides the result besides the text and the rows of tasks."""

    near: float = 0.8
    """Similarity from which on a document is nearly another; 1.0: equal words alone."""
    overlap_words: int = 8
    """A document that has so many words in a row in common with a row of a task is removed."""


class Counts(NamedTuple):
    """What became of the documents."""

    kept: int = 0
    exact: int = 0
    near: int = 0
    overlap: int = 0
    kept_bytes: int = 0
    """Of UTF-8."""


def row_shingles(texts: Iterable[str], length: int) -> tuple[set[str], int]:
    """Return all runs of so many words in the rows of tasks, and how many texts are too short to have one."""
    found: set[str] = set()
    num_short = 0
    for text in texts:
        words = words_of(text)
        if len(words) < length:
            num_short += 1
        else:
            found.update(shingles_of(words, length))
    return found, num_short


def clean(
    text_input: TextInput,
    output: Path,
    *,
    settings: CleaningSettings,
    against: Collection[str] = (),
    report: Report | None = None,
) -> Counts:
    """Clean a text, continue a cleaning that was interrupted, or find that it is done already.

    Args:
        text_input: the documents.
        output: folder that is new, empty, or of a cleaning with the same input and settings.
        settings: thresholds.
        against: what a document may not hold, see `row_shingles`.
        report: called now and then with the input bytes done and a text.

    Raises:
        ConfigError: a setting is out of range, or the folder is another's.
        DataError: the input is unreadable, nothing is left of it, or the folder cannot be written.
    """
    if not 0.3 <= settings.near <= 1.0 or not 3 <= settings.overlap_words <= 100:
        raise ConfigError(f"found {settings}: wanted near from 0.3 to 1.0 and overlap_words from 3 to 100")
    claim(output, _foreign, wanted=_WANTED)
    intended = {"rules": _RULES, **settings._asdict(), "input": text_input.description, "rows": _fingerprint(against)}
    if (output / DONE).is_file():
        return _finished(output, intended)
    try:
        output.mkdir(parents=True, exist_ok=True)
        index = DuplicateIndex(output / _INDEX, settings.near)
        try:
            counts = _Cleaning(output, index, intended).run(text_input, settings, frozenset(against), report)
        finally:
            index.close()
        if not counts.kept:
            _remove(output, every=True)
            raise DataError(
                f"no document is left: {counts.exact} were equal to another, {counts.near} nearly, {counts.overlap} "
                "had words of a task in them"
            )
        write_json(output / DONE, {"counts": counts._asdict(), "made_from": intended})
        _remove(output)
    except OSError as error:
        raise DataError(f"{error.filename or output} cannot be written: {error.strerror or error}") from None
    return counts


class _Cleaning:
    """Files that grow together with the index: what lies beyond the last commit is cut off when it is taken up."""

    def __init__(self, output: Path, index: DuplicateIndex, intended: dict[str, Any]) -> None:
        self._output, self._index = output, index
        state = json.loads(index.read_state("state") or "null") or {"intended": intended, "removed": 0, "files": [0]}
        if state["intended"] != json.loads(json.dumps(intended)):
            raise ConfigError(f"{output} was begun with other text or settings: choose another folder")
        self._state = state
        self.counts = Counts(**state.get("counts", {}))
        self._position = Position(*state.get("position", (0, 0)))

    def run(
        self, text_input: TextInput, settings: CleaningSettings, against: frozenset[str], report: Report | None
    ) -> Counts:
        """Read all documents from the last commit on."""
        for number, size in enumerate(self._state["files"]):
            _append(self._output / f"text-{number:05d}.jsonl", size, [])
        kept: list[str] = []
        removed: list[str] = []
        for position, num_bytes, document in text_input.read(self._position):
            words = words_of(document.text)
            verdict = self._verdict(document.source, words, settings, against)
            if verdict is None:
                kept.append(json.dumps({"text": document.text}, ensure_ascii=False) + "\n")
                size = self.counts.kept_bytes + len(document.text.encode("utf-8"))
                self.counts = self.counts._replace(kept=self.counts.kept + 1, kept_bytes=size)
            else:
                removed.append("\t".join((printable(document.source), *verdict)) + "\n")
                self.counts = self.counts._replace(**{verdict[0]: getattr(self.counts, verdict[0]) + 1})
            self._position = position
            if len(kept) + len(removed) >= _DOCUMENTS_AT_ONCE or sum(map(len, kept)) > 1 << 24:
                self._commit(kept, removed)
                if report is not None:
                    report(num_bytes, f"{self.counts.kept:,} kept, {sum(self.counts[1:4]):,} removed")
        self._commit(kept, removed)
        return self.counts

    def _verdict(
        self, source: str, words: list[str], settings: CleaningSettings, against: frozenset[str]
    ) -> tuple[str, str, str] | None:
        """Return reason, what it is the reason for, and similarity; None for a document that stays."""
        if against and (common := against.intersection(shingles_of(words, settings.overlap_words))):
            return "overlap", min(common), ""
        seen = self._index.find_or_add(source, words)
        if seen is None:
            return None
        return "exact" if seen.is_exact else "near", printable(seen.source), f"{seen.similarity:.2f}"

    def _commit(self, kept: list[str], removed: list[str]) -> None:
        files = self._state["files"]
        files[-1] = _append(self._output / f"text-{len(files) - 1:05d}.jsonl", files[-1], kept)
        self._state["removed"] = _append(self._output / REMOVED, self._state["removed"], removed)
        if files[-1] > _FILE_BYTES:
            files.append(0)
        self._state |= {"counts": self.counts._asdict(), "position": list(self._position)}
        self._index.commit({"state": json.dumps(self._state)})
        kept.clear()
        removed.clear()


def _append(path: Path, size: int, lines: list[str]) -> int:
    """Cut a file to a size, add lines, force them to the disk, and return the new size."""
    added = "".join(lines).encode("utf-8")
    with path.open("ab") as file:
        file.truncate(size)
        file.write(added)
        file.flush()
        os.fsync(file.fileno())
    return size + len(added)


def _remove(output: Path, *, every: bool = False) -> None:
    """Remove the index, and all else that a cleaning has written."""
    for name in sorted(os.listdir(output)):
        if name.startswith(_INDEX) or (every and _OURS.fullmatch(name)):
            (output / name).unlink()


def _finished(output: Path, intended: dict[str, Any]) -> Counts:
    found = json.loads((output / DONE).read_bytes())
    if found["made_from"] != json.loads(json.dumps(intended)):
        raise ConfigError(f"{output} was made of other text or settings: choose another folder")
    return Counts(**found["counts"])


def _foreign(folder: Path) -> str | None:
    """Return the first name in a folder that a cleaning does not write; one of ours has an index, or is done."""
    names = sorted(os.listdir(folder))
    foreign = next((name for name in names if not _OURS.fullmatch(name)), None)
    return foreign or (None if {_INDEX, DONE} & set(names) else names[0])


def _fingerprint(against: Collection[str]) -> str:
    digest = hashlib.sha256()
    for shingle in sorted(against):
        digest.update(shingle.encode("utf-8") + b"\n")
    return digest.hexdigest() if against else ""
