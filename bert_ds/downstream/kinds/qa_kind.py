"""Extractive question answering: SQuAD 1.1 and 2.0, CMRC, and files of their form."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.configuration.task.task_sections import QuestionAnsweringConfig
from bert_ds.corpus.tokenizer.text_tokenizer import EncodedText
from bert_ds.downstream.kinds.kind import HeadContext, HfForm, Kind, Prediction
from bert_ds.downstream.kinds.span_head import SpanHead
from bert_ds.downstream.kinds.trivial import trivial_answers
from bert_ds.downstream.rows.answer_windows import (
    Candidate,
    Window,
    answer_characters,
    answer_pieces,
    best_candidates,
    cut_windows,
    merge_candidates,
    target_tokens,
)
from bert_ds.downstream.rows.examples import Example, Labels
from bert_ds.downstream.rows.features import Feature, FeatureContext, encode_text
from bert_ds.downstream.rows.records import Record
from bert_ds.downstream.rows.squad_files import Answer, align_answers
from bert_ds.downstream.scores.qa_scores import answer_scores

_SHOWN = 3


class Gold(NamedTuple):
    """What counts as right."""

    answers: tuple[Answer, ...]
    """None for an impossible question; those with start -1 are no part of the context."""
    num_moved: int
    num_absent: int
    settings: QuestionAnsweringConfig


class WindowFacts(NamedTuple):
    """What reading the scores of a window back needs; text and pieces are shared by the windows of a context."""

    window: Window
    text: str
    context: EncodedText
    settings: QuestionAnsweringConfig


def _make_example(record: Record, index: int, task: TaskConfig, is_optional: bool) -> Example:
    values, settings = record.values, task.answering
    context = values["context"]
    given = [Answer(answer["text"], answer["answer_start"]) for answer in values["answers"]]
    texts = (values["question"], context)
    if not given and settings.rules != "squad2":
        if is_optional:
            return Example(record.where, values["id"], texts, None)
        raise DataError(
            f"{record.where}: the question has no answer, which only question_answering.rules squad2 allows; "
            f"found {settings.rules}"
        )
    return Example(record.where, values["id"], texts, Gold(*align_answers(context, given), settings))


def _make_features(examples: Sequence[Example], context: FeatureContext) -> list[Feature]:
    """Return the windows of every question; the target is where its first answer stands, or [CLS]."""
    tokenizer, task = context.tokenizer, context.task
    encoded: dict[str, EncodedText] = {}
    features = []
    for index, example in enumerate(examples):
        question, text = example.texts
        if text not in encoded:
            encoded[text] = tokenizer.encode_with_offsets(text)
        try:
            windows = cut_windows(
                encode_text(tokenizer, question),
                encoded[text].ids,
                tokenizer=tokenizer,
                max_seq_length=task.max_seq_length,
                stride=task.answering.stride,
            )
        except ValueError as error:
            raise DataError(f"{example.where}: {error}") from None
        for window in windows:
            facts = WindowFacts(window, text, encoded[text], task.answering)
            targets = {} if example.target is None else {"span": _target(example.target, facts)}
            features.append(Feature(index, window.input_ids, window.token_type_ids, targets, facts))
    _say_what_is_wrong(examples, context)
    return features


def _target(gold: Gold, facts: WindowFacts) -> np.ndarray:
    """Return int64 [1, 2]; IGNORE_INDEX where no answer is part of the context, [CLS] where the question has none."""
    if not gold.answers:
        return np.zeros((1, 2), dtype=np.int64)
    placed = [answer for answer in gold.answers if answer.start >= 0]
    pieces = [answer_pieces(facts.context, start, start + len(text)) for text, start in placed]
    usable = [one for one in pieces if one is not None]
    if not usable:
        return np.full((1, 2), IGNORE_INDEX, dtype=np.int64)
    return np.array([target_tokens(facts.window, usable[0])], dtype=np.int64)


def _say_what_is_wrong(examples: Sequence[Example], context: FeatureContext) -> None:
    """Tell how many answers were moved or stand nowhere, and name the first of them."""
    golds = [(example.id, example.target) for example in examples if example.target is not None]
    for name, counts in (
        ("answers were moved to where their text stands", [(key, gold.num_moved) for key, gold in golds]),
        ("answers are no part of their context", [(key, gold.num_absent) for key, gold in golds]),
        ("questions are empty", [(example.id, int(not example.texts[0])) for example in examples]),
    ):
        concerned = [key for key, count in counts if count]
        if concerned:
            shown = ", ".join(concerned[:_SHOWN]) + (", ..." if len(concerned) > _SHOWN else "")
            context.say(f"{sum(count for _, count in counts)} {name}: {shown}")


def _count_targets(features: Sequence[Feature]) -> dict[str, float]:
    spans = [feature.targets["span"] for feature in features if "span" in feature.targets]
    return {"span": float(sum(int(span[0, 0] != IGNORE_INDEX) for span in spans))}


def _summarise(feature: Feature, scores: dict[str, np.ndarray]) -> Any:
    """Return the score of no answer and the best candidates as [score, first character, past the last]."""
    facts: WindowFacts = feature.facts
    start_scores, end_scores = scores["token_scores"][:, 0], scores["token_scores"][:, 1]
    found = best_candidates(
        facts.window,
        start_scores,
        end_scores,
        max_answer_pieces=facts.settings.max_answer_pieces,
        num_best=facts.settings.num_best,
    )
    spans = [(score, *answer_characters(facts.text, facts.context, first, last)) for score, first, last in found]
    return [float(start_scores[0] + end_scores[0]), spans]


def _predict(
    examples: Sequence[Example], features: Sequence[Feature], summaries: Sequence[Any], labels: Labels
) -> list[Prediction]:
    """Merge the windows of each question: its best answers, and no answer where even the best is too weak."""
    candidates: dict[int, list[Candidate]] = defaultdict(list)
    null_scores: dict[int, float] = {}
    settings: dict[int, QuestionAnsweringConfig] = {}
    for feature, (null_score, spans) in zip(features, summaries, strict=True):
        candidates[feature.example] += [Candidate(*span) for span in spans]
        null_scores[feature.example] = min(null_score, null_scores.get(feature.example, np.inf))
        settings[feature.example] = feature.facts.settings
    return [
        _prediction(example.texts[1], candidates[index], null_scores[index], settings[index])
        for index, example in enumerate(examples)
    ]


def _prediction(
    text: str, candidates: list[Candidate], null_score: float, settings: QuestionAnsweringConfig
) -> Prediction:
    best = merge_candidates(candidates, settings.num_best)
    answers = [{"text": text[one.start : one.stop], "start": one.start, "score": one.score} for one in best]
    no_answer = null_score - best[0].score if best else np.inf
    scores = {"no_answer": float(no_answer), "answers": answers}
    answer = answers[0]["text"] if answers else ""
    if settings.rules == "squad2" and no_answer > settings.null_threshold:
        answer = ""
    return Prediction(answer, scores)


def _measure(examples: Sequence[Example], predictions: Sequence[Prediction], labels: Labels) -> dict[str, float]:
    """Return the scores of the official script, per cent."""
    settings = examples[0].target.settings
    gold = {example.id: [text for text, _ in example.target.answers] for example in examples}
    pairs = list(zip(examples, predictions, strict=True))
    if settings.rules != "squad2":
        return answer_scores(gold, {example.id: found.value for example, found in pairs}, rules=settings.rules)
    return answer_scores(
        gold,
        {example.id: _best_text(found) for example, found in pairs},
        rules="squad2",
        no_answer_scores={example.id: found.scores["no_answer"] for example, found in pairs},
        threshold=settings.null_threshold,
    )


def _best_text(found: Prediction) -> str:
    answers = found.scores["answers"]
    return answers[0]["text"] if answers else ""


def _prediction_files(examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, str]:
    """Return predictions.json as scored, the best answers of each question, and what evaluate-v2.0.py wants.

    Its best threshold is over raw_predictions.json, which answers every question, with null_odds.json as na_prob_file.
    """
    pairs = list(zip(examples, predictions, strict=True))
    contents: dict[str, dict[str, Any]] = {
        "predictions.json": {example.id: found.value for example, found in pairs},
        "raw_predictions.json": {example.id: _best_text(found) for example, found in pairs},
        "nbest_predictions.json": {example.id: found.scores["answers"] for example, found in pairs},
        "null_odds.json": {example.id: found.scores["no_answer"] for example, found in pairs},
    }
    return {name: json.dumps(content, ensure_ascii=False, indent=1) + "\n" for name, content in contents.items()}


def _head(context: HeadContext) -> nn.Module:
    return SpanHead(context.config, ops=context.ops)


QUESTION_ANSWERING = Kind(
    make_example=_make_example,
    row_text=lambda example: example.texts[1],
    make_labels=lambda examples, task: {},
    make_features=_make_features,
    make_head=_head,
    count_targets=_count_targets,
    summarise=_summarise,
    predict=_predict,
    measure=_measure,
    prediction_files=_prediction_files,
    trivial=trivial_answers,
    hf_forms=(
        HfForm(
            "question answering",
            classifier="head",
            labels_name=None,
            facts={"id2label": {"0": "start", "1": "end"}, "label2id": {"start": 0, "end": 1}},
            scores="token_scores",
        ),
    ),
)
