"""What computes the scores of features without a launch: our model of a folder, or onnxruntime on its ONNX file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.kinds.task_model import TaskModel
from bert_ds.downstream.rows.examples import Labels
from bert_ds.downstream.rows.features import Feature
from bert_ds.downstream.rows.task_batch import pack, scores_of_features
from bert_ds.downstream.tuning.task_folder import folder_labels, read_task_folder
from bert_ds.encoder.hf_folder import read_json
from bert_ds.encoder.hf_onnx import ONNX_FILE


class Scorer(Protocol):
    """Scores by the names that the head of a kind gives them."""

    labels: Labels

    def __call__(self, features: Sequence[Feature]) -> list[dict[str, np.ndarray]]:
        """Return the scores of each feature: per sequence, or per token where the name says so."""
        ...


def make_scorer(folder: Path, kind: str) -> Scorer:
    """Return what computes for a folder: its ONNX file where it holds one and no weights.

    Raises:
        ConfigError, CheckpointError, DataError: the folder cannot be read, or onnxruntime is missing.
    """
    has_weights = any(folder.glob("**/*.safetensors")) or any(folder.glob("**/pytorch_model*.bin"))
    if (folder / ONNX_FILE).is_file() and not has_weights:
        return _OnnxScorer(folder, kind)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TorchScorer(*read_task_folder(folder, KINDS[kind], kernels="auto"), device=device)


def scores_by_length(
    scorer: Scorer, features: Sequence[Feature], *, batch_size: int
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yield the place and the scores of each feature; those of like length are computed together."""
    places = sorted(range(len(features)), key=lambda place: -len(features[place].input_ids))
    for first in range(0, len(places), batch_size):
        group = places[first : first + batch_size]
        yield from zip(group, scorer([features[place] for place in group]), strict=True)


class TorchScorer:
    """Scores of a model of ours, in evaluation mode, on a device."""

    def __init__(self, model: TaskModel, labels: Labels, *, device: str) -> None:
        self._model, self.labels, self._device = model.to(device), labels, device

    @torch.inference_mode()
    def __call__(self, features: Sequence[Feature]) -> list[dict[str, np.ndarray]]:
        batch = pack(features, counts={})
        *_, scores = self._model(**batch.to(self._device).model_inputs(), dropout_seed=None, with_scores=True)
        found: list[Any] = [None] * len(features)
        for place, arrays in zip(batch.places, scores_of_features(batch, scores), strict=True):
            found[place] = arrays
        return found


class _OnnxScorer:
    def __init__(self, folder: Path, kind: str) -> None:
        self._settings = KINDS[kind].folder_settings(folder)
        if kind == "sentence_embedding" and self._settings.pooling == "last_layers":
            raise ConfigError(
                f"{folder / ONNX_FILE} gives the last layer, its vectors are of several: wanted the weights"
            )
        try:
            import onnxruntime
        except ImportError:
            raise ConfigError(f"{folder / ONNX_FILE} needs the package onnxruntime: pip install onnxruntime") from None
        try:
            self._session = onnxruntime.InferenceSession(str(folder / ONNX_FILE), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes, of many names
            raise CheckpointError(f"{folder / ONNX_FILE} cannot be loaded: {str(error)[:200]}") from None
        self._inputs = {one.name for one in self._session.get_inputs()}
        self._kind, content = kind, read_json(folder / "config.json")
        (form,) = KINDS[kind].hf_forms
        self.labels = {} if form.labels_name is None else {form.labels_name: folder_labels(folder, content)}

    def __call__(self, features: Sequence[Feature]) -> list[dict[str, np.ndarray]]:
        lengths = [length for feature in features for length in feature.sequence_lengths]
        ids = [part for feature in features for part in _sequences(feature, feature.input_ids)]
        types = [part for feature in features for part in _sequences(feature, feature.token_type_ids)]
        shape = (len(lengths), max(lengths))
        inputs = {name: np.zeros(shape, dtype=np.int64) for name in ("input_ids", "token_type_ids", "attention_mask")}
        for row, length in enumerate(lengths):
            inputs["input_ids"][row, :length] = ids[row]
            inputs["token_type_ids"][row, :length] = types[row]
            inputs["attention_mask"][row, :length] = 1
        names = [output.name for output in self._session.get_outputs()]
        given = {name: array for name, array in inputs.items() if name in self._inputs}
        outputs = dict(zip(names, self._session.run(names, given), strict=True))
        rows = iter([self._of_row(outputs, row, length) for row, length in enumerate(lengths)])
        return [_joined([next(rows) for _ in feature.sequence_lengths]) for feature in features]

    def _of_row(self, outputs: dict[str, np.ndarray], row: int, length: int) -> dict[str, np.ndarray]:
        if self._kind == "question_answering":
            both = [outputs[name][row, :length] for name in ("start_logits", "end_logits")]
            return {"token_scores": np.stack(both, axis=-1)}
        if self._kind == "sentence_embedding":
            read = 1 if self._settings.pooling == "cls" else length
            return {"vectors": outputs["last_hidden_state"][row, :read].mean(axis=0)[None]}
        if self._kind == "token_classification":
            return {"token_scores": outputs["logits"][row, :length]}
        return {"scores": outputs["logits"][row][None]}


def _sequences(feature: Feature, values: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(feature.sequence_lengths)[:-1])


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
