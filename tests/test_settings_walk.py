"""The reasons for which a setting is not walked name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import test_ds_settings
import test_recipe_settings
import test_task_settings

TESTS = Path(__file__).parent
REASONS = {
    f"{module.__name__}: {path}": reason
    for module in (test_ds_settings, test_recipe_settings, test_task_settings)
    for path, reason in module.REASONS.items()
}


@pytest.fixture(scope="module")
def names() -> set[str]:
    """Names of all files and functions of tests."""
    texts = [path.read_text(encoding="utf-8") for path in TESTS.glob("test_*.py")]
    return {path.stem for path in TESTS.glob("test_*.py")} | set(re.findall(r"^def (test_\w+)", "\n".join(texts), re.M))


def test_every_test_that_a_reason_cites_exists(names: set[str]) -> None:
    cited = {(path, name) for path, reason in REASONS.items() for name in re.findall(r"\btest_\w+", reason)}
    assert len(cited) > 10
    assert sorted((path, name) for path, name in cited if name not in names) == []
