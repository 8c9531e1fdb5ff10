"""Sentence embeddings, trained and measured on scored pairs; the export is one of sentence-transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.downstream.kinds.embedding_head import EmbeddingHead
from bert_ds.downstream.kinds.kind import HeadContext, HfForm, Kind, Prediction, count_labelled
from bert_ds.downstream.kinds.task_model import role_of
from bert_ds.downstream.kinds.text_kinds import index_file, pair_text
from bert_ds.downstream.kinds.trivial import trivial_scores
from bert_ds.downstream.rows.examples import Example, Labels, id_of, score_of, texts_of
from bert_ds.downstream.rows.features import Feature, FeatureContext, cut_to, encode_text, wrap
from bert_ds.downstream.rows.records import Record
from bert_ds.downstream.scores.metrics import correlations

_POOLING_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def sentence_transformers_files(config: EncoderConfig, max_seq_length: int) -> dict[str, str]:
    """Return what makes a Hugging Face folder one of sentence-transformers: file name -> text.

    These are the names that every release reads; newer ones write other names themselves. The model has no front, so
    transformers is told not to make one up.
    """
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    # text-embeddings-inference wants each mode said.
    modes = {f"pooling_mode_{mode}": mode == "mean_tokens" for mode in _POOLING_MODES}
    contents = {
        "modules.json": modules,
        "sentence_bert_config.json": {
            "max_seq_length": max_seq_length,
            "do_lower_case": False,
            "model_args": dict(role_of(config, "encoder").without_front),
        },
        "1_Pooling/config.json": {"word_embedding_dimension": config.hidden_size, **modes},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
    }
    return {name: json.dumps(content, indent=2) + "\n" for name, content in contents.items()}


def _make_example(record: Record, index: int, task: TaskConfig, is_optional: bool) -> Example:
    score = score_of(record, "score", task, is_optional=is_optional)
    settings = task.embedding
    if score is not None and not 0.0 <= score <= settings.max_score:
        raise DataError(
            f"{record.where}: score is {score}, wanted 0 to {settings.max_score} (sentence_embedding.max_score)"
        )
    texts = texts_of(record, task, is_optional=is_optional)
    return Example(record.where, id_of(record, index, task), texts, score)


def _make_features(examples: Sequence[Example], context: FeatureContext) -> list[Feature]:
    """Return a feature of two sequences for every pair."""
    task = context.task
    features, num_cut = [], 0
    for index, example in enumerate(examples):
        tokenizer, length = context.tokenizer, task.max_seq_length
        sides = [cut_to(tokenizer, [encode_text(tokenizer, text)], length) for text in example.texts]
        num_cut += any(is_cut for _, is_cut in sides)
        (ids, types), (other_ids, other_types) = (wrap(tokenizer, parts) for parts, _ in sides)
        targets = {} if example.target is None else _targets(example.target, task)
        lengths = (len(ids), len(other_ids))
        joined = np.concatenate((ids, other_ids)), np.concatenate((types, other_types))
        features.append(Feature(index, *joined, targets, None, lengths))
    if num_cut:
        context.say(f"{num_cut} of {len(examples)} pairs had a sentence cut to {task.max_seq_length} tokens")
    return features


def _targets(score: float, task: TaskConfig) -> dict[str, np.ndarray]:
    settings = task.embedding
    if settings.loss == "contrastive":
        return {"partner": np.array([0 if score >= settings.positive_score else IGNORE_INDEX])}
    return {"cosine": np.array([score / settings.max_score], dtype=np.float32)}


def _count_targets(features: Sequence[Feature]) -> dict[str, float]:
    return {"pair": sum(count_labelled(features, "cosine", "partner").values())}


def _summarise(feature: Feature, scores: dict[str, np.ndarray]) -> float:
    """Return the cosine of the pair."""
    left, right = scores["vectors"]
    return float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))


def _predict(
    examples: Sequence[Example], features: Sequence[Feature], summaries: Sequence[Any], labels: Labels
) -> list[Prediction]:
    return [Prediction(cosine) for cosine in summaries]


def _measure(examples: Sequence[Example], predictions: Sequence[Prediction], labels: Labels) -> dict[str, float]:
    return correlations([example.target for example in examples], [found.value for found in predictions])


def _head(context: HeadContext) -> nn.Module:
    return EmbeddingHead()


SENTENCE_EMBEDDING = Kind(
    make_example=_make_example,
    row_text=pair_text,
    make_labels=lambda examples, task: {},
    make_features=_make_features,
    make_head=_head,
    count_targets=_count_targets,
    summarise=_summarise,
    predict=_predict,
    measure=_measure,
    prediction_files=index_file,
    trivial=trivial_scores,
    hf_forms=(
        HfForm(
            "encoder",
            labels_name=None,
            scores="vectors",
            extra_files=sentence_transformers_files,
        ),
    ),
)
