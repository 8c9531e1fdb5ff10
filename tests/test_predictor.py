"""Answers of fine-tuned folders to texts without labels: every kind and family, files that are taken up again."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import csv
import io
import json
import subprocess
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from config_cases import write_json
from downstream_cases import review_task
from family_cases import WIRED
from test_family_kinds import model_of, task_file
from test_task_kinds import SETTINGS
from tiny_training import join_alone

import bert_ds
import bert_ds.predict
from bert_ds.basics.ranks import DataError
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.task.task_config import load_task
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.downstream.rows.asked_rows import Fault
from bert_ds.downstream.rows.free_words import joined_words, split_words
from bert_ds.downstream.tuning.outcome import measure_side
from bert_ds.downstream.tuning.predictor import ANSWERS, Predictor
from bert_ds.downstream.tuning.scorers import TorchScorer
from bert_ds.downstream.tuning.task_folder import TaskFacts, write_task_folder
from bert_ds.downstream.tuning.task_rows import read_task

ROOT = Path(__file__).resolve().parents[1]
FAMILY_OF = {"classification": "bert", "token_classification": "bert, pre-norm"}
"""One family for each kind, the third for all others; what a family is makes no difference to what is done here."""
KINDS_TRIED = [*SETTINGS, "question_answering", "sentence_embedding"]


def written(kind: str, folder: Path, tiny_export: Path, task: Path | None = None) -> tuple[Any, Any]:
    """Write a folder of a kind; return its validation examples and what is predicted of them in fine-tuning."""
    join_alone()
    loaded = load_task(task or task_file(kind, folder))
    tokenizer = load_tokenizer(tiny_export)
    rows = read_task(loaded, tokenizer, say=lambda text: None)
    model = model_of(kind, WIRED[FAMILY_OF.get(kind, "modernbert")], rows).eval()
    answering = loaded.answering.model_dump() if kind == "question_answering" else {}
    facts = TaskFacts("tiny", kind, rows.labels, tokenizer.fingerprint, 24, {}, answering)
    write_task_folder(folder / "hf", model, facts=facts, tokenizer=tiny_export)
    found = measure_side(model, loaded, rows.validation, rows.labels)
    return rows.validation.examples, found.predictions


def asked(kind: str, texts: tuple[str, ...]) -> Any:
    """The row that a person would write of an example."""
    if kind in ("token_classification", "intent_slot"):
        return {"words": list(texts)}
    if kind == "multiple_choice":
        return (
            {"text": texts[0], "text_pair": texts[1], "choices": list(texts[2:])}
            if texts[1]
            else {"text": texts[0], "choices": list(texts[2:])}
        )
    return texts[0] if len(texts) == 1 else texts


@pytest.mark.parametrize("kind", KINDS_TRIED)
def test_a_folder_answers_as_it_was_measured(kind: str, tmp_path: Path, tiny_export: Path) -> None:
    examples, predictions = written(kind, tmp_path, tiny_export)
    predict = bert_ds.load_predictor(tmp_path / "hf")
    rows = [asked(kind, example.texts) for example in examples]
    if kind == "sentence_embedding":
        rows = [text for example in examples for text in example.texts]
    answers = predict([*rows, ""], batch_size=3)
    assert predict.kind == kind and len(answers) == len(rows) + 1
    *answers, empty = answers
    assert list(empty) == [*ANSWERS[kind], "error"] and not any(empty[name] for name in ANSWERS[kind])
    assert empty["error"] in ("text is empty", "the row holds no words") or "the row has no" in empty["error"]
    assert all(tuple(answer) == ANSWERS[kind] for answer in answers)
    if kind == "sentence_embedding":
        vectors = np.array([answer["vector"] for answer in answers]).reshape(len(examples), 2, -1)
        unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
        wanted = [found.value for found in predictions]
        assert (unit[:, 0] * unit[:, 1]).sum(axis=-1) == pytest.approx(wanted, abs=1e-4)
        return
    for answer, found, example in zip(answers, predictions, examples, strict=True):
        check(kind, answer, found, example.texts)


def check(kind: str, answer: dict[str, Any], found: Any, texts: tuple[str, ...]) -> None:
    """Compare an answer with the prediction of the same row."""
    if kind == "classification":
        shares = torch.tensor(found.scores).softmax(0)
        assert answer["label"] == found.value and answer["probability"] == pytest.approx(float(shares.max()), abs=1e-5)
        assert list(answer["probabilities"].values()) == pytest.approx(shares.tolist(), abs=1e-5)
    elif kind == "multi_label":
        assert tuple(answer["labels"]) == found.value
        assert list(answer["probabilities"].values()) == pytest.approx(
            torch.tensor(found.scores).sigmoid().tolist(), abs=1e-5
        )
    elif kind == "regression":
        assert answer["score"] == pytest.approx(found.value, abs=1e-5)
    elif kind == "multiple_choice":
        assert answer["choice"] == texts[2:][int(np.argmax(answer["probabilities"]))]
    elif kind == "question_answering":
        best = found.scores["answers"][0]
        assert answer["answer"] == best["text"] == texts[1][answer["start"] : answer["end"]]
    else:
        tags = found.value if kind == "token_classification" else found.value[1]
        assert kind != "intent_slot" or answer["intent"] == found.value[0]
        for one in answer["entities"]:
            assert " ".join(texts)[one["start"] : one["end"]] == one["text"]
        begun = [tag[2:] for tag, before in zip(tags, ("O", *tags), strict=False) if tag[:2] in ("B-", "S-")]
        assert len([one for one in answer["entities"] if one["type"] in begun]) >= len(begun)


def test_a_pair_is_the_same_in_every_form_and_read_whole(
    reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = Predictor(reviews)
    alone, *pairs = predict(["the film", ("the film", "great"), {"text": "the film", "text_pair": "great"}])
    assert pairs[0] == pairs[1] != alone
    sizes: list[int] = []
    monkeypatch.setattr(TorchScorer, "__call__", partialmethod(counted, TorchScorer.__call__, sizes))
    (tmp_path / "in.txt").write_text("the film\n" * 5)
    run(monkeypatch, "--model", reviews, "--input", tmp_path / "in.txt", "--batch_size", 2)
    assert sizes == [2, 2, 1]


def counted(self: Any, score: Any, sizes: list[int], features: Any) -> Any:
    sizes.append(len(features))
    return score(self, features)


def test_words_of_a_text_keep_their_places() -> None:
    text = "Don't stop, 中文 x2!"
    words = split_words(text)
    assert [word.text for word in words] == ["Don't", "stop", ",", "中", "文", "x2", "!"]
    assert all(text[word.start : word.end] == word.text for word in words)
    assert [(word.start, word.end) for word in joined_words(["ab", "c"])] == [(0, 2), (3, 4)]


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory, tiny_export: Path) -> Path:
    """A fine-tuned folder of two classes."""
    folder = tmp_path_factory.mktemp("reviews")
    written("classification", folder, tiny_export, review_task(folder))
    return folder / "hf"


def test_scores_come_in_the_order_of_the_features_whatever_their_lengths(reviews: Path) -> None:
    predict = Predictor(reviews)
    texts = ["dull", "the film is very great", "it is", "we saw the play in paris and in london"]
    features = [predict._asked(text).features[0] for text in texts]
    together, alone = predict._scorer(features), [predict._scorer([one])[0] for one in features]
    for one, other in zip(together, alone, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, words)])
    bert_ds.predict.main()


def test_a_csv_is_answered_row_by_row_whatever_its_rows_hold(
    reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.csv"
    source.write_text('id,review\n1,"the film, is\ngreat"\n2,\n3\n4,the book is dull\n', encoding="utf-8")
    words = ("--model", reviews, "--input", source, "--columns", "text=review", "--output")
    run(monkeypatch, *words, tmp_path / "out.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert list(rows[0]) == ["row", "label", "probability", "probabilities", "error"]
    assert [row["row"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["error"] for row in rows] == ["", "text is empty", "found 1 columns, wanted 2", ""]
    assert {row["label"] for row in rows} <= {"good", "bad", ""} and rows[1]["label"] == ""
    assert json.loads(rows[0]["probabilities"])[rows[0]["label"]] == float(rows[0]["probability"])
    assert "4 rows (classification)" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is there already, and nothing was touched"):
        run(monkeypatch, *words, tmp_path / "out.csv")
    with pytest.raises(DataError, match=r"no column \"text\"; there are \['id', 'review'\]"):
        run(monkeypatch, *words[:4], "--columns", "text=text", "--output", tmp_path / "new.csv")
    with pytest.raises(ConfigError, match=r"--output .*nowhere/out.csv cannot be written: No such file"):
        run(monkeypatch, *words, tmp_path / "nowhere/out.csv")


def test_a_prediction_that_is_killed_goes_on_where_it_was(
    reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bert_ds.predict, "ROWS_AT_ONCE", 3)
    texts = ["the film is great", "dull", "", "this story", "not JSON", "we saw it in paris", "play", "and the book"]
    lines = ["{" if text == "not JSON" else json.dumps({"text": text}) for text in texts]
    (tmp_path / "in.jsonl").write_text("".join(line + "\n" for line in lines))
    words = ("--model", reviews, "--input", tmp_path / "in.jsonl", "--output")
    run(monkeypatch, *words, tmp_path / "whole.jsonl")
    assert "whole.jsonl, 2 of them could not be answered" in capsys.readouterr().err

    class Killed(BaseException):
        pass

    calls: list[int] = []
    predict = Predictor.__call__

    def until_killed(self: Predictor, rows: Any, **options: Any) -> Any:
        calls.append(len(rows))
        if len(calls) == 3:
            raise Killed
        return predict(self, rows, **options)

    monkeypatch.setattr(Predictor, "__call__", until_killed)
    with pytest.raises(Killed):
        run(monkeypatch, *words, tmp_path / "out.jsonl")
    with (tmp_path / "out.jsonl").open("a") as file:
        file.write('{"row": 6, "lab')
    with pytest.raises(ConfigError, match="was begun with another model, input or columns"):
        run(monkeypatch, "--columns", "text=body", *words, tmp_path / "out.jsonl")
    written = os.stat(tmp_path / "in.jsonl").st_mtime_ns
    os.utime(tmp_path / "in.jsonl", ns=(written, written + 1))
    with pytest.raises(ConfigError, match="was begun with another model, input or columns"):
        run(monkeypatch, *words, tmp_path / "out.jsonl")
    os.utime(tmp_path / "in.jsonl", ns=(written, written))
    run(monkeypatch, *words, tmp_path / "out.jsonl")
    assert calls == [3, 3, 2, 2]
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(8))
    assert [row["error"][:8] for row in rows if "error" in row] == ["text is ", "not JSON"]
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "whole.jsonl"}


def test_a_folder_without_a_head_is_named_and_rows_of_another_form_too(
    reviews: Path, tiny_export: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"has no head of a task \(architectures \"BertForPreTraining\"\)"):
        Predictor(tiny_export)
    with pytest.raises(ConfigError, match="there is no such folder"):
        Predictor(tmp_path / "nope")
    with pytest.raises(ConfigError, match=r"has no config\.json: did you mean .*/hf\?"):
        Predictor(reviews.parent)
    answers = Predictor(reviews)([("the film", "great"), 3, {"body": "x"}, {"text": 7}, Fault("why"), "a " * 500])
    assert [answer.get("error") for answer in answers] == [
        None,
        "found int, wanted a text, two texts or an object of fields",
        "the row has no text, it has nothing",
        "text is 7, wanted text",
        "why",
        None,
    ]


def test_the_helpers_of_a_notebook_read_and_change_nothing(tmp_path: Path) -> None:
    rows = [
        {"kind": "start", "step": 0, "attempt": 1, "time": 0.0},
        {"kind": "train", "step": 1, "attempt": 1, "time": 1.0, "loss": 8.0, "lr": 0.5},
        {"kind": "train", "step": 2, "attempt": 1, "time": 2.0, "loss": 7.0, "lr": 0.25},
        {"kind": "evaluation", "step": 2, "attempt": 1, "time": 3.0, "loss_mlm_masked": 6.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    history = bert_ds.load_history(tmp_path)
    table = history if isinstance(history, list) else history.to_dict("records")
    assert [(row["step"], row["kind"]) for row in table] == [(1, "train"), (2, "train"), (2, "evaluation")]
    assert [row["loss"] for row in table[:2]] == [8.0, 7.0] and table[2]["loss_mlm_masked"] == 6.5
    good, bad = bert_ds.check("bert_base_phase1", "zero2", world_size=8), bert_ds.check("bert_bas_phase1", "zero9")
    assert good.problems == () and good.numbers["global batch"].endswith("x 8 ranks")
    assert [problem.split(":")[0] for problem in bad.problems] == ["--deepspeed_config", "--run"]
    wrong = bert_ds.check(write_json(tmp_path, "run.json", {"name": "x"}))
    assert any("optimizer" in problem for problem in wrong.problems) and wrong.numbers == {}
    other = bert_ds.check("bert_base_zh", "zero3", overrides=["name=other"])
    assert other.numbers["run"].startswith("other: ") and any("corpus.tokenizer" in one for one in other.warnings)
    with pytest.raises(AttributeError, match="has no attribute 'load_histroy'"):
        _ = bert_ds.load_histroy


def test_checking_a_recipe_in_a_notebook_imports_no_torch_and_predicting_no_deepspeed() -> None:
    code = "import sys, bert_ds; bert_ds.check(); assert not {'torch', 'transformers'} & set(sys.modules)\n"
    code += (
        "import bert_ds.predict; assert not {'deepspeed', 'transformers'} & set(sys.modules)"  # which writes to stdout
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
