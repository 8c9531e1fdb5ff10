"""Example boundaries: which consecutive sentences form an example, found in one vectorised pass and cached.

An example is a run of whole sentences of one document whose tokens fit a target length: `max_seq_length` less the
special tokens, or with probability `short_seq_prob` a length drawn from 2 up to that. Runs are greedy: a run takes
sentences while they fit, and the next run starts where it ended. What changes from epoch to epoch (the a/b split, the
random next sentence, the masks) is not decided here.

Nothing is dropped: every token of the split lies in exactly one example. A sentence longer than the longest example is
cut into pieces of that length, the last piece being the rest. A sentence longer than a *short* target is kept whole.

Where this departs from Google's create_pretraining_data.py:
- a run ends before the sentence that would not fit; the script takes that sentence too and cuts tokens away afterwards;
- the target length belongs to the sentence that starts the run (keyed by its position), so that all runs of a corpus
  are found at once: every sentence asks by binary search on the summed lengths where a run from here would end, and
  pointer doubling marks those sentences that a chain of runs from a document's start really reaches;
- the text is cut once, not `dupe_factor` times; what `dupe_factor` was for is drawn anew in every epoch.
With `cross_documents` a run goes on into the next document at the cost of one [SEP] (RoBERTa's FULL-SENTENCES).
Without `whole_sentences` a document counts as one sentence: it is cut into examples of the full length, and its rest.

Words used below: a *unit* is a sentence or a piece of a long one.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import SequenceConfig
from bert_ds.corpus.batches.keyed_random import Draw, below, fraction, keyed_bits
from bert_ds.corpus.shards.shard_folder import KINDS, ShardSplit, read_manifest

_FORMAT = 1
_CHUNK_SENTENCES = 1 << 20
_HEADER_WORDS = 8


@dataclass(frozen=True)
class ExampleTable:
    """The examples of one split: three nested lists of offsets, mapped from the cache."""

    split: ShardSplit
    config: SequenceConfig
    seed: int
    unit_tokens: np.ndarray
    """int64 [units + 1]: unit u is tokens unit_tokens[u] to unit_tokens[u + 1] of the split."""
    example_units: np.ndarray
    """int64 [examples + 1]: example i is units example_units[i] to example_units[i + 1]."""
    document_units: np.ndarray
    """int64 [documents + 1]: document d is units document_units[d] to document_units[d + 1]."""

    @property
    def num_examples(self) -> int:
        """Examples of the split; each is seen once per pass."""
        return len(self.example_units) - 1

    def token_counts(self) -> np.ndarray:
        """Text tokens per example, int64, without special tokens and before a random next sentence replaces any."""
        return np.diff(self.unit_tokens[self.example_units])


def num_special_tokens(config: SequenceConfig) -> int:
    """Special tokens of a full example: [CLS] a [SEP], or [CLS] a [SEP] b [SEP]."""
    return 2 if config.sentence_pair == "none" else 3


def target_lengths(token_starts: np.ndarray, config: SequenceConfig, *, seed: int) -> np.ndarray:
    """Target length in text tokens of a run that starts at each of these tokens.

    Args:
        token_starts: int64 token offsets in the split.
        config: gives the longest example and the share of short ones.
        seed: of the run.

    Returns:
        int64, 2 to max_seq_length less the special tokens.
    """
    longest = config.max_seq_length - num_special_tokens(config)
    targets = np.full(len(token_starts), longest, dtype=np.int64)
    is_short = fraction(keyed_bits(seed, Draw.IS_SHORT, token_starts)) < config.short_seq_prob
    short = np.flatnonzero(is_short)
    targets[short] = 2 + below(keyed_bits(seed, Draw.SHORT_TARGET, token_starts[short]), longest - 1)
    return targets


def build_examples(
    split: ShardSplit, config: SequenceConfig, *, seed: int, cache_dirs: tuple[Path, ...]
) -> ExampleTable:
    """Find the examples of a split, or map them from a cache.

    The cache file is written under a temporary name and renamed, so that any number of processes may build it at once.
    A file whose checksum is wrong is built again.

    Args:
        split: opened shards.
        config: how documents become examples.
        seed: of the run; decides the short targets.
        cache_dirs: folders that may hold the cache, best first; the first writable one gets a new cache.

    Returns:
        The table, memory-mapped.

    Raises:
        DataError: the split holds no token, too few documents for random next sentences, or no folder is writable.
    """
    name = f"examples-{_cache_key(split, config, seed)}.npy"
    words = next((words for folder in cache_dirs if (words := _read_cache(folder / name)) is not None), None)
    if words is None:
        path = _write_cache(_find_examples(split, config, seed), cache_dirs, name)
        words = _read_cache(path)
        if words is None:
            raise DataError(f"{path}: written a moment ago and its checksum is wrong already: check this disk")
    unit_tokens, example_units, document_units = words
    table = ExampleTable(split, config, seed, unit_tokens, example_units, document_units)
    if config.sentence_pair in ("nsp", "structure") and np.count_nonzero(np.diff(document_units)) < 2:
        pair = config.sentence_pair
        raise DataError(f'{split.folder} {split.split}: sentence_pair "{pair}" wants at least 2 documents, found 1')
    return table


def content_hash(split: ShardSplit) -> str:
    """Identify what a split holds, wherever it lies: sha256 over the tokenizer and the files' checksums."""
    shards = read_manifest(split.folder).splits[split.split].shards
    checksums = [shard.files[kind].sha256 for shard in shards for kind in KINDS]
    return hashlib.sha256(repr((split.fingerprint, checksums)).encode()).hexdigest()


def _find_examples(split: ShardSplit, config: SequenceConfig, seed: int) -> list[np.ndarray]:
    """Unit, example and document offsets of the whole split, chunk by chunk, so that memory stays near their size."""
    unit_parts, example_parts, document_parts = ([np.zeros(1, np.int64)] for _ in range(3))
    num_units = num_tokens = 0
    for sentence_lengths, document_starts in _chunks(split):
        longest = config.max_seq_length - num_special_tokens(config)
        if not config.whole_sentences:
            sentence_lengths, document_starts = _whole_documents(sentence_lengths, document_starts)
        unit_lengths, document_units = _units(sentence_lengths, document_starts, longest)
        units = np.concatenate(([0], np.cumsum(unit_lengths)))
        targets = target_lengths(num_tokens + units[:-1], config, seed=seed)
        follow = _follow_cross_documents if config.cross_documents else _follow_in_document
        starts = _chain(*follow(units, document_units, targets))
        unit_parts.append(num_tokens + units[1:])
        example_parts.append(num_units + np.append(starts, len(unit_lengths))[1:])
        document_parts.append(num_units + document_units[1:])
        num_units += len(unit_lengths)
        num_tokens += int(units[-1])
    if not num_tokens:
        raise DataError(f"{split.folder} {split.split}: holds no token, nothing can be made into examples")
    return [np.concatenate(parts) for parts in (unit_parts, example_parts, document_parts)]


def _chunks(split: ShardSplit) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sentence lengths and document starts of groups of whole documents; groups without a token have none."""
    lengths, starts = split.sentence_lengths(), split.document_starts()
    first = 0
    while first < len(starts) - 1:
        last = int(np.searchsorted(starts, starts[first] + _CHUNK_SENTENCES, side="right")) - 1
        last = max(last, first + 1)
        yield lengths[starts[first] : starts[last]].astype(np.int64), starts[first : last + 1] - starts[first]
        first = last


def _whole_documents(sentence_lengths: np.ndarray, document_starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Length of each document, as if it were one sentence, and the starts of the documents then."""
    tokens_before = np.concatenate(([0], np.cumsum(sentence_lengths)))
    return np.diff(tokens_before[document_starts]), np.arange(len(document_starts))


def _units(sentence_lengths: np.ndarray, document_starts: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Length of each unit, and the unit offsets of the documents; a sentence without tokens has no unit."""
    pieces = -(-sentence_lengths // longest)
    piece_starts = np.concatenate(([0], np.cumsum(pieces)))
    piece_index = np.arange(piece_starts[-1]) - np.repeat(piece_starts[:-1], pieces)
    unit_lengths = np.minimum(longest, np.repeat(sentence_lengths, pieces) - longest * piece_index)
    return unit_lengths, piece_starts[document_starts]


def _follow_in_document(
    units: np.ndarray, document_units: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where a run from each unit would end, not beyond its document; and the units where runs surely start."""
    document_ends = np.repeat(document_units[1:], np.diff(document_units))
    ends = np.searchsorted(units, units[:-1] + targets, side="right") - 1
    ends = np.minimum(np.maximum(ends, np.arange(1, len(units))), document_ends)
    return ends, document_units[:-1][np.diff(document_units) > 0]


def _follow_cross_documents(
    units: np.ndarray, document_units: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """As `_follow_in_document`, where each document's end inside a run costs one [SEP] of the target."""
    sizes = np.diff(document_units)
    separators = np.repeat(np.arange(np.count_nonzero(sizes)), sizes[sizes > 0])
    costs_up_to = units[1:] + separators
    ends = np.searchsorted(costs_up_to, units[:-1] + separators + targets, side="right")
    return np.maximum(ends, np.arange(1, len(units))), np.arange(min(1, len(separators)))


def _chain(ends: np.ndarray, roots: np.ndarray) -> np.ndarray:
    """Units reached from the roots by any number of steps `unit -> ends[unit]`, ascending.

    Round k knows all units nearer than 2**k steps to a root and jumps 2**k steps at once. A round that finds nothing
    new is the last: a chain that went on would have a unit exactly 2**k steps from its root.
    """
    jump = np.append(ends, len(ends))
    reached = np.zeros(len(jump), dtype=bool)
    reached[roots] = True
    reached[-1] = True
    while True:
        before = np.flatnonzero(reached)
        reached[jump[before]] = True
        if np.count_nonzero(reached) == len(before):
            return before[:-1]
        jump = jump[jump]


def _cache_key(split: ShardSplit, config: SequenceConfig, seed: int) -> str:
    longest = config.max_seq_length - num_special_tokens(config)
    settings: tuple[object, ...] = (_FORMAT, _CHUNK_SENTENCES, seed, longest)
    settings += (config.short_seq_prob, config.cross_documents, *(() if config.whole_sentences else ("cut",)))
    return hashlib.sha256(repr((settings, content_hash(split))).encode()).hexdigest()[:24]


def _write_cache(arrays: list[np.ndarray], folders: tuple[Path, ...], name: str) -> Path:
    """Write format, checksum, counts and arrays as one int64 array to the first writable folder, whole or not."""
    words = np.concatenate([[len(array) for array in arrays], *arrays]).astype(np.int64)
    header = np.array([_FORMAT, *_checksum(words)])
    refusals = []
    for folder in folders:
        temporary = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f".{name}-{secrets.token_hex(4)}"
            with temporary.open("xb") as file:
                np.save(file, np.concatenate([header, words]))
            os.replace(temporary, folder / name)
            return folder / name
        except OSError as error:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            refusals.append(f"{folder}: {error.strerror or error}")
    raise DataError(f"no folder takes the table of examples ({'; '.join(refusals)}): give a writable cache folder")


def _read_cache(path: Path) -> list[np.ndarray] | None:
    """Map the three arrays; None where there is no file, or not the one that was written."""
    try:
        words = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError):
        return None
    if words.dtype != np.int64 or words.ndim != 1 or len(words) < _HEADER_WORDS or words[0] != _FORMAT:
        return None
    checksum, counts, body = words[1:5], words[5:_HEADER_WORDS], words[_HEADER_WORDS:]
    if not np.array_equal(_checksum(words[5:]), checksum):
        return None
    return np.split(body, np.cumsum(counts)[:-1])


def _checksum(words: np.ndarray) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(words.data).digest(), dtype=np.int64)
