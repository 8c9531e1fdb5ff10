"""What the layers of an encoder know: a linear classifier on the frozen vectors of each (Alain and Bengio 2016).

A vector is what a layer makes of a word's first piece (token_classification), or the mean of what it makes of the
tokens of a row (classification). Layer 0 is the output of the embeddings. A classifier that scores well may have
learned the task by itself, so each score stands beside two others:

* the same network with random weights: what the words and their order give without any pre-training;
* for tags, a control task (Hewitt and Liang 2019, arXiv 1909.03368): every word type has one random tag, drawn from
  how often tags occur. Only learning words by heart helps there. Selectivity is accuracy less control accuracy.

Letters: n vectors, L layers and the embeddings, D hidden size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.configuration.task.task_kinds import KIND_FACTS
from bert_ds.downstream.rows.features import Feature
from bert_ds.downstream.rows.task_batch import pack
from bert_ds.downstream.scores.metrics import class_figures
from bert_ds.encoder.blocks import kept_outputs

_TOLERANCE = 1e-3
_MAX_ITERATIONS = 500


class ProbeRows(NamedTuple):
    """What is classified."""

    vectors_LnD: np.ndarray
    """fp32, of every layer."""
    targets_n: np.ndarray
    """int64, ids of labels."""
    words: tuple[bytes, ...]
    """The word of each vector, as its pieces; () where a vector stands for a whole row."""


class Probe(NamedTuple):
    """What linear classifiers find in one layer."""

    layer: int
    accuracy: float
    macro_f1: float
    control_accuracy: float | None
    """On the control task; None where a vector stands for a whole row."""

    @property
    def selectivity(self) -> float | None:
        """Accuracy less control accuracy."""
        return None if self.control_accuracy is None else self.accuracy - self.control_accuracy


def probe_layers(train: ProbeRows, held_out: ProbeRows, labels: Sequence[str], *, seed: int) -> list[Probe]:
    """Fit a classifier per layer on the training vectors and measure it on the others.

    Args:
        train, held_out: of the same encoder.
        labels: by id.
        seed: of the control task.
    """
    control = control_targets(train, held_out, len(labels), seed=seed) if train.words else None
    probes = []
    for layer in range(len(train.vectors_LnD)):
        sides = train.vectors_LnD[layer], held_out.vectors_LnD[layer]
        figures = _fitted(*sides, train.targets_n, held_out.targets_n, labels)
        controlled = None if control is None else _fitted(*sides, *control, labels)["accuracy"]
        probes.append(Probe(layer, figures["accuracy"], figures["macro_f1"], controlled))
    return probes


def control_targets(
    train: ProbeRows, held_out: ProbeRows, num_labels: int, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the targets of the control task for both sides, int64 [n] each: one label per word type.

    Args:
        train: gives how often each label is drawn.
        held_out: may have words of its own.
        num_labels: of the task.
        seed: of the draw.
    """
    types = sorted({*train.words, *held_out.words})
    shares = np.bincount(train.targets_n, minlength=num_labels) / len(train.targets_n)
    drawn = np.random.default_rng(seed).choice(num_labels, size=len(types), p=shares)
    label_of_type = dict(zip(types, drawn.tolist(), strict=True))
    first, second = (np.array([label_of_type[word] for word in side.words]) for side in (train, held_out))
    return first, second


def majority_accuracy(train: ProbeRows, held_out: ProbeRows) -> float:
    """Return the share of held-out vectors that have the commonest label of the training vectors."""
    return float((held_out.targets_n == np.bincount(train.targets_n).argmax()).mean())


@torch.no_grad()
def layer_vectors(
    encoder: Any, features: Sequence[Feature], *, kind: str, batch_size: int, limit: int, seed: int
) -> ProbeRows:
    """Run features through an encoder and return the vectors of every layer.

    Args:
        encoder: in evaluation mode, where it is to run.
        features: with targets, of a kind that can be probed.
        kind: of the task.
        batch_size: features per forward pass.
        limit: vectors; features are taken in a random order until there are that many.
        seed: of that order.
    """
    facts = KIND_FACTS[kind]
    name, by_word = facts.probed_target, "words" in facts.fields
    taken, total = [], 0
    for index in np.random.default_rng(seed).permutation(len(features)):
        if total >= limit:
            break
        taken.append(features[index])
        total += int((features[index].targets[name] != IGNORE_INDEX).sum())
    vectors, targets, words = [], [], []
    for first in range(0, len(taken), batch_size):
        for feature, hidden_LTD in _hidden_states(encoder, taken[first : first + batch_size]):
            labelled = feature.targets[name]
            if not by_word:
                vectors.append(hidden_LTD.mean(axis=1, keepdims=True))
                targets.append(labelled)
                continue
            places = np.flatnonzero(labelled != IGNORE_INDEX)
            vectors.append(hidden_LTD[:, places])
            targets.append(labelled[places])
            words += [piece_run.tobytes() for piece_run in _words(feature, places)]
    return ProbeRows(
        np.concatenate(vectors, axis=1)[:, :limit],
        np.concatenate(targets)[:limit].astype(np.int64),
        tuple(words[:limit]),
    )


def _words(feature: Feature, places: np.ndarray) -> list[np.ndarray]:
    """Return the pieces of each word: from its first piece to that of the next, or to [SEP]."""
    bounds = [*places.tolist(), len(feature.input_ids) - 1]
    return [feature.input_ids[start:stop] for start, stop in itertools.pairwise(bounds)]


def _hidden_states(encoder: Any, features: Sequence[Feature]) -> Iterator[tuple[Feature, np.ndarray]]:
    """Yield each feature with what every layer makes of its tokens, fp32 [L + 1, T, D]."""
    batch = pack([feature._replace(targets={}) for feature in features], counts={})
    stream: dict[str, Any] = batch.to(encoder.embeddings.word_weight.device).model_inputs()
    del stream["targets"]
    with kept_outputs((encoder.embeddings, *encoder.layer)) as outputs:
        last_TD = encoder(stream.pop("input_ids_T"), stream.pop("token_type_ids_T"), **stream)
    outputs[-1] = last_TD  # what heads are given, behind the LayerNorm that may be there
    hidden_LTD = torch.stack(outputs).float().cpu().numpy()
    bounds = batch.cu_seqlens.tolist()
    for place, start, stop in zip(batch.places, bounds, bounds[1:], strict=False):
        yield features[place], hidden_LTD[:, start:stop]


def _fitted(
    train_nD: np.ndarray, held_out_nD: np.ndarray, targets_n: np.ndarray, wanted_n: np.ndarray, labels: Sequence[str]
) -> dict[str, float]:
    """Return the figures of multinomial logistic regression on standardised vectors, with a standard normal prior."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(tol=_TOLERANCE, max_iter=_MAX_ITERATIONS))
    probe.fit(train_nD, targets_n)
    found = [labels[index] for index in probe.predict(held_out_nD)]
    return class_figures([labels[index] for index in wanted_n], found, labels)
