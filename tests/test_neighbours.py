"""Pairs of texts out of raw text."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from downstream_cases import PIECES, write_lines, write_task

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.task.task_config import load_task
from bert_ds.corpus.tokenizer.wordpiece import TextRules, WordPieceTokenizer
from bert_ds.downstream.rows.neighbours import mined_rows
from bert_ds.downstream.tuning.task_rows import read_task

EXTRACTS = [
    '<doc id="1" url="u" title="The play &amp; the film">',
    "The play & the film",
    "",
    "This film is a great film. We saw it in London in the rain.",
    "Plot.",
    "It is a very charming story of Paris.",
    "The book is tedious, and very dull.",
    "</doc>",
    '<doc id="2" title="Paris">',
    "Paris is superb and lovely in the spring.",
    "</doc>",
]


def pairs(folder: Path, kind: str) -> list[tuple[str, str]]:
    path = write_lines(folder / "wiki.txt", EXTRACTS)
    return [(row["text"], row["text_pair"]) for _, row in mined_rows(path, kind)]


def test_each_paragraph_goes_with_the_next_of_its_document_and_headings_are_passed_over(tmp_path: Path) -> None:
    first, second, third = EXTRACTS[3], EXTRACTS[5], EXTRACTS[6]
    assert pairs(tmp_path, "paragraphs") == [(first, second), (second, third)]


def test_each_sentence_goes_with_the_next(tmp_path: Path) -> None:
    sentences = ["This film is a great film.", "We saw it in London in the rain.", EXTRACTS[5], EXTRACTS[6]]
    assert pairs(tmp_path, "sentences") == list(itertools.pairwise(sentences))


def test_a_title_goes_with_its_text(tmp_path: Path) -> None:
    assert pairs(tmp_path, "titles") == [
        ("The play & the film", "\n".join(EXTRACTS[2:7]).strip()),
        ("Paris", EXTRACTS[9]),
    ]


def test_a_task_trains_on_raw_text_and_is_measured_on_scored_rows(tmp_path: Path) -> None:
    write_lines(tmp_path / "wiki.txt", EXTRACTS)
    write_lines(tmp_path / "rows.tsv", ["a\tb\tscore", "it\tthe play\t5", "it\twe\t1"])
    mined = {"path": "wiki.txt", "format": "sentences", "values": {"score": "5"}}
    fields = {"text": ["a", "text"], "text_pair": ["b", "text"], "score": "score"}  # SimCSE: each is its own pair
    data = {"train": [mined], "validation": [{"path": "rows.tsv", "format": "tsv"}], "fields": fields}
    content = {"kind": "sentence_embedding", "data": data, "sentence_embedding": {"loss": "contrastive"}}
    rows = read_task(load_task(write_task(tmp_path, content)), WordPieceTokenizer(PIECES, TextRules()), say=print)
    assert [one.texts for one in rows.train.examples] == [(one, one) for one, _ in pairs(tmp_path, "sentences")]
    assert [feature.targets["partner"].tolist() for feature in rows.train.features] == [[0]] * 3
    assert (
        rows.train.features[0].targets["texts"].tolist()[0][0] == rows.train.features[0].targets["texts"].tolist()[0][1]
    )
    assert [one.target for one in rows.validation.examples] == [5.0, 1.0]


def test_text_without_a_pair_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "wiki.txt", ["One paragraph of some length.", "", "Another one, of its own."])
    mined = {"path": "wiki.txt", "format": "paragraphs"}
    data = {"train": [mined], "validation": [mined], "fields": {"text": "text", "text_pair": "text_pair"}}
    content = {"kind": "sentence_embedding", "data": data, "sentence_embedding": {"loss": "contrastive"}}
    with pytest.raises(DataError, match=r"wiki\.txt holds no row, wanted at least one"):
        read_task(load_task(write_task(tmp_path, content)), WordPieceTokenizer(PIECES, TextRules()), say=print)
