"""The trivial methods, on rows whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from downstream_cases import task_of, write_lines

from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.kinds.trivial import most_frequent_tags, trivial_figures
from bert_ds.downstream.tuning.task_rows import read_task


def test_an_entity_of_two_words_is_found_whole_and_an_ambiguous_word_by_its_majority() -> None:
    rows = [
        ("we saw new york", "O O B-LOC I-LOC"),
        ("new may come", "O O O"),
        ("may saw us", "B-PER O O"),
        ("may it be", "O O O"),
    ]
    tag = most_frequent_tags([(words.split(), tags.split()) for words, tags in rows])
    assert tag(["may", "we", "saw", "new", "york", "in", "new"]) == ["O", "O", "O", "B-LOC", "I-LOC", "O", "O"]


def figures(folder: Path, export: Path, lines: list[str], content: dict[str, Any]) -> dict[str, float] | None:
    write_lines(folder / "rows", lines)
    side = [{"path": "rows", "format": "tsv"}]
    data = {"train": side, "validation": side, "drop_overlap": False, **content.pop("data")}
    task = task_of(folder, {**content, "data": data})
    return figures_of(task, export)


def figures_of(task: TaskConfig, export: Path) -> dict[str, float] | None:
    rows = read_task(task, load_tokenizer(export), say=lambda text: None)
    return trivial_figures(KINDS[task.kind], rows.train.examples, rows.validation.examples, rows.labels)


def test_similar_sentences_have_a_larger_cosine(tmp_path: Path, tiny_export: Path) -> None:
    lines = [
        "a\tb\ts",
        "the film is dull\tthe film is dull\t5",
        "the film is dull\tthe play is dull\t3",
        "we saw it\tno\t0",
    ]
    data = {"fields": {"text": "a", "text_pair": "b", "score": "s"}}
    found = figures(tmp_path, tiny_export, lines, {"kind": "regression", "data": data})
    assert found is not None
    assert found["spearman"] > 0.99


def test_a_kind_without_a_trivial_method_says_so(tmp_path: Path, tiny_export: Path) -> None:
    data = {"fields": {"text": "a", "labels": "l"}}
    assert figures(tmp_path, tiny_export, ["a\tl", "x\ty"], {"kind": "multi_label", "data": data}) is None


def test_the_sentence_with_most_words_of_the_question_is_the_answer(tmp_path: Path, tiny_export: Path) -> None:
    context = "Rome is old. Homer wrote the Iliad! It is long."
    answer = {"text": "Homer wrote the Iliad!", "answer_start": 13}
    question = {"id": "1", "question": "Who wrote the Iliad?", "answers": [answer]}
    content = {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": [question]}]}]}
    (tmp_path / "rows.json").write_text(json.dumps(content), encoding="utf-8")
    side = [{"path": "rows.json", "format": "squad"}]
    data = {"train": side, "validation": side, "drop_overlap": False}
    task = task_of(tmp_path, {"kind": "question_answering", "data": data})
    found = figures_of(task, tiny_export)
    assert found is not None
    assert found["exact_match"] == 100.0


def test_a_pair_that_shares_more_words_is_told_from_one_that_shares_fewer(tmp_path: Path, tiny_export: Path) -> None:
    lines = ["a\tb\tl", *["we saw a film\twe saw a film\tyes", "we saw a film\tyou hear no song\tno"] * 10]
    data = {"fields": {"text": "a", "text_pair": "b", "label": "l"}}
    found = figures(tmp_path, tiny_export, lines, {"kind": "classification", "data": data})
    assert found is not None
    assert found["accuracy"] == 1.0
