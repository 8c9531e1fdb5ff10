"""From texts to token ids: a feature is what the encoder reads at a time, one sequence as a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer
from bert_ds.downstream.rows.examples import Labels


class Feature(NamedTuple):
    """One sequence with its targets; of multiple choice, the sequences of all choices."""

    example: int
    """Index of its example; several features may come from one."""
    input_ids: np.ndarray
    """int32 [n], from [CLS] to [SEP]."""
    token_type_ids: np.ndarray
    """int8 [n], 0 or 1."""
    targets: dict[str, np.ndarray]
    """What the head compares its scores with, by name: arrays [n, ...] per token or [1, ...] per feature."""
    facts: Any = None
    """What reading the scores back needs."""
    lengths: tuple[int, ...] = ()
    """Lengths of the sequences that lie end to end in input_ids and must stay together; () is a single one."""

    @property
    def sequence_lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return self.lengths or (len(self.input_ids),)


class FeatureContext(NamedTuple):
    """What making features needs besides the examples."""

    tokenizer: TextTokenizer
    task: TaskConfig
    labels: Labels
    say: Callable[[str], None]
    """Takes what is worth telling: how much was cut, split or repaired."""


def encode_text(tokenizer: TextTokenizer, text: str) -> np.ndarray:
    """Return the ids of a text without special tokens, int32 [n]."""
    return np.frombuffer(tokenizer.encode(text), dtype=tokenizer.dtype).astype(np.int32)


def encode_part(tokenizer: TextTokenizer, text: str, *, spaced: bool = True) -> np.ndarray:
    """Return the ids of a word, or of what else stands behind other text and mostly a space, int32 [n]."""
    return np.frombuffer(tokenizer.encode_part(text, spaced=spaced), dtype=tokenizer.dtype).astype(np.int32)


def wrap(tokenizer: TextTokenizer, parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return input_ids and token_type_ids of `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]`, in the tokenizer's marks."""
    special = tokenizer.special_ids
    ids: list[np.ndarray] = [np.array([special.cls], dtype=np.int32)]
    types = [np.zeros(1, dtype=np.int8)]
    for segment, part in enumerate(parts):
        ends = (special.sep,) if segment == len(parts) - 1 else tokenizer.between
        ids += [part, np.array(ends, dtype=np.int32)]
        types.append(np.full(len(part) + len(ends), segment, dtype=np.int8))
    return np.concatenate(ids), np.concatenate(types)


def cut_to(tokenizer: TextTokenizer, parts: Sequence[np.ndarray], max_seq_length: int) -> tuple[list[np.ndarray], bool]:
    """Cut one or two parts to fit with their special tokens; the longer part loses its end first.

    Returns:
        the parts, and whether anything was cut.
    """
    room = max_seq_length - 2 - len(tokenizer.between) * (len(parts) - 1)
    lengths = [len(part) for part in parts]
    if sum(lengths) <= room:
        return list(parts), False
    if len(parts) == 1:
        return [parts[0][:room]], True
    # What Hugging Face calls longest_first; at equal lengths the second part keeps the odd token.
    shorter = min(min(lengths), room // 2)
    first_is_shorter = lengths[0] <= lengths[1]
    cut = [shorter, room - shorter] if first_is_shorter else [room - shorter, shorter]
    return [part[:length] for part, length in zip(parts, cut, strict=True)], True
