"""Figures of predictions, from scikit-learn and scipy; both are imported when the first figure is wanted."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.downstream.rows.tables import cell


def require_metrics() -> None:
    """Raise ConfigError unless the packages that figures come from are installed, before anything is trained."""
    missing = [name for name in ("sklearn", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} not installed: metrics of a task want pip install scikit-learn scipy")


def class_figures(gold: Sequence[str], found: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Return accuracy, Matthews' correlation, micro-F1, and macro precision, recall and F1 over the labels that occur.

    With one label a row micro-F1 is the accuracy: every wrong label is one too many and one too few.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    occurring = [label for label in labels if label in set(gold) | set(found)]
    return {
        "accuracy": float(accuracy_score(gold, found)),
        "matthews": float(matthews_corrcoef(gold, found)) if len(occurring) > 1 else 0.0,
        "micro_f1": float(f1_score(gold, found, labels=occurring, average="micro", zero_division=0)),
        **_macro(gold, found, labels=occurring),
    }


def multi_label_figures(gold_NL: np.ndarray, found_NL: np.ndarray) -> dict[str, float]:
    """Return micro-F1, macro precision, recall and F1 over the labels, and the share of rows with just their labels.

    Args:
        gold_NL, found_NL: 0 or 1.
    """
    from sklearn.metrics import f1_score

    return {
        "micro_f1": float(f1_score(gold_NL, found_NL, average="micro", zero_division=0)),
        **_macro(gold_NL, found_NL),
        "exact": float((gold_NL == found_NL).all(axis=1).mean()),
    }


def _macro(gold: Any, found: Any, *, labels: Sequence[str] | None = None) -> dict[str, float]:
    """Return the means over the labels, 0 for one that divides by zero."""
    from sklearn.metrics import precision_recall_fscore_support

    values = precision_recall_fscore_support(gold, found, labels=labels, average="macro", zero_division=0)
    return dict(zip(("macro_precision", "macro_recall", "macro_f1"), map(float, values[:3]), strict=True))


def correlations(gold: Sequence[float], found: Sequence[float]) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation; 0 where one side is constant, for which neither is defined."""
    from scipy.stats import pearsonr, spearmanr

    if len(gold) < 2 or min(gold) == max(gold) or min(found) == max(found):
        return {"pearson": 0.0, "spearman": 0.0}
    return {"pearson": float(pearsonr(gold, found)[0]), "spearman": float(spearmanr(gold, found)[0])}


def class_report(gold: Sequence[str], found: Sequence[str], labels: Sequence[str]) -> str:
    """Return precision, recall, F1 and number of rows of each label, as a table."""
    from sklearn.metrics import classification_report

    names = list(map(cell, labels))
    return classification_report(gold, found, labels=list(labels), target_names=names, digits=4, zero_division=0)


def confusion_counts(gold: Sequence[str], found: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Return int64 [true label, predicted label]."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(gold, found, labels=list(labels))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation, 0 for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
