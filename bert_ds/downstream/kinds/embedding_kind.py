"""Sentence embeddings, trained and measured on scored pairs, or on texts that have to find their partners.

The export is a folder of sentence-transformers.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.reading.config_problems import describe
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.configuration.task.task_sections import EmbeddingConfig
from bert_ds.downstream.kinds.embedding_head import EmbeddingHead
from bert_ds.downstream.kinds.kind import HeadContext, HfForm, Kind, Prediction, count_labelled
from bert_ds.downstream.kinds.task_model import role_of
from bert_ds.downstream.kinds.text_kinds import index_file, pair_text
from bert_ds.downstream.kinds.trivial import trivial_scores
from bert_ds.downstream.rows.examples import Example, Labels, id_of, score_of, texts_of
from bert_ds.downstream.rows.features import Feature, FeatureContext, cut_to, encode_text, wrap
from bert_ds.downstream.rows.records import Record, pick
from bert_ds.downstream.scores.metrics import correlations
from bert_ds.downstream.scores.ranking import bm25_ranks, cosine_ranks, ranking_figures
from bert_ds.encoder.hf_folder import read_json

_POOLING_FILE, _PROMPTS_FILE = "1_Pooling/config.json", "config_sentence_transformers.json"
_LAYERS_FOLDER = "1_WeightedLayerPooling"
_LAYERS_FILE = f"{_LAYERS_FOLDER}/config.json"
_SETTINGS_FILES = (_POOLING_FILE, _PROMPTS_FILE, _LAYERS_FILE)
_POOLING_NAMES = {"mean": "mean_tokens", "cls": "cls_token", "last_layers": "mean_tokens"}
_POOLING_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def sentence_transformers_files(config: EncoderConfig, max_seq_length: int, settings: Any) -> dict[str, str | bytes]:
    """Return what makes a Hugging Face folder one of sentence-transformers: file name -> content.

    These are the names that every release reads; newer ones write other names themselves. The model has no front, so
    transformers is told not to make one up.
    """
    settings = settings or EmbeddingConfig()
    layers, hidden_layers = settings.pooled_layers, config.num_hidden_layers
    over_layers = settings.pooling == "last_layers"
    parts = {
        "": "Transformer",
        **({_LAYERS_FOLDER: "WeightedLayerPooling"} if over_layers else {}),
        "1_Pooling": "Pooling",
    }
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (path, name) in enumerate(parts.items())
    ]
    # text-embeddings-inference wants each mode said.
    modes = {f"pooling_mode_{mode}": mode == _POOLING_NAMES[settings.pooling] for mode in _POOLING_MODES}
    prompts = {"query": settings.query_prompt, "document": settings.passage_prompt}
    contents: dict[str, Any] = {
        "modules.json": modules,
        "sentence_bert_config.json": {
            "max_seq_length": max_seq_length,
            "do_lower_case": False,
            "model_args": dict(role_of(config, "encoder").without_front),
            **({"config_args": {"output_hidden_states": True}} if over_layers else {}),
        },
        _POOLING_FILE: {"word_embedding_dimension": config.hidden_size, **modes},
        _PROMPTS_FILE: {"similarity_fn_name": "cosine", **({"prompts": prompts} if any(prompts.values()) else {})},
    }
    weights: dict[str, bytes] = {}
    if over_layers:
        facts = {"num_hidden_layers": hidden_layers, "layer_start": hidden_layers + 1 - layers}
        contents[_LAYERS_FILE] = {**facts, "word_embedding_dimension": config.hidden_size}
        weights = {f"{_LAYERS_FOLDER}/model.safetensors": save({"layer_weights": torch.ones(layers)})}
    return {**{name: json.dumps(content, indent=2) + "\n" for name, content in contents.items()}, **weights}


def folder_settings(folder: Path) -> EmbeddingConfig:
    """Return how a folder of sentence-transformers pools, and its prompts; the defaults where it does not say.

    Raises:
        ConfigError: it pools otherwise than this project does.
    """
    told, settings, layers = (read_json(folder / name) if (folder / name).is_file() else {} for name in _SETTINGS_FILES)
    named = told.get("pooling_mode") or ()
    modes = {_POOLING_NAMES.get(mode, mode) for mode in ([named] if isinstance(named, str) else named)}
    modes |= {mode for mode in _POOLING_MODES if told.get(f"pooling_mode_{mode}")}
    if len(modes) > 1 or not modes <= {*_POOLING_NAMES.values()}:
        raise ConfigError(f"{folder / _POOLING_FILE}: pools by {', '.join(sorted(modes))}, wanted one of mean and cls")
    prompts = settings.get("prompts") or {}
    return EmbeddingConfig(
        pooling="last_layers" if layers else "cls" if "cls_token" in modes else "mean",
        pooled_layers=layers["num_hidden_layers"] + 1 - layers["layer_start"] if layers else 1,
        query_prompt=prompts.get("query") or "",
        passage_prompt=prompts.get("document") or "",
    )


def _make_example(record: Record, index: int, task: TaskConfig, is_optional: bool) -> Example:
    """The target is the score, or, of a pair without one, the text that has to be found."""
    texts = texts_of(record, task, is_optional=is_optional)
    if not task.data.gives("score"):
        texts += _negatives(record, task, is_optional=is_optional)
        return Example(record.where, id_of(record, index, task), texts, texts[1] or None)
    score = score_of(record, "score", task, is_optional=is_optional)
    settings = task.embedding
    if score is not None and not 0.0 <= score <= settings.max_score:
        raise DataError(
            f"{record.where}: score is {score}, wanted 0 to {settings.max_score} (sentence_embedding.max_score)"
        )
    return Example(record.where, id_of(record, index, task), texts, score)


def _negatives(record: Record, task: TaskConfig, *, is_optional: bool) -> tuple[str, ...]:
    columns = task.data.fields.get("negatives", ())
    try:
        found = [pick(record, column) for column in (columns if isinstance(columns, tuple) else (columns,))]
    except DataError:
        if is_optional:
            return ()
        raise
    texts = [text for one in found for text in (one if isinstance(one, list) else [one])]
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{record.where}: one of the negatives is {describe(text)}, wanted text")
    return tuple(text.strip() for text in texts)


def _make_features(examples: Sequence[Example], context: FeatureContext) -> list[Feature]:
    """Return a feature for every row, of a sequence for each of its texts."""
    task, tokenizer = context.task, context.tokenizer
    features, num_cut, settings = [], 0, task.embedding
    for index, example in enumerate(examples):
        if len(example.texts) != len(examples[0].texts):
            found, wanted = (len(one.texts) - 2 for one in (example, examples[0]))
            raise DataError(f"{example.where}: {found} negatives, wanted {wanted} as in the first row")
        prompts = (settings.query_prompt, *[settings.passage_prompt] * (len(example.texts) - 1))
        parts = [encode_text(tokenizer, prompt + text) for prompt, text in zip(prompts, example.texts, strict=True)]
        sides = [cut_to(tokenizer, [part], task.max_seq_length) for part in parts]
        num_cut += any(is_cut for _, is_cut in sides)
        wrapped = [wrap(tokenizer, cut) for cut, _ in sides]
        ids, types = (np.concatenate(arrays) for arrays in zip(*wrapped, strict=True))
        lengths = tuple(len(one) for one, _ in wrapped)
        features.append(Feature(index, ids, types, _targets(example, task), None, lengths))
    if num_cut:
        context.say(f"{num_cut} of {len(examples)} rows had a text cut to {task.max_seq_length} tokens")
    return features


def _targets(example: Example, task: TaskConfig) -> dict[str, np.ndarray]:
    settings, target = task.embedding, example.target
    if target is None:
        return {}
    if settings.loss != "contrastive":
        return {"cosine": np.array([target / settings.max_score], dtype=np.float32)}
    is_partner = isinstance(target, str) or target >= settings.positive_score
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in example.texts]
    texts = np.frombuffer(b"".join(digests), dtype=np.int64)[None]
    return {"partner": np.array([0 if is_partner else IGNORE_INDEX]), "texts": texts}


def _count_targets(features: Sequence[Feature]) -> dict[str, float]:
    return {"pair": sum(count_labelled(features, "cosine", "partner").values())}


def _summarise(feature: Feature, scores: dict[str, np.ndarray]) -> str:
    """Return the vectors, fp32 [K, D], as text of base64."""
    return base64.b64encode(scores["vectors"].astype("<f4").tobytes()).decode()


def _predict(
    examples: Sequence[Example], features: Sequence[Feature], summaries: Sequence[Any], labels: Labels
) -> list[Prediction]:
    """Return the cosine of each pair; of rows without scores the place of the partner among the texts of the side."""
    vectors = [
        np.frombuffer(base64.b64decode(text), dtype="<f4").reshape(len(example.texts), -1)
        for example, text in zip(examples, summaries, strict=True)
    ]
    if not any(isinstance(example.target, str) for example in examples):
        pairs = ((left, right) for left, right, *_ in vectors)
        return [Prediction(float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))) for left, right in pairs]
    passages, wanted = _to_find(examples)
    rows = zip(examples, vectors, strict=True)
    of_text = {text: vector for example, own in rows for text, vector in zip(example.texts[1:], own[1:], strict=True)}
    passages_PD = np.stack([of_text[text] for text in passages])
    return [Prediction(places) for places in cosine_ranks(np.stack([rows[0] for rows in vectors]), passages_PD, wanted)]


def _to_find(examples: Sequence[Example]) -> tuple[list[str], list[list[int]]]:
    """Return all texts that are searched, and of each row the places of those that belong to its own text."""
    searched = dict.fromkeys(text for example in examples for text in example.texts[1:] if text)
    places = {text: place for place, text in enumerate(searched)}
    partners: dict[str, dict[int, None]] = defaultdict(dict)
    for example in examples:
        if example.target is not None:
            partners[example.texts[0]][places[example.texts[1]]] = None
    return list(places), [list(partners[example.texts[0]]) for example in examples]


def _prediction_files(examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, str]:
    """Return cosines, or the places of what had to be found, in the form of `index_file`."""
    shown = [one if isinstance(one.value, float) else Prediction(tuple(map(str, one.value))) for one in predictions]
    return index_file(examples, shown)


def _measure(examples: Sequence[Example], predictions: Sequence[Prediction], labels: Labels) -> dict[str, float]:
    if isinstance(examples[0].target, str):
        return ranking_figures([found.value for found in predictions])
    return correlations([example.target for example in examples], [found.value for found in predictions])


def _trivial(train: Sequence[Example], rows: Sequence[Example], labels: Labels) -> list[Any]:
    """Return what BM25 finds, or, of pairs with a score, the trivial scores."""
    if not isinstance(rows[0].target, str):
        return trivial_scores(train, rows, labels)
    return [*bm25_ranks([row.texts[0] for row in rows], *_to_find(rows))]


def _head(context: HeadContext) -> nn.Module:
    return EmbeddingHead(context.settings or EmbeddingConfig())


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
    prediction_files=_prediction_files,
    trivial=_trivial,
    folder_settings=folder_settings,
    hf_forms=(
        HfForm(
            "encoder",
            labels_name=None,
            scores="vectors",
            extra_files=sentence_transformers_files,
        ),
    ),
)
