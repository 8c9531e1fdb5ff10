"""Loss and accuracy of a masked-word head on a text: at [MASK], at random and at kept pieces, for any family.

The masks are those of `corpus/batches/evaluation_masks`, the place of a piece being that in the tokenised text,
documents in order. Each document is cut into sequences of `max_seq_length` with the tokenizer's own marks, the last one
being the rest; nothing is dropped. So a run's own evaluation gives the same figures where its examples are the same
sequences.

Losses of two vocabularies do not compare, pieces being of different lengths. For that there is

    nats per character = mean loss at [MASK] x pieces of the text / characters of the text

which is the pseudo-log-likelihood of the text per character (Salazar et al. 2020, arXiv 1910.14659), estimated from the
masked pieces with 15 % of the text masked at once. All pieces count, unknown ones too, and all characters (code points)
of the documents, white space too. A finer vocabulary sees more often a part of the very word that it predicts, and a
lower-casing one predicts less; that is not corrected for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.corpus.batches.collate import collate, grouped_by_kind
from bert_ds.corpus.batches.evaluation_masks import EvaluationMasker, text_key
from bert_ds.corpus.batches.examples import Example
from bert_ds.corpus.batches.unigram import MAX_COUNTED_TOKENS, piece_counts, unigram_cross_entropy
from bert_ds.corpus.shards.shard_folder import MANIFEST, ShardSplit, Split, open_shards
from bert_ds.corpus.text.documents import read_documents
from bert_ds.downstream.rows.examples import Say
from bert_ds.downstream.rows.splits import first_by_hash
from bert_ds.downstream.untrained.masked_lm import MaskedLm, open_masked_lm
from bert_ds.training.loop.evaluation import kind_means


class Pieces(NamedTuple):
    """A tokenised text."""

    ids: np.ndarray
    """int32 [n], all documents one behind the other."""
    document_ends: np.ndarray
    """int64 [documents], ascending: the piece behind the last of each."""
    num_characters: int | None
    """Of all documents; None for shards, which do not hold the text."""


def score_masked_words(folder: Path, task: TaskConfig, say: Say) -> dict[str, float]:
    """Return the figures of a folder on the validation text of a task, by name.

    Raises:
        ConfigError, CheckpointError, DataError: see `open_masked_lm`, `read_documents` and `open_shards`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return masked_word_figures(open_masked_lm(folder, kernels=task.training.kernels, device=device), task, say)


def masked_word_figures(model: MaskedLm, task: TaskConfig, say: Say) -> dict[str, float]:
    """As `score_masked_words`, of a folder that is open."""
    text = read_pieces([Path(file.path) for file in task.data.validation], model)
    length = min(task.max_seq_length, model.max_length)
    say(
        f"{model.name}, sequences of {length} tokens; {len(text.ids):,} pieces of {len(text.document_ends):,} documents"
    )
    rows = sequences(text, length - len(model.before) - len(model.after))
    rows = [rows[index] for index in first_by_hash([str(start) for start, _ in rows], task.data.max_validation_rows)]
    sums, counts, judged = np.zeros(6), Counter[str](), []
    batch_size = max(1, min(task.evaluation.batch_size, model.max_tokens // length))
    for batch in _batches(text, rows, model, batch_size=batch_size):
        sums += model.kind_sums(batch).numpy()
        counts.update(batch.kind_counts)
        judged.append(batch)
    figures = kind_means("mlm", sums.tolist(), counts=counts)
    return figures | _compared(figures, text, judged, task, model=model, say=say)


def read_pieces(paths: Sequence[Path], model: MaskedLm) -> Pieces:
    """Read files and folders of text, or the validation split of shard folders, in this order."""
    parts: list[np.ndarray] = []
    ends: list[np.ndarray] = []
    num_pieces, num_characters = 0, 0 if paths else None
    for path in paths:
        if (path / MANIFEST).is_file():
            split = _open(path, "validation", model)
            parts.append(split.tokens(0, split.num_tokens).astype(np.int32))
            ends.append(num_pieces + split.sentence_starts()[split.document_starts()[1:]])
            num_characters = None
        else:
            found = [(model.encode(document.text), len(document.text)) for document in read_documents([path])]
            parts += [pieces for pieces, _ in found]
            ends.append(num_pieces + np.cumsum([len(pieces) for pieces, _ in found], dtype=np.int64))
            if num_characters is not None:
                num_characters += sum(size for _, size in found)
        num_pieces = int(ends[-1][-1]) if len(ends[-1]) else num_pieces
    if not num_pieces:
        raise DataError(f"{', '.join(map(str, paths))}: no piece of text, nothing can be measured")
    return Pieces(np.concatenate(parts), np.concatenate(ends), num_characters)


def sequences(text: Pieces, longest: int) -> list[tuple[int, int]]:
    """Return the pieces [start, stop) of each sequence, documents cut every `longest` pieces."""
    if longest < 1:
        raise DataError(f"a sequence has room for {longest} pieces beside its marks, wanted a longer max_seq_length")
    found = []
    start = 0
    for end in text.document_ends.tolist():
        found += [(first, min(first + longest, end)) for first in range(start, end, longest)]
        start = end
    return found


def _batches(
    text: Pieces, rows: Sequence[tuple[int, int]], model: MaskedLm, *, batch_size: int
) -> Iterator[MicroBatch]:
    """Yield batches of sequences of one length, masked, so that no family sees padding."""
    masker = EvaluationMasker(vocab_size=model.vocab_size, special_ids=model.special_ids, mask_id=model.mask_id)
    key = text_key(text.ids, len(text.ids))
    margins = len(model.before), len(model.after)
    for _, group in groupby(sorted(rows, key=lambda row: row[0] - row[1]), key=lambda row: row[1] - row[0]):
        of_length = list(group)
        for first in range(0, len(of_length), batch_size):
            chosen = of_length[first : first + batch_size]
            examples = [_example(text.ids[start:stop], model, index=start) for start, stop in chosen]
            places = [np.pad(np.arange(*row), margins, constant_values=-1) for row in chosen]
            masked = masker.mask(examples, places, keys=np.full(len(chosen), key, dtype=np.uint64))
            yield grouped_by_kind(collate(masked), mask_id=model.mask_id)


def _example(pieces: np.ndarray, model: MaskedLm, *, index: int) -> Example:
    ids = np.concatenate([model.before, pieces, model.after]).astype(np.int32)
    return Example(ids, np.zeros(len(ids), dtype=np.int8), IGNORE_INDEX, (0, 0, index))


def _compared(
    figures: dict[str, float], text: Pieces, judged: list[MicroBatch], task: TaskConfig, *, model: MaskedLm, say: Say
) -> dict[str, float]:
    """Return what sets the loss beside other models: piece frequencies, and nats per character."""
    found = {}
    if task.data.train:
        counts = _counts([Path(file.path) for file in task.data.train], model)
        found["unigram_cross_entropy"] = unigram_cross_entropy(counts, judged)
    else:
        say("no unigram_cross_entropy: data.train names no training text, whose pieces it is counted from")
    if text.num_characters is None:
        say("no nats_per_character: shards hold pieces and no characters")
    elif "loss_mlm_masked" in figures:
        found["nats_per_character"] = figures["loss_mlm_masked"] * len(text.ids) / text.num_characters
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _counts(paths: Sequence[Path], model: MaskedLm) -> np.ndarray:
    """Return how often each piece is in the training text, int64 [V]; of a long one its beginning is counted."""
    counts = np.zeros(model.vocab_size, dtype=np.int64)
    for path in paths:
        if (path / MANIFEST).is_file():
            counts += piece_counts([_open(path, "train", model)])
            continue
        left = MAX_COUNTED_TOKENS
        for document in read_documents([path]):
            pieces = model.encode(document.text)[:left]
            counts += np.bincount(pieces, minlength=model.vocab_size)
            left -= len(pieces)
            if not left:
                break
    return counts


def _open(path: Path, side: Split, model: MaskedLm) -> ShardSplit:
    if model.fingerprint is None:
        raise DataError(f"{path}: shards hold the pieces of another tokenizer, not of this model's: wanted its text")
    return open_shards(path, side, fingerprint=model.fingerprint)
