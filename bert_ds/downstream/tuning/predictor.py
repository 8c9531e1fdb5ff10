"""Answers of a fine-tuned folder to texts: what they need lies in the folder, no task file and no labels.

A row is a text, two texts (a pair; a question and its context), or an object with the fields of its kind: `text`,
`text_pair`, `question`, `context`, `choices`, `words`; for a vector also `query` or `passage`, which get their prompts.
Its answer is an object of the fields in ANSWERS; a row that cannot be answered has none of them and the reason under
`error`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.model_folder import require_model_folder
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.reading.config_problems import describe, section_problems
from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.downstream.kinds.kind import Kind, Prediction
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.kinds.task_model import role_of
from bert_ds.downstream.kinds.text_kinds import text_features
from bert_ds.downstream.rows.asked_rows import Fault
from bert_ds.downstream.rows.examples import Example
from bert_ds.downstream.rows.features import Feature, FeatureContext
from bert_ds.downstream.rows.free_words import Word, joined_words, split_words
from bert_ds.downstream.scores.entity_scores import entities
from bert_ds.downstream.tuning.scorers import make_scorer, scores_by_length
from bert_ds.downstream.tuning.task_folder import tokenizer_folder
from bert_ds.encoder.hf_folder import read_json
from bert_ds.encoder.hf_mapping import model_config_from_hf
from bert_ds.encoder.pretrained import check_tokenizer

ANSWERS: dict[str, tuple[str, ...]] = {
    "classification": ("label", "probability", "probabilities"),
    "multi_label": ("labels", "probabilities"),
    "regression": ("score",),
    "token_classification": ("entities",),
    "intent_slot": ("intent", "probability", "entities"),
    "multiple_choice": ("choice", "probabilities"),
    "question_answering": ("answer", "start", "end", "score", "no_answer"),
    "sentence_embedding": ("vector",),
}
"""Kind -> names in an answer. Places are characters of the text; `no_answer` is how far the score of none is above."""
ASKED: dict[str, tuple[str, ...]] = {
    "question_answering": ("question", "context"),
    "multiple_choice": ("text", "choices"),
}
"""Kind -> fields of a row; of the others it is `text`, and `text_pair` where there is one."""
_NUM_TOKENS_AT_MOST = 512
"""Of a sequence, where the folder's tokenizer does not say."""


class _Asked(NamedTuple):
    example: Example | None
    words: Sequence[Word]
    features: Sequence[Feature]
    fault: str


class Predictor:
    """A fine-tuned folder, or the ONNX file of one, that answers.

    Args:
        folder: with config.json, tokenizer and weights, or model.onnx.

    Raises:
        ConfigError: the folder is none, or has no head of a task.
        CheckpointError: its weights are damaged.
        DataError: its tokenizer or its labels do not fit.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        require_model_folder(folder)
        self.kind = kind_of(folder)
        self._kind: Kind = KINDS[self.kind]
        own = tokenizer_folder(folder, self._kind)
        self._tokenizer = load_tokenizer(own)
        check_tokenizer(own, **self._tokenizer.identity)
        self._scorer = make_scorer(folder, self.kind)
        self._task = _task(own, self.kind)
        told = self._kind.folder_settings(folder)
        self._prompts = {} if told is None else {"query": told.query_prompt, "passage": told.passage_prompt}

    @property
    def fields(self) -> tuple[str, ...]:
        """Names in an answer, without `error`."""
        return ANSWERS[self.kind]

    def __call__(self, rows: Sequence[Any], *, batch_size: int = 32) -> list[dict[str, Any]]:
        """Return one answer for each row, in their order; rows of like length are computed together."""
        asked = [self._asked(row) for row in rows]
        owners = [(number, place) for number, one in enumerate(asked) for place in range(len(one.features))]
        features = [feature for one in asked for feature in one.features]
        summaries: list[list[Any]] = [[None] * len(one.features) for one in asked]
        for index, scores in scores_by_length(self._scorer, features, batch_size=batch_size):
            number, place = owners[index]
            summaries[number][place] = self._summary(features[index], scores)
        return [self._answer(one, found) for one, found in zip(asked, summaries, strict=True)]

    def _asked(self, row: Any) -> _Asked:
        try:
            if isinstance(row, Fault):
                raise DataError(row.text)
            texts, words = _texts(self._prompted(row), self.kind)
            example = Example("the row", "0", texts, None)
            context = FeatureContext(self._tokenizer, self._task, self._scorer.labels, lambda text: None)
            if self.kind == "sentence_embedding":
                features = text_features([example], context, lambda example, context: np.zeros(1))
            else:
                features = self._kind.make_features([example], context)
        except DataError as error:
            return _Asked(None, (), (), str(error).removeprefix("the row: "))
        return _Asked(example, words, features, "")

    def _prompted(self, row: Any) -> Any:
        """Return a row with a query or a passage as a text behind its prompt; any other as it is."""
        given = [name for name in self._prompts if isinstance(row, Mapping) and isinstance(row.get(name), str)]
        if not given:
            return row
        text = row[given[0]]
        return {"text": self._prompts[given[0]] + text if text.strip() else ""}

    def _summary(self, feature: Feature, scores: dict[str, np.ndarray]) -> Any:
        return scores["vectors"][0] if self.kind == "sentence_embedding" else self._kind.summarise(feature, scores)

    def _answer(self, asked: _Asked, summaries: Sequence[Any]) -> dict[str, Any]:
        if asked.example is None:
            return {**dict.fromkeys(self.fields), "error": asked.fault}
        if self.kind == "sentence_embedding":
            return {"vector": [round(float(value), 6) for value in summaries[0]]}
        labels = self._scorer.labels
        (found,) = self._kind.predict([asked.example], asked.features, summaries, labels)
        if self.kind == "question_answering":
            return _span(found, asked.example.texts[1])
        if self.kind in ("token_classification", "intent_slot"):
            tags = found.value if self.kind == "token_classification" else found.value[1]
            intent = {} if self.kind == "token_classification" else _chosen("intent", labels["intent"], found.scores)
            return {**{name: intent[name] for name in self.fields if name in intent}, "entities": _spans(tags, asked)}
        if self.kind == "regression":
            return {"score": round(float(found.value), 6)}
        if self.kind == "multi_label":
            shares = 1 / (1 + np.exp(-np.array(found.scores, dtype=np.float64)))
            return {"labels": list(found.value), "probabilities": _named(labels["label"], shares)}
        if self.kind == "multiple_choice":
            choices = asked.example.texts[2:]
            answer = _chosen("choice", choices, summaries[0])
            return {"choice": answer["choice"], "probabilities": list(answer["probabilities"].values())}
        return _chosen("label", labels["label"], found.scores)


def kind_of(folder: Path) -> str:
    """Return the kind of task that a folder was fine-tuned for.

    Raises:
        ConfigError: it has no head of a task.
    """
    if all((folder / part / "config.json").is_file() for part in ("intent", "tags")):
        return "intent_slot"
    if not (folder / "config.json").is_file():
        (below, *_) = sorted(path.parent for path in folder.glob("*/config.json"))
        raise ConfigError(f"--model {folder} has no config.json: did you mean {below}?")
    content = read_json(folder / "config.json")
    config = model_config_from_hf({**content})
    (architecture, *_) = content.get("architectures") or ["none"]
    of_role = {
        role_of(config, form.role).architecture: name
        for name, kind in reversed(KINDS.items())
        for form in kind.hf_forms
        if len(kind.hf_forms) == 1
    }
    if architecture not in of_role:
        raise ConfigError(
            f"{folder} has no head of a task (architectures {describe(architecture)}): wanted a fine-tuned folder, as "
            "bert-ds finetune writes it"
        )
    kinds = {"multi_label_classification": "multi_label", "regression": "regression"}
    if of_role[architecture] in ("classification", *kinds.values()):
        return kinds.get(content.get("problem_type", ""), "classification")
    return of_role[architecture]


def _task(folder: Path, kind: str) -> TaskConfig:
    """Return a task of this kind with what the folder says of sequences and answers."""
    content = read_json(folder / "config.json")
    positions = model_config_from_hf({**content}).max_position_embeddings
    path = folder / "tokenizer_config.json"
    told = read_json(path).get("model_max_length") if path.is_file() else None
    known = told if isinstance(told, int) and 8 <= told <= 1 << 20 else _NUM_TOKENS_AT_MOST
    settings = {"name": "predict", "kind": kind, "data": {}, "max_seq_length": max(8, min(known, positions))}
    if kind == "question_answering":
        settings["question_answering"] = content.get("question_answering") or {}
    try:
        return TaskConfig.model_validate_json(json.dumps(settings))
    except ValidationError as error:
        problems = "; ".join(f"{one.path}: {one.text}" for one in section_problems(error, TaskConfig))
        raise ConfigError(f"{folder}/config.json: {problems}") from None


def _texts(row: Any, kind: str) -> tuple[tuple[str, ...], Sequence[Word]]:
    """Return what `Example.texts` holds of a row of a kind, and of a tagging its words with their places."""
    fields = _fields(row, kind)
    names = ASKED.get(kind, ("text",))
    for name in names:
        if name not in fields and not (name == "text" and "words" in fields):
            raise DataError(f"the row has no {name}, it has {', '.join(map(describe, fields)) or 'nothing'}")
    choices = fields.pop("choices", None)
    given = fields.pop("words", None)
    for name, value in fields.items():
        if not isinstance(value, str):
            raise DataError(f"{name} is {describe(value)}, wanted text")
        if not value.strip() and (name in names or name == "text_pair"):
            raise DataError(f"{name} is empty")
    if kind in ("token_classification", "intent_slot"):
        words = joined_words(given) if given is not None else split_words(fields["text"])
        if not words:
            raise DataError("the row holds no words")
        return tuple(word.text for word in words), words
    if kind == "multiple_choice":
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) for one in choices):
            raise DataError(f"choices is {describe(choices)}, wanted a list of at least two texts")
        return (fields["text"], fields.get("text_pair", ""), *choices), ()
    if kind == "question_answering":
        return (fields["question"], fields["context"]), ()
    texts = [fields[name] for name in ("text", "text_pair") if name in fields]
    return tuple(texts[:1] if kind == "sentence_embedding" else texts), ()


def _fields(row: Any, kind: str) -> dict[str, Any]:
    """Return a row as an object of the fields that its kind has a use for."""
    if isinstance(row, str):
        return {"text": row}
    if isinstance(row, Mapping):
        known = ("text", "text_pair", "question", "context", "choices", "words")
        return {name: row[name] for name in known if name in row}
    if isinstance(row, Sequence) and len(row) == 2:
        names = ASKED.get(kind, ("text", "text_pair"))
        return dict(zip(names, row, strict=True))
    raise DataError(f"found {type(row).__name__}, wanted a text, two texts or an object of fields")


def _chosen(name: str, labels: Sequence[str], scores: Sequence[float]) -> dict[str, Any]:
    shares = np.exp(np.array(scores, dtype=np.float64) - np.max(scores))
    shares /= shares.sum()
    best = int(np.argmax(shares))
    probabilities = _named(labels, shares)
    return {name: labels[best], "probability": round(float(shares[best]), 6), "probabilities": probabilities}


def _named(labels: Sequence[str], shares: np.ndarray) -> dict[str, float]:
    return {label: round(float(share), 6) for label, share in zip(labels, shares, strict=True)}


def _span(found: Prediction, context: str) -> dict[str, Any]:
    """Return the best answer with its place in the context; none where the folder's rules say that there is none."""
    no_answer = float(found.scores["no_answer"])
    told = round(no_answer, 6) if math.isfinite(no_answer) else None
    if not found.value or not found.scores["answers"]:
        return {"answer": "", "start": None, "end": None, "score": None, "no_answer": told}
    best = found.scores["answers"][0]
    end = best["start"] + len(best["text"])
    place = {"answer": context[best["start"] : end], "start": best["start"], "end": end}
    return {**place, "score": round(float(best["score"]), 6), "no_answer": told}


def _spans(tags: Sequence[str], asked: _Asked) -> list[dict[str, Any]]:
    """Return entities with their places; where tags mark none, every word with its tag."""
    words = asked.words
    if any(tag != "O" and tag[:2] not in ("B-", "I-", "E-", "S-") for tag in tags):
        return [
            {"type": tag, "start": word.start, "end": word.end, "text": word.text}
            for tag, word in zip(tags, words, strict=True)
        ]
    found = []
    for start, stop, kind in entities(tags, "conlleval"):
        first, last = words[start], words[stop - 1]
        text = first.source[first.start : last.end]
        found.append({"type": kind, "start": first.start, "end": last.end, "text": text})
    return found
