"""Tasks that give every word a tag: entities, parts of speech, and the slots of an utterance with its intent.

The first piece of a word carries its tag. Every word is read as one with a space in front. A sentence that is too long
becomes several sequences of whole words, so that every word is predicted. A word that has no piece (only control or
replacement characters) is read as [UNK].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer
from bert_ds.downstream.kinds.heads import IntentSlotHead, TokenHead
from bert_ds.downstream.kinds.kind import HeadContext, HfForm, Kind, Prediction, count_labelled
from bert_ds.downstream.kinds.trivial import trivial_tags
from bert_ds.downstream.rows.examples import (
    Example,
    Labels,
    Say,
    id_of,
    label_id,
    label_of,
    list_of,
    several_labels,
    sorted_labels,
)
from bert_ds.downstream.rows.features import Feature, FeatureContext, encode_part, wrap
from bert_ds.downstream.rows.records import Record
from bert_ds.downstream.rows.tables import cell, predictions_text, table_text
from bert_ds.downstream.rows.tag_schemes import to_bio
from bert_ds.downstream.scores.entity_scores import tag_figures


def _tag_example(record: Record, index: int, task: TaskConfig, is_optional: bool) -> Example:
    words, tags = _words_and_tags(record, task, is_optional=is_optional)
    return Example(record.where, id_of(record, index, task), words, tags)


def _slot_example(record: Record, index: int, task: TaskConfig, is_optional: bool) -> Example:
    words, tags = _words_and_tags(record, task, is_optional=is_optional)
    intent = label_of(record, "intent", task, is_optional=is_optional)
    target = None if tags is None or intent is None else (intent, tags)
    return Example(record.where, id_of(record, index, task), words, target)


def _words_and_tags(
    record: Record, task: TaskConfig, *, is_optional: bool
) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    words = list_of(record, "words", task)
    try:
        tags = list_of(record, "tags", task)
    except DataError:
        if is_optional:
            return words, None
        raise
    if len(tags) != len(words):
        raise DataError(f"{record.where}: found {len(tags)} tags for {len(words)} words")
    return words, tuple(task.data.rename_labels.get(tag, tag) for tag in tags)


def _mend(examples: Sequence[Example], task: TaskConfig, say: Say) -> list[Example]:
    """Return the examples with their tags in BIO, and say how many tags were wrong at their place."""
    scheme = task.data.tag_scheme
    if scheme == "none":
        return list(examples)
    mended, num_tags, first = [], 0, ""
    for example in examples:
        if example.target is None:
            mended.append(example)
            continue
        intent, tags = example.target if _has_intent(example) else (None, example.target)
        tags, num_wrong = to_bio(tags, scheme, where=example.where)
        num_tags += num_wrong
        first = first or (example.where if num_wrong else "")
        mended.append(example._replace(target=tags if intent is None else (intent, tags)))
    if num_tags:
        say(f"{num_tags} tags were not allowed at their place in {scheme} and were mended, the first in {first}")
    return mended


def _has_intent(example: Example) -> bool:
    return len(example.target) == 2 and isinstance(example.target[1], tuple)


def _tag_labels(examples: Sequence[Example], task: TaskConfig) -> Labels:
    return {"tag": _tags([example.target for example in examples], task)}


def _slot_labels(examples: Sequence[Example], task: TaskConfig) -> Labels:
    intents = several_labels((example.target[0] for example in examples), (), role="intent", task=task)
    return {"intent": intents, "tag": _tags([example.target[1] for example in examples], task)}


def _tags(rows: Sequence[Sequence[str]], task: TaskConfig) -> tuple[str, ...]:
    found = {tag for tags in rows for tag in tags}
    if task.data.tag_scheme != "none":
        # An I- of a type that training has only one word of is a label all the same.
        found |= {f"{prefix}-{tag[2:]}" for tag in found if tag != "O" for prefix in "BI"} | {"O"}
    return sorted_labels(found, task.data.labels)


def _features(examples: Sequence[Example], context: FeatureContext, *, with_intent: bool) -> list[Feature]:
    features: list[Feature] = []
    num_bare = num_split = 0
    for index, example in enumerate(examples):
        pieces = [encode_part(context.tokenizer, word) for word in example.texts]
        num_bare += sum(not len(piece) for piece in pieces)
        room = context.task.max_seq_length - 2
        groups = list(_groups([_pieces(piece, context.tokenizer)[:room] for piece in pieces], room))
        num_split += len(groups) > 1
        first_word = 0
        for group in groups:
            ids, types = wrap(context.tokenizer, [np.concatenate(group)])
            positions = np.cumsum([1, *(len(piece) for piece in group[:-1])])
            targets = {}
            if example.target is not None:
                targets = _targets(example, context, (len(ids), positions, first_word), with_intent=with_intent)
            features.append(Feature(index, ids, types, targets, positions))
            first_word += len(group)
    if num_bare:
        context.say(f"{num_bare} words consist of characters that the tokenizer drops and are read as [UNK]")
    if num_split:
        context.say(f"{num_split} of {len(examples)} sentences are longer than {context.task.max_seq_length} tokens")
    return features


def _pieces(pieces: np.ndarray, tokenizer: TextTokenizer) -> np.ndarray:
    return pieces if len(pieces) else np.array([tokenizer.special_ids.unk], dtype=np.int32)


def _groups(words: Sequence[np.ndarray], room: int) -> Iterator[list[np.ndarray]]:
    """Cut a sentence into runs of whole words that fit."""
    group: list[np.ndarray] = []
    length = 0
    for word in words:
        if group and length + len(word) > room:
            yield group
            group, length = [], 0
        group.append(word)
        length += len(word)
    yield group


def _targets(
    example: Example, context: FeatureContext, place: tuple[int, np.ndarray, int], *, with_intent: bool
) -> dict[str, np.ndarray]:
    """Return the tag of every first piece, and the intent with the first sequence of a sentence."""
    length, positions, first_word = place
    intent, tags = example.target if with_intent else (None, example.target)
    target = np.full(length, IGNORE_INDEX)
    for position, tag in zip(positions, tags[first_word:], strict=False):
        target[position] = label_id(tag, context.labels["tag"], where=example.where)
    if not with_intent:
        return {"tag": target}
    intent_id = label_id(str(intent), context.labels["intent"], where=example.where) if not first_word else IGNORE_INDEX
    return {"intent": np.array([intent_id]), "tag": target}


def _summarise(feature: Feature, scores: dict[str, np.ndarray]) -> list[int]:
    return scores["token_scores"][feature.facts].argmax(axis=1).tolist()


def _slot_summarise(feature: Feature, scores: dict[str, np.ndarray]) -> dict[str, Any]:
    return {"intent": scores["scores"][0].tolist(), "tags": _summarise(feature, scores)}


def _predict(
    examples: Sequence[Example], features: Sequence[Feature], summaries: Sequence[Any], labels: Labels
) -> list[Prediction]:
    rows: list[list[str]] = [[] for _ in examples]
    for feature, ids in zip(features, summaries, strict=True):
        rows[feature.example] += [labels["tag"][index] for index in ids]
    return [Prediction(tuple(row)) for row in rows]


def _slot_predict(
    examples: Sequence[Example], features: Sequence[Feature], summaries: Sequence[Any], labels: Labels
) -> list[Prediction]:
    tags = _predict(examples, features, [summary["tags"] for summary in summaries], labels)
    first: dict[int, list[float]] = {}
    for feature, summary in zip(features, summaries, strict=True):
        first.setdefault(feature.example, summary["intent"])
    return [
        Prediction((labels["intent"][int(np.argmax(first[index]))], found.value), first[index])
        for index, found in enumerate(tags)
    ]


def _measure(examples: Sequence[Example], predictions: Sequence[Prediction], labels: Labels) -> dict[str, float]:
    gold, found = [example.target for example in examples], [prediction.value for prediction in predictions]
    return tag_figures(gold, found, labels["tag"])


def _slot_measure(examples: Sequence[Example], predictions: Sequence[Prediction], labels: Labels) -> dict[str, float]:
    gold, found = [example.target for example in examples], [prediction.value for prediction in predictions]
    tags = tag_figures([tags for _, tags in gold], [tags for _, tags in found], labels["tag"])
    pairs = list(zip(gold, found, strict=True))
    return {
        "exact": sum(wanted == given for wanted, given in pairs) / len(pairs),
        "intent_accuracy": sum(wanted[0] == given[0] for wanted, given in pairs) / len(pairs),
        **tags,
    }


def _conll(examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, str]:
    """Return word, tag and predicted tag in columns, as conlleval takes them; no tag where a row has none."""
    blocks = []
    for example, found in zip(examples, predictions, strict=True):
        columns = [example.texts, *([] if example.target is None else [example.target]), found.value]
        blocks.append(table_text(tuple(map(cell, row)) for row in zip(*columns, strict=True)))
    return {"predictions.conll": "\n".join(blocks)}


def _slot_files(examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, str]:
    tags = [found._replace(value=found.value[1]) for found in predictions]
    bare = [row if row.target is None else row._replace(target=row.target[1]) for row in examples]
    intents = [(row.id, found.value[0]) for row, found in zip(examples, predictions, strict=True)]
    return {**_conll(bare, tags), "intents.tsv": predictions_text(intents)}


def _pairs(examples: Sequence[Example], predictions: Sequence[Prediction]) -> list[tuple[str, str]]:
    rows = zip(examples, predictions, strict=True)
    return [pair for example, found in rows for pair in zip(example.target, found.value, strict=True)]


def _slot_pairs(examples: Sequence[Example], predictions: Sequence[Prediction]) -> list[tuple[str, str]]:
    return [(example.target[0], found.value[0]) for example, found in zip(examples, predictions, strict=True)]


def _head(context: HeadContext) -> nn.Module:
    num_tags = len(context.labels["tag"])
    return TokenHead(context.config, num_tags, ops=context.ops, class_weights=context.class_weights)


def _slot_head(context: HeadContext) -> nn.Module:
    labels = context.labels
    sizes = {"num_intents": len(labels["intent"]), "num_tags": len(labels["tag"])}
    return IntentSlotHead(context.config, **sizes, ops=context.ops)


def _form(part: str, *, labels_name: str) -> HfForm:
    name = f"head.{part}"
    if labels_name == "intent":
        facts = {"problem_type": "single_label_classification"}
        form = HfForm("sequence classification", name, labels_name, facts)
        return form._replace(folder="intent", pipeline="text-classification")
    form = HfForm("token tags", name, labels_name)
    return form._replace(scores="token_scores", pipeline="token-classification")


TOKEN_CLASSIFICATION = Kind(
    make_example=_tag_example,
    row_text=lambda example: " ".join(example.texts),
    make_labels=_tag_labels,
    make_features=partial(_features, with_intent=False),
    make_head=_head,
    count_targets=lambda features: count_labelled(features, "tag"),
    summarise=_summarise,
    predict=_predict,
    measure=_measure,
    prediction_files=_conll,
    hf_forms=(_form("classifier", labels_name="tag"),),
    class_pairs=_pairs,
    mend=_mend,
    trivial=trivial_tags,
)
INTENT_SLOT = TOKEN_CLASSIFICATION._replace(
    make_example=_slot_example,
    make_labels=_slot_labels,
    make_features=partial(_features, with_intent=True),
    make_head=_slot_head,
    count_targets=lambda features: count_labelled(features, "intent", "tag"),
    summarise=_slot_summarise,
    predict=_slot_predict,
    measure=_slot_measure,
    prediction_files=_slot_files,
    hf_forms=(
        _form("intent_classifier", labels_name="intent"),
        _form("tag_classifier", labels_name="tag")._replace(folder="tags"),
    ),
    class_pairs=_slot_pairs,
    trivial=None,
)
