"""A slice of `campaign_fuzz.py`: damaged files are read or refused by a sentence; inputs that once failed are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from campaign_fuzz import Case, cases, try_input

KEPT = (2416, 2480, 8982, 10562, 17769)
"""Inputs that failed once: sentences as long as their file, and a list where a row of metrics has a number."""


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Case], Path]:
    work = tmp_path_factory.mktemp("fuzz")
    return cases(work), work


def test_damaged_files_are_read_or_refused(right: tuple[list[Case], Path]) -> None:
    answers = {number: try_input(number, *right) for number in (*range(250), *KEPT)}
    assert {number: answer for number, answer in answers.items() if answer not in ("read", "refused")} == {}
    assert {"read", "refused"} == set(answers.values())


def test_a_traceback_and_a_sentence_without_a_file_are_failures(tmp_path: Path) -> None:
    def read(folder: Path) -> object:
        raise KeyError("a")

    (tmp_path / "work").mkdir()
    assert "KeyError" in try_input(1, [Case("a", "a.json", b"{}", read)], tmp_path / "work")
