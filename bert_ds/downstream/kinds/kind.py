"""What a kind of task consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.downstream.rows.examples import Example, Labels, Say
from bert_ds.downstream.rows.features import Feature, FeatureContext
from bert_ds.downstream.rows.records import Record
from bert_ds.encoder.families.family import RoleName
from bert_ds.encoder.fused_ops import FusedOps


class Prediction(NamedTuple):
    """What a model says of an example."""

    value: Any
    """In the form of `Example.target`."""
    scores: Any = None
    """What it was chosen by; a JSON value."""


class HeadContext(NamedTuple):
    """What making a head needs."""

    config: EncoderConfig
    """Shape of the encoder, with the dropout of the task."""
    labels: Labels
    ops: FusedOps
    class_weights: tuple[float, ...] | None = None
    """Weight of each label in the loss."""
    settings: Any = None
    """The section of the task that is for its kind alone, where it has one."""


class HfForm(NamedTuple):
    """A class of transformers that a fine-tuned model can be loaded as."""

    role: RoleName
    """Which of a family's classes."""
    classifier: str = ""
    """Our name of the module that is its linear layer on top; "" where there is none."""
    labels_name: str | None = "label"
    """Which of the task's labels its ids stand for; None where there are none."""
    facts: Mapping[str, Any] = {}
    """Further settings of config.json."""
    scores: str = "scores"
    """Our name of the scores that are its logits."""
    folder: str = "."
    """Below the folder of the model: "." unless one model is several of theirs."""
    pipeline: str = ""
    """Its task in `transformers.pipeline`; "" where there is none."""
    extra_files: Callable[[EncoderConfig, int, Any], Mapping[str, str | bytes]] = lambda config, length, settings: {}
    """What other libraries want in the folder, from the encoder, the task's longest sequence and the section of its
    kind: file name -> content."""


class Kind(NamedTuple):
    """The functions of a kind; examples, features and predictions are lists in the order of the rows."""

    make_example: Callable[[Record, int, TaskConfig, bool], Example]
    """From a row, its number, the task, and whether it may be without a label."""
    row_text: Callable[[Example], str]
    """What may not be on both sides of a split."""
    make_labels: Callable[[Sequence[Example], TaskConfig], Labels]
    """From the training examples."""
    make_features: Callable[[Sequence[Example], FeatureContext], list[Feature]]
    make_head: Callable[[HeadContext], nn.Module]
    count_targets: Callable[[Sequence[Feature]], dict[str, float]]
    """How many targets there are, by the name that the head's loss terms know them by."""
    summarise: Callable[[Feature, dict[str, np.ndarray]], Any]
    """Scores of a feature -> what is gathered over the ranks, a JSON value."""
    predict: Callable[[Sequence[Example], Sequence[Feature], Sequence[Any], Labels], list[Prediction]]
    """One prediction per example."""
    measure: Callable[[Sequence[Example], Sequence[Prediction], Labels], dict[str, float]]
    """Of examples that have a target."""
    prediction_files: Callable[[Sequence[Example], Sequence[Prediction]], dict[str, str]]
    """File name -> text, in the form in which such predictions are handed in."""
    hf_forms: tuple[HfForm, ...]
    class_pairs: Callable[[Sequence[Example], Sequence[Prediction]], list[tuple[str, str]]] | None = None
    """True and predicted label of everything that is labelled, for the confusion matrix."""
    trivial: Callable[[Sequence[Example], Sequence[Example], Labels], list[Any]] | None = None
    """From the training and the validation rows, what a method without a language model makes of each of the latter."""
    folder_settings: Callable[[Path], Any] = lambda folder: None
    """From a folder that such a task left, what a head needs of the section of its kind."""
    mend: Callable[[Sequence[Example], TaskConfig, Say], list[Example]] | None = None
    """Puts right what files get wrong, and says how often."""


def count_labelled(features: Sequence[Feature], *names: str) -> dict[str, float]:
    """Return how many targets of each name are there: whole numbers that are not IGNORE_INDEX, or every number."""
    counts = dict.fromkeys(names, 0.0)
    for feature in features:
        for name, target in feature.targets.items():
            if name in counts:
                counts[name] += target.size if target.dtype.kind == "f" else int((target != IGNORE_INDEX).sum())
    return counts
