"""What happens where the packages that metrics come from are missing."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from bert_ds.configuration.run_config import ConfigError
from bert_ds.downstream.metrics import require_metrics


def test_a_missing_package_is_named_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without_sklearn(name: str, *rest: Any) -> Any:
        return None if name == "sklearn" else find(name, *rest)

    require_metrics()
    monkeypatch.setattr(importlib.util, "find_spec", without_sklearn)
    with pytest.raises(ConfigError, match=r"^sklearn not installed: .*pip install scikit-learn scipy"):
        require_metrics()
