"""The figures of classes, and what happens where the packages that they come from are missing."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.downstream.scores.metrics import (
    class_figures,
    confusion_counts,
    correlations,
    mean_and_deviation,
    multi_label_figures,
    require_metrics,
)


def test_a_missing_package_is_named_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without_sklearn(name: str, *rest: Any) -> Any:
        return None if name == "sklearn" else find(name, *rest)

    require_metrics()
    monkeypatch.setattr(importlib.util, "find_spec", without_sklearn)
    with pytest.raises(ConfigError, match=r"^sklearn not installed: .*pip install scikit-learn scipy"):
        require_metrics()


def test_figures_of_a_hand_computed_case() -> None:
    found = class_figures(["a", "a", "a", "b"], ["a", "a", "b", "c"], ["a", "b", "c", "d"])
    assert found["accuracy"] == found["micro_f1"] == 2 / 4
    assert found["macro_precision"] == pytest.approx((1 + 0 + 0) / 3)
    assert found["macro_recall"] == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert found["macro_f1"] == pytest.approx((4 / 5 + 0 + 0) / 3)
    # Gorodkin's: (right x rows - sum of products of counts) / roots.
    assert found["matthews"] == pytest.approx((2 * 4 - (3 * 2 + 1 * 1)) / ((16 - 4 - 1 - 1) * (16 - 9 - 1)) ** 0.5)


def test_figures_of_a_hand_computed_case_of_several_labels_a_row() -> None:
    gold_NL, found_NL = np.array([[1, 1], [0, 1], [1, 0]]), np.array([[1, 0], [1, 1], [1, 0]])
    assert multi_label_figures(gold_NL, found_NL) == pytest.approx(
        {
            "micro_f1": 2 * 3 / (4 + 4),
            "macro_precision": (2 / 3 + 1) / 2,
            "macro_recall": (1 + 1 / 2) / 2,
            "macro_f1": (4 / 5 + 2 / 3) / 2,
            "exact": 1 / 3,
        }
    )


def test_correlations_worked_out_by_hand() -> None:
    found = correlations([1, 2, 3, 4], [1, 3, 2, 8])
    assert found == pytest.approx({"pearson": 10 / (5 * 29) ** 0.5, "spearman": 1 - 6 * 2 / (4 * 15)})


def test_rows_of_the_confusion_matrix_are_the_true_labels() -> None:
    assert confusion_counts(list("aabbc"), list("abbba"), ["c", "a", "b"]).tolist() == [[0, 1, 0], [0, 1, 1], [0, 0, 2]]


def test_the_deviation_is_that_of_a_sample() -> None:
    assert mean_and_deviation([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, (7 / 3) ** 0.5))
    assert mean_and_deviation([5.0]) == (5.0, 0.0)
