"""Tasks about a text or a pair of texts as a whole: one label, any labels, or a number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.downstream.kinds.heads import Objective, SequenceHead
from bert_ds.downstream.kinds.kind import HeadContext, HfForm, Kind, Prediction, count_labelled
from bert_ds.downstream.kinds.trivial import trivial_classes, trivial_scores
from bert_ds.downstream.rows.examples import (
    Example,
    Labels,
    id_of,
    label_id,
    label_of,
    list_of,
    score_of,
    several_labels,
    sorted_labels,
    texts_of,
)
from bert_ds.downstream.rows.features import Feature, FeatureContext, cut_to, encode_text, wrap
from bert_ds.downstream.rows.records import Record
from bert_ds.downstream.rows.tables import predictions_text
from bert_ds.downstream.scores.metrics import class_figures, correlations, multi_label_figures


def pair_text(example: Example) -> str:
    """Return the row as one text, its parts kept apart."""
    return " || ".join(example.texts)


def text_features(
    examples: Sequence[Example],
    context: FeatureContext,
    target_of: Callable[[Example, FeatureContext], np.ndarray],
) -> list[Feature]:
    """Return `[CLS] text [SEP]` or `[CLS] text [SEP] pair [SEP]` of every example, with its target under "label"."""
    features, num_cut = [], 0
    for index, example in enumerate(examples):
        parts = [encode_text(context.tokenizer, text) for text in example.texts]
        parts, is_cut = cut_to(context.tokenizer, parts, context.task.max_seq_length)
        num_cut += is_cut
        targets = {} if example.target is None else {"label": target_of(example, context)}
        features.append(Feature(index, *wrap(context.tokenizer, parts), targets))
    if num_cut:
        context.say(f"{num_cut} of {len(examples)} rows were cut to {context.task.max_seq_length} tokens")
    return features


def index_file(examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, str]:
    """Return predictions as GLUE takes them, see `predictions_text`."""
    rows = [(example.id, _shown(found.value)) for example, found in zip(examples, predictions, strict=True)]
    return {"predictions.tsv": predictions_text(rows)}


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return ",".join(value) if isinstance(value, tuple | list) else str(value)


def _class_example(record: Record, index: int, task: TaskConfig, is_optional: bool) -> Example:
    label = label_of(record, "label", task, is_optional=is_optional)
    return Example(record.where, id_of(record, index, task), texts_of(record, task, is_optional=is_optional), label)


def _class_labels(examples: Sequence[Example], task: TaskConfig) -> Labels:
    found = (example.target for example in examples)
    return {"label": several_labels(found, task.data.labels, role="label", task=task)}


def _class_target(example: Example, context: FeatureContext) -> np.ndarray:
    return np.array([label_id(example.target, context.labels["label"], where=example.where)])


def _class_predictions(
    examples: Sequence[Example], features: Sequence[Feature], summaries: Sequence[Any], labels: Labels
) -> list[Prediction]:
    return [Prediction(labels["label"][int(np.argmax(scores))], scores) for scores in summaries]


def _class_measure(examples: Sequence[Example], predictions: Sequence[Prediction], labels: Labels) -> dict[str, float]:
    pairs = _class_pairs(examples, predictions)
    return class_figures([gold for gold, _ in pairs], [found for _, found in pairs], labels["label"])


def _class_pairs(examples: Sequence[Example], predictions: Sequence[Prediction]) -> list[tuple[str, str]]:
    return [(example.target, found.value) for example, found in zip(examples, predictions, strict=True)]


def _multi_example(record: Record, index: int, task: TaskConfig, is_optional: bool) -> Example:
    column = task.data.fields.get("labels", "labels")
    value = record.values.get(column) if isinstance(column, str) else None
    if isinstance(value, list):
        names: tuple[str, ...] | None = list_of(record, "labels", task) if value else ()
    else:
        text = label_of(record, "labels", task, is_optional=is_optional)
        names = None if text is None else tuple(name.strip() for name in text.split(task.data.label_separator))
    renamed = None if names is None else tuple(task.data.rename_labels.get(name, name) for name in names)
    return Example(record.where, id_of(record, index, task), texts_of(record, task, is_optional=is_optional), renamed)


def _multi_labels(examples: Sequence[Example], task: TaskConfig) -> Labels:
    return {"label": sorted_labels((name for example in examples for name in example.target), task.data.labels)}


def _multi_target(example: Example, context: FeatureContext) -> np.ndarray:
    target = np.zeros((1, len(context.labels["label"])), dtype=np.float32)
    for name in example.target:
        target[0, label_id(name, context.labels["label"], where=example.where)] = 1.0
    return target


def _multi_predictions(
    examples: Sequence[Example], features: Sequence[Feature], summaries: Sequence[Any], labels: Labels
) -> list[Prediction]:
    names = labels["label"]
    return [
        Prediction(tuple(name for name, score in zip(names, scores, strict=True) if score > 0.0), scores)
        for scores in summaries
    ]


def _multi_measure(examples: Sequence[Example], predictions: Sequence[Prediction], labels: Labels) -> dict[str, float]:
    gold, found = (
        np.array([[name in row for name in labels["label"]] for row in rows], dtype=np.int64)
        for rows in ([example.target for example in examples], [found.value for found in predictions])
    )
    return multi_label_figures(gold, found)


def _score_example(record: Record, index: int, task: TaskConfig, is_optional: bool) -> Example:
    score = score_of(record, "score", task, is_optional=is_optional)
    return Example(record.where, id_of(record, index, task), texts_of(record, task, is_optional=is_optional), score)


def _score_target(example: Example, context: FeatureContext) -> np.ndarray:
    return np.array([[example.target]], dtype=np.float32)


def _score_predictions(
    examples: Sequence[Example], features: Sequence[Feature], summaries: Sequence[Any], labels: Labels
) -> list[Prediction]:
    return [Prediction(scores[0], scores) for scores in summaries]


def _score_measure(examples: Sequence[Example], predictions: Sequence[Prediction], labels: Labels) -> dict[str, float]:
    return correlations([example.target for example in examples], [found.value for found in predictions])


def _count(features: Sequence[Feature]) -> dict[str, float]:
    return count_labelled(features, "label")


def _summarise(feature: Feature, scores: dict[str, np.ndarray]) -> list[float]:
    return scores["scores"][0].tolist()


def _head(context: HeadContext, *, objective: Objective) -> nn.Module:
    num_labels = 1 if objective == "number" else len(context.labels["label"])
    return SequenceHead(
        context.config, num_labels, objective=objective, ops=context.ops, class_weights=context.class_weights
    )


_FORM = HfForm(
    "sequence classification",
    classifier="head.classifier",
    facts={"problem_type": "single_label_classification"},
    pipeline="text-classification",
)
CLASSIFICATION = Kind(
    make_example=_class_example,
    row_text=pair_text,
    make_labels=_class_labels,
    make_features=partial(text_features, target_of=_class_target),
    make_head=partial(_head, objective="one_of"),
    count_targets=_count,
    summarise=_summarise,
    predict=_class_predictions,
    measure=_class_measure,
    prediction_files=index_file,
    hf_forms=(_FORM,),
    class_pairs=_class_pairs,
    trivial=trivial_classes,
)
MULTI_LABEL = CLASSIFICATION._replace(
    make_example=_multi_example,
    make_labels=_multi_labels,
    make_features=partial(text_features, target_of=_multi_target),
    make_head=partial(_head, objective="any_of"),
    predict=_multi_predictions,
    measure=_multi_measure,
    hf_forms=(_FORM._replace(facts={"problem_type": "multi_label_classification"}),),
    class_pairs=None,
    trivial=None,
)
REGRESSION = CLASSIFICATION._replace(
    make_example=_score_example,
    make_labels=lambda examples, task: {},
    make_features=partial(text_features, target_of=_score_target),
    make_head=partial(_head, objective="number"),
    predict=_score_predictions,
    measure=_score_measure,
    hf_forms=(_FORM._replace(facts={"problem_type": "regression"}, labels_name=None),),
    class_pairs=None,
    trivial=trivial_scores,
)
