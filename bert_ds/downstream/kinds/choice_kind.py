"""Multiple choice: which of several continuations or answers fits a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.reading.config_problems import describe
from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.downstream.kinds.heads import ChoiceHead
from bert_ds.downstream.kinds.kind import HeadContext, HfForm, Kind, Prediction, count_labelled
from bert_ds.downstream.kinds.text_kinds import index_file
from bert_ds.downstream.kinds.trivial import trivial_choices
from bert_ds.downstream.rows.examples import Example, Labels, id_of, label_of, list_of, texts_of
from bert_ds.downstream.rows.features import Feature, FeatureContext, cut_to, encode_text, wrap
from bert_ds.downstream.rows.records import Record, pick


def _example(record: Record, index: int, task: TaskConfig, is_optional: bool) -> Example:
    """Return texts (text, question or "", choice, choice, ...) and the number of the right choice."""
    texts = texts_of(record, task, is_optional=is_optional)
    choices = _choices(record, task)
    label = label_of(record, "label", task, is_optional=is_optional)
    target = None if label is None else _choice_number(label, choices, where=record.where)
    return Example(record.where, id_of(record, index, task), (*texts, *([""] * (2 - len(texts))), *choices), target)


def _choices(record: Record, task: TaskConfig) -> tuple[str, ...]:
    """Return the choices of a row: a column that holds a list, or one column for each."""
    columns = task.data.fields.get("choices", "choices")
    if not isinstance(columns, tuple):
        choices = list_of(record, "choices", task)
    else:
        choices = tuple(str(pick(record, column)).strip() for column in columns)
        if not all(choices):
            raise DataError(f"{record.where}: choice {choices.index('')} is empty, wanted text")
    if len(choices) < 2:
        raise DataError(f"{record.where}: found {len(choices)} choice, wanted at least 2")
    return choices


def _choice_number(label: str, choices: Sequence[str], *, where: str) -> int:
    """Return the number of a choice named by number from 0, by letter, or by its text."""
    if label in choices:
        return list(choices).index(label)
    number = "ABCDEFGHIJKLMNOPQRSTUVWXYZ".find(label.upper()) if len(label) == 1 else -1
    if re.fullmatch("[0-9]{1,9}", label):  # not what `str.isdecimal` takes, which has no limit
        number = int(label)
    if not 0 <= number < len(choices):
        raise DataError(f"{where}: label is {describe(label)}, wanted 0 to {len(choices) - 1}, a letter or a choice")
    return number


def _features(examples: Sequence[Example], context: FeatureContext) -> list[Feature]:
    """Return `[CLS] text [SEP] question choice [SEP]` of all choices of a row, end to end."""
    features, num_cut = [], 0
    for index, example in enumerate(examples):
        text, question, *choices = example.texts
        wrapped = []
        for choice in choices:
            parts = [encode_text(context.tokenizer, part) for part in (text, f"{question} {choice}".strip())]
            parts, is_cut = cut_to(context.tokenizer, parts, context.task.max_seq_length)
            num_cut += is_cut
            wrapped.append(wrap(context.tokenizer, parts))
        ids, types = (np.concatenate(arrays) for arrays in zip(*wrapped, strict=True))
        targets = {}
        if example.target is not None:
            targets = {"choice": np.array([example.target]), "num_choices": np.array([len(choices)])}
        features.append(Feature(index, ids, types, targets, lengths=tuple(len(one) for one, _ in wrapped)))
    if num_cut:
        context.say(f"{num_cut} sequences were cut to {context.task.max_seq_length} tokens")
    return features


def _predict(
    examples: Sequence[Example], features: Sequence[Feature], summaries: Sequence[Any], labels: Labels
) -> list[Prediction]:
    return [Prediction(int(np.argmax(scores)), scores) for scores in summaries]


def _measure(examples: Sequence[Example], predictions: Sequence[Prediction], labels: Labels) -> dict[str, float]:
    right = [example.target == found.value for example, found in zip(examples, predictions, strict=True)]
    return {"accuracy": sum(right) / len(right)}


def _head(context: HeadContext) -> nn.Module:
    return ChoiceHead(context.config, ops=context.ops)


MULTIPLE_CHOICE = Kind(
    make_example=_example,
    row_text=lambda example: " || ".join(example.texts),
    make_labels=lambda examples, task: {},
    make_features=_features,
    make_head=_head,
    count_targets=lambda features: count_labelled(features, "choice"),
    summarise=lambda feature, scores: scores["scores"].tolist(),
    predict=_predict,
    measure=_measure,
    prediction_files=index_file,
    trivial=trivial_choices,
    hf_forms=(
        HfForm(
            "multiple choice",
            classifier="head.classifier",
            labels_name=None,
        ),
    ),
)
