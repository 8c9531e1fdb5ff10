"""score.py as a user starts it, on tasks that need no training and on a fine-tuned folder."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from downstream_cases import CONFIG, review_task, write_lines, write_task, write_tiny_export

from bert_ds.corpus.wordpiece import load_tokenizer
from bert_ds.downstream.kinds import KINDS
from bert_ds.downstream.task_folder import TaskFacts, make_task_model, write_task_folder
from bert_ds.run_config import ConfigError
from bert_ds.task_config import load_task

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_export(tmp_path_factory.mktemp("pretrained") / "export")


def score(monkeypatch: pytest.MonkeyPatch, task: Path, model: Path, output: Path) -> int:
    """Run the script as a command line would, in this process, and return its exit code."""
    script = str(ROOT / "bert_ds/score.py")
    monkeypatch.setattr(sys, "argv", [script, "--task", str(task), "--model", str(model), "--output", str(output)])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    return int(end.value.code or 0)


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


def test_minimal_pairs_are_judged_by_paradigm(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [{"sentence_good": "we saw it.", "sentence_bad": "it saw we.", "UID": "order"}]
    pairs.append({"sentence_good": "it saw we.", "sentence_bad": "we saw it.", "UID": "order"})
    write_lines(tmp_path / "pairs.jsonl", map(json.dumps, pairs))
    fields = {"good": "sentence_good", "bad": "sentence_bad", "paradigm": "UID"}
    data = {"validation": [{"path": "pairs.jsonl", "format": "jsonl"}], "fields": fields}
    task = write_task(tmp_path, {"kind": "minimal_pairs", "data": data})
    assert score(monkeypatch, task, pretrained, tmp_path / "out") == 0
    assert results(tmp_path / "out")["validation"] == {"accuracy": 0.5, "accuracy_order": 0.5}
    first, second = map(json.loads, (tmp_path / "out/pairs.jsonl").read_text().splitlines())
    assert first["good_score"] == pytest.approx(second["bad_score"])


def test_word_similarity_is_measured_by_set_and_kind_of_vector(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ["word1,word2,similarity", "great,superb,9", "film,play,7.5", "dull,paris,1", "in,it,0.5", ",,"]
    write_lines(tmp_path / "words.csv", rows)
    file = {"path": "words.csv", "format": "csv", "values": {"set": "mine"}}
    fields = {"left": "word1", "right": "word2", "score": "similarity"}
    task = write_task(tmp_path, {"kind": "word_similarity", "data": {"validation": [file], "fields": fields}})
    assert score(monkeypatch, task, pretrained, tmp_path / "out") == 0
    figures = results(tmp_path / "out")["validation"]
    assert set(figures) == {"embedding", "encoder", "embedding_mine", "encoder_mine"}
    assert all(-1 <= value <= 1 for value in figures.values())
    assert figures["encoder"] == figures["encoder_mine"]


PROMPT = {"template": "{text} is {label}.", "label_words": {"good": ["great"], "bad": ["dull", "clumsy film"]}}


@pytest.mark.parametrize("num_shots", [0, 2])
def test_a_prompt_classifies_the_validation_rows_of_fine_tuning(
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    num_shots: int,
) -> None:
    prompt = {**PROMPT, "num_shots": num_shots}
    task = review_task(tmp_path, kind="prompted_classification", prompt=prompt, max_seq_length=40)
    assert score(monkeypatch, task, pretrained, tmp_path / "out") == 0
    assert {"accuracy", "macro_f1", "matthews"} <= set(results(tmp_path / "out")["validation"])
    header, *rows = (tmp_path / "out/predictions.tsv").read_text().splitlines()
    assert header == "index\tprediction"
    assert {row.split("\t")[1] for row in rows} <= {"good", "bad"}
    said = capsys.readouterr().out
    assert ("demonstrations in a prompt: 3.0 of 4 in the mean" in said) == bool(num_shots)


def test_a_fine_tuned_folder_is_measured_on_its_task(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = review_task(tmp_path)
    kind, labels = KINDS["classification"], {"label": ("bad", "good")}
    facts = TaskFacts("tiny", "classification", labels, load_tokenizer(pretrained).fingerprint, {})
    model = make_task_model(kind, CONFIG, labels, kernels="torch")
    write_task_folder(tmp_path / "hf", model, facts=facts, tokenizer=pretrained.with_name("tokenizer"))
    assert score(monkeypatch, task, tmp_path / "hf", tmp_path / "out") == 0
    assert results(tmp_path / "out")["validation"]["accuracy"] == pytest.approx(0.5, abs=0.5)
    assert (tmp_path / "out/predictions/validation/predictions.tsv").is_file()


def test_what_cannot_be_scored_is_refused_with_the_documented_codes(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = review_task(tmp_path, kind="prompted_classification", prompt={**PROMPT, "template": "{text} is."})
    assert score(monkeypatch, task, pretrained, tmp_path / "out") == 2
    assert "has the gaps ['text'], wanted each of ['text', 'label'] once" in capsys.readouterr().err
    words = {"good": ["great"], "nice": ["lovely"]}
    task = review_task(tmp_path, kind="prompted_classification", prompt={**PROMPT, "label_words": words})
    assert score(monkeypatch, task, pretrained, tmp_path / "out") == 3
    assert "the label 'bad' has no words in prompt.label_words of task tiny" in capsys.readouterr().err
    assert score(monkeypatch, review_task(tmp_path), pretrained, tmp_path / "out") == 4
    assert "wanted ['BertForSequenceClassification'] for this task" in capsys.readouterr().err


def test_a_prompt_task_without_a_prompt_and_a_trained_task_without_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prompt: is missing, wanted template and label_words"):
        load_task(review_task(tmp_path, kind="prompted_classification"))
    data = {"validation": [{"path": "train.tsv", "format": "tsv"}], "fields": {"text": "text", "label": "label"}}
    with pytest.raises(ConfigError, match=r"data.train: is empty, wanted at least one file"):
        load_task(review_task(tmp_path, data=data))
