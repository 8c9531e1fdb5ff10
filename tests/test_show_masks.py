"""show_masks.py through its command line, with the transformers that is installed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from forked_verbs import run_verb

ROOT = Path(__file__).resolve().parents[1]


def show_masks(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_verb(ROOT / "bert_ds/show_masks.py", *arguments)


def test_an_exported_folder_fills_the_mask_of_a_sentence_with_the_asked_number_of_words(tiny_export: Path) -> None:
    found = show_masks("--model", tiny_export, "--text", "we saw a [MASK]", "--top_k", 3)
    assert found.returncode == 0, found.stderr
    sentence, words = found.stdout.splitlines()
    assert sentence == "we saw a [MASK]"
    assert len(words.strip().split(", ")) == 3


@pytest.mark.parametrize("text", ["no gap here", "[MASK] and [MASK]"])
def test_a_sentence_without_exactly_one_mask_is_refused(tiny_export: Path, text: str) -> None:
    found = show_masks("--model", tiny_export, "--text", text)
    assert found.returncode == 2
    assert f"--text {text!r} has {text.count('[MASK]')} [MASK], wanted one" in found.stderr
