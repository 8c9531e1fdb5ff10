"""Classification with the masked-word head and no training: the text in a prompt, and which label word fits the gap.

A label word of several pieces is scored by its length-normalised pseudo-log-likelihood: it is put into the gap, each of
its pieces is masked in turn, and their log-probabilities are averaged. Few-shot means demonstrations: filled prompts of
labelled texts stand before the prompt, as many as there is room for. Nothing is trained on them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer
from bert_ds.downstream.rows.features import encode_part
from bert_ds.downstream.untrained.masked_scores import Query, log_probabilities
from bert_ds.encoder.pretraining_model import PretrainingModel

TEXT_GAPS = ("text", "text_pair")
LABEL_GAP = "label"
_GAP = re.compile(r"\{(\w+)\}")


class Prompt(NamedTuple):
    """A template, as in "{text} It was {label}.", and the words that stand for each label."""

    template: str
    label_words: Mapping[str, Sequence[str]]

    @property
    def words(self) -> list[str]:
        """The words of all labels."""
        return [word for words in self.label_words.values() for word in words]


class Shot(NamedTuple):
    """A labelled row that demonstrates the task."""

    texts: Sequence[str]
    label: str


class PromptScores(NamedTuple):
    """For each row the score of each label, in nats per piece, and the demonstrations that there was room for."""

    scores: list[dict[str, float]]
    num_shots: list[int]


def check_prompt(prompt: Prompt, tokenizer: TextTokenizer, *, num_texts: int) -> None:
    """Raise ConfigError unless the template has its gaps and the vocabulary has the label words."""
    gaps, wanted = _GAP.findall(prompt.template), [*TEXT_GAPS[:num_texts], LABEL_GAP]
    if sorted(gaps) != sorted(wanted):
        raise ConfigError(f"prompt.template {prompt.template!r} has the gaps {gaps}, wanted each of {wanted} once")
    for label, words in prompt.label_words.items():
        for word in words:
            pieces = encode_part(tokenizer, word)
            if not len(pieces) or tokenizer.special_ids.unk in pieces:
                raise ConfigError(f"prompt.label_words.{label}: {word!r} is not in the vocabulary of the model")


def prompt_scores(
    model: PretrainingModel,
    writer: PromptWriter,
    rows: Sequence[Sequence[str]],
    *,
    shots: Sequence[Shot] = (),
    calibrate: bool = True,
) -> PromptScores:
    """Return the score of each label for each row: the mean over its words.

    Args:
        model: in evaluation mode.
        writer: of the prompt.
        rows: a text, or a text and its pair, each; at least one.
        shots: demonstrations, the most wanted first.
        calibrate: subtract what a label word scores in the prompt of an empty text, so that a word that is frequent
            everywhere does not win everywhere (Holtzman et al. 2021, arXiv 2104.08315).
    """
    asked = [*rows, *([[""] * len(rows[0])] if calibrate else [])]
    contexts = [writer.context(texts, shots) for texts in asked]
    questions = [(number, *one) for number, context in enumerate(contexts) for one in writer.questions(context)]
    found = log_probabilities(model, [query for _, query, _ in questions])
    values: list[dict[str, list[float]]] = [{} for _ in contexts]
    for (number, _, words), scores in zip(questions, found, strict=True):
        for word, score in zip(words, scores, strict=True):
            values[number].setdefault(word, []).append(float(score))
    by_word = [{word: float(np.mean(pieces)) for word, pieces in row.items()} for row in values]
    base = by_word.pop() if calibrate else dict.fromkeys(writer.prompt.words, 0.0)
    labels = writer.prompt.label_words
    scored = [
        {label: float(np.mean([row[word] - base[word] for word in words])) for label, words in labels.items()}
        for row in by_word
    ]
    return PromptScores(scored, [context.num_shots for context in contexts[: len(rows)]])


class Context(NamedTuple):
    """The pieces before and after the gap of the label, special ones included."""

    before: np.ndarray
    after: np.ndarray
    num_shots: int


class PromptWriter:
    """Writes rows into a prompt that fits the model.

    Args:
        tokenizer: of the model.
        prompt: see `check_prompt`.
        max_seq_length: tokens at most; the end of a long text is cut, the words of the prompt never.

    Raises:
        ConfigError: the prompt is longer than max_seq_length without any text.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: Prompt, max_seq_length: int) -> None:
        self.prompt = prompt
        self._special = tokenizer.special_ids
        self._tokenizer = tokenizer
        self._parts = _GAP.split(prompt.template)
        self._is_spaced = [self._begins_word(index) for index in range(len(self._parts))]
        label_is_spaced = self._is_spaced[self._place(LABEL_GAP)]
        self._pieces_of_word = {word: encode_part(tokenizer, word, spaced=label_is_spaced) for word in prompt.words}
        num_fixed = sum(len(self._pieces(index, part)) for index, part in enumerate(self._parts) if index % 2 == 0)
        widest = max(len(pieces) for pieces in self._pieces_of_word.values())
        self._room = max_seq_length - 2 - num_fixed - widest
        if self._room < 0:
            raise ConfigError(
                f"prompt.template {prompt.template!r} needs {2 + num_fixed + widest} tokens without any text, "
                f"wanted at most max_seq_length {max_seq_length}"
            )

    def context(self, texts: Sequence[str], shots: Sequence[Shot]) -> Context:
        """Return the prompt of a row, with the demonstrations that leave all of its text where it fits at all."""
        encoded = self._cut(self._encoded(texts))
        before, after = self._filled(encoded)
        room = self._room - sum(map(len, encoded))
        shown: list[np.ndarray] = []
        for shot in shots:
            filled = self._demonstration(shot)
            if len(filled) > room:
                break
            shown.insert(0, filled)  # the most wanted stands nearest
            room -= len(filled)
        special = self._special
        return Context(_join([[special.cls], *shown, before]), _join([after, [special.sep]]), len(shown))

    def questions(self, context: Context) -> list[tuple[Query, list[str]]]:
        """Return what to ask the model, and whose word each of the answers belongs to."""
        single = [word for word, pieces in self._pieces_of_word.items() if len(pieces) == 1]
        asked = []
        if single:
            pieces = _join([self._pieces_of_word[word] for word in single])
            asked.append((self._query(context, np.array([self._special.mask]), 0, pieces), single))
        for word, pieces in self._pieces_of_word.items():
            for index in range(len(pieces) if len(pieces) > 1 else 0):
                gap = pieces.copy()
                gap[index] = self._special.mask
                asked.append((self._query(context, gap, index, pieces[index : index + 1]), [word]))
        return asked

    def _query(self, context: Context, gap: np.ndarray, index: int, pieces: np.ndarray) -> Query:
        return Query(_join([context.before, gap, context.after]), len(context.before) + index, pieces)

    def _filled(self, texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return the pieces of the prompt before and after the gap of the label."""
        sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        side = 0
        for index, part in enumerate(self._parts):
            if index % 2 == 0:
                sides[side].append(self._pieces(index, part))
            elif part == LABEL_GAP:
                side = 1
            else:
                sides[side].append(texts[TEXT_GAPS.index(part)])
        return _join(sides[0]), _join(sides[1])

    def _demonstration(self, shot: Shot) -> np.ndarray:
        before, after = self._filled(self._encoded(shot.texts))
        return _join([before, self._pieces_of_word[self.prompt.label_words[shot.label][0]], after])

    def _begins_word(self, index: int) -> bool:
        """Whether a space, or nothing, stands in front of a part of the template."""
        before, own = "".join(self._parts[:index]), "" if index % 2 else self._parts[index]
        return not before or own[:1].isspace() or bool(index % 2 and before[-1].isspace())

    def _pieces(self, index: int, text: str) -> np.ndarray:
        """Return the pieces of a text in the place of a part of the template."""
        return encode_part(self._tokenizer, text.strip(), spaced=self._is_spaced[index])

    def _encoded(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the pieces of the texts of a row, each as at its place."""
        gaps = zip(TEXT_GAPS, texts, strict=False)
        return [self._pieces(self._place(gap), text) for gap, text in gaps]

    def _place(self, gap: str) -> int:
        """Return which part of the template a gap is."""
        return 1 + 2 * self._parts[1::2].index(gap)

    def _cut(self, texts: list[np.ndarray]) -> list[np.ndarray]:
        """Take pieces from the end of the longest text until all fit."""
        while sum(map(len, texts)) > self._room:
            longest = max(range(len(texts)), key=lambda index: len(texts[index]))
            others = sum(len(text) for index, text in enumerate(texts) if index != longest)
            runner_up = max((len(text) for index, text in enumerate(texts) if index != longest), default=0)
            texts[longest] = texts[longest][: max(self._room - others, min(runner_up, len(texts[longest]) - 1))]
        return texts


def _join(parts: Sequence[np.ndarray | Sequence[int]]) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])
