"""Question answering from the file to the answers, by our own evaluation and by plain transformers code."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from downstream_cases import CONFIG, PIECES, write_task, write_tiny_export
from tiny_training import join_alone

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX, ConfigError
from bert_ds.configuration.task.task_config import load_task
from bert_ds.corpus.tokenizer.wordpiece import TextRules, WordPieceTokenizer
from bert_ds.downstream.kinds.span_head import SpanHead
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.kinds.task_model import HeadInput
from bert_ds.downstream.rows.task_batch import pack
from bert_ds.downstream.tuning.outcome import Measurement, measure_side
from bert_ds.downstream.tuning.task_folder import TaskFacts, make_task_model, read_task_folder, write_task_folder
from bert_ds.downstream.tuning.task_rows import TaskRows, read_task

TOKENIZER = WordPieceTokenizer(PIECES, TextRules())
KIND = KINDS["question_answering"]
CONTEXTS = (
    "We saw the FILM in Paris, and it is a very moving cafe\u0301 story. The play in London is dull.",
    "中文 film: this book is great (and charming).",
)


def question(key: str, text: str, context: str, *answers: tuple[str, int]) -> dict[str, Any]:
    return {
        "id": key,
        "question": text,
        "answers": [{"text": answer, "answer_start": start} for answer, start in answers],
        "is_impossible": not answers,
    }


QUESTIONS = (
    [
        question("q0", "Where is the film?", CONTEXTS[0], ("Paris", 19)),
        question("q1", "Where is the play?", CONTEXTS[0], ("London", 75), ("in London", 72)),
        question("q2", "Where is the book?", CONTEXTS[0]),
    ],
    [
        question("q3", "What is the book?", CONTEXTS[1], ("great", 5)),
        question("q4", "?", CONTEXTS[1], ("superb", -1)),
    ],
)


def write_questions(folder: Path, name: str = "train.json") -> Path:
    paragraphs = [{"context": text, "qas": qas} for text, qas in zip(CONTEXTS, QUESTIONS, strict=True)]
    (folder / name).write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    return folder


def qa_task(folder: Path, **changes: Any) -> Path:
    file = {"path": "train.json", "format": "squad"}
    content = {
        "kind": "question_answering",
        "data": {"train": [file], "validation": [file], "drop_overlap": False},
        "question_answering": {"rules": "squad2", "stride": 6, "max_answer_pieces": 8},
        "max_seq_length": 24,
    }
    return write_task(folder, {**content, **changes})


def rows_of(task_file: Path) -> tuple[TaskRows, list[str]]:
    said: list[str] = []
    return read_task(load_task(task_file), TOKENIZER, say=said.append), said


def test_windows_have_their_targets_and_wrong_answers_are_counted_and_named(tmp_path: Path) -> None:
    rows, said = rows_of(qa_task(write_questions(tmp_path)))
    assert "1 answers were moved to where their text stands: q3" in said
    assert "1 answers are no part of their context: q4" in said
    assert f"training rows: 5 in {len(rows.train.features)} sequences" in said
    targets: dict[int, set[tuple[int, int]]] = {}
    for feature in rows.train.features:
        assert len(feature.input_ids) <= 24
        first, last = feature.targets["span"][0].tolist()
        targets.setdefault(feature.example, set()).add((first, last))
        if first > 0:
            text = TOKENIZER.decode(feature.input_ids[first : last + 1].tolist())
            assert text == {0: "paris", 1: "london", 3: "great"}[feature.example]
    assert targets[2] == {(0, 0)}
    assert targets[4] == {(IGNORE_INDEX, IGNORE_INDEX)}
    assert KIND.count_targets(rows.train.features) == {
        "span": float(sum(feature.example != 4 for feature in rows.train.features)),
    }


def test_the_loss_of_the_head_is_that_of_transformers_on_unpadded_sequences(tmp_path: Path) -> None:
    model = make_task_model(KIND, CONFIG, {}, kernels="torch").eval()
    cu_seqlens = torch.tensor([0, 5, 12, 15], dtype=torch.int32)
    hidden_TD = torch.randn(15, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
    span_N2 = torch.tensor([[1, 3], [0, 0], [IGNORE_INDEX, IGNORE_INDEX]])
    assert isinstance(model.head, SpanHead)
    found = model.head(HeadInput(hidden_TD, None, cu_seqlens, None), {"span": span_N2})
    scores_T2 = found.scores["token_scores"]
    wanted = sum(
        torch.nn.functional.cross_entropy(part.T, span, reduction="sum") / 2
        for part, span in zip(scores_T2.split([5, 7, 3])[:2], span_N2, strict=False)
    )
    assert found.loss_sums_L.tolist() == pytest.approx([wanted.item()], rel=1e-5)
    tops = [part.argmax(dim=0).tolist() for part in scores_T2.split([5, 7, 3])]
    span_of_tops = torch.tensor([tops[0], [0, 0], tops[2]])
    counted = model.head(HeadInput(hidden_TD, None, cu_seqlens, None), {"span": span_of_tops})
    assert counted.metric_sums_M.tolist() == [2.0 + (tops[1] == [0, 0])]


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TaskRows, Measurement]:
    """The folder of a model with random weights, the rows, and what our own evaluation of the folder says."""
    join_alone()
    folder = tmp_path_factory.mktemp("answered")
    write_tiny_export(folder / "export")
    rows, _ = rows_of(qa_task(write_questions(folder)))
    model = make_task_model(KIND, CONFIG, {}, kernels="torch", init_seed=3)
    with torch.no_grad():
        model.head.weight.mul_(30.0)
    facts = TaskFacts("tiny", "question_answering", {}, TOKENIZER.fingerprint, 24, {})
    write_task_folder(folder / "hf", model, facts=facts, tokenizer=folder / "tokenizer")
    read, labels = read_task_folder(folder / "hf", KIND, kernels="torch")
    return folder / "hf", rows, measure_side(read, load_task(folder / "task.json"), rows.validation, labels)


def transformers_answer(folder: Path, question: str, context: str) -> tuple[str, float]:
    """The best answer and how much better no answer is, by transformers' model, tokenizer and windows alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    room = 24 - 3 - len(tokenizer(question, add_special_tokens=False)["input_ids"])
    inputs = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=24,
        stride=room - 6,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=True,
        return_tensors="pt",
    )
    offsets = inputs.pop("offset_mapping").tolist()
    inputs.pop("overflow_to_sample_mapping", None)
    with torch.no_grad():
        output = model(**inputs)
    best, null = (-np.inf, 0, 0), np.inf
    for window in range(len(offsets)):
        start, end = output.start_logits[window], output.end_logits[window]
        null = min(null, (start[0] + end[0]).item())
        tokens = [index for index, owner in enumerate(inputs.sequence_ids(window)) if owner == 1]
        for first in tokens:
            for last in (token for token in tokens if first <= token < first + 8):
                score = (start[first] + end[last]).item()
                best = max(best, (score, offsets[window][first][0], offsets[window][last][1]))
    return context[best[1] : best[2]], null - best[0]


def test_transformers_gives_the_same_answers_from_the_folder(answered: tuple[Path, TaskRows, Measurement]) -> None:
    folder, rows, found = answered
    answers = set()
    for example, prediction in zip(rows.validation.examples, found.predictions, strict=True):
        text, no_answer = transformers_answer(folder, *example.texts)
        best = prediction.scores["answers"][0]
        # The accent that combines with the last letter belongs to the answer; transformers drops it.
        assert best["text"].removesuffix("\u0301") == text
        assert example.texts[1].startswith(best["text"], best["start"])
        assert prediction.scores["no_answer"] == pytest.approx(no_answer, abs=1e-4)
        assert prediction.value == ("" if no_answer > 0 else best["text"])
        answers.add(text)
    assert len(answers) > 1


def test_predictions_are_files_of_the_official_script(answered: tuple[Path, TaskRows, Measurement]) -> None:
    _, rows, found = answered
    files = {
        name: json.loads(text)
        for name, text in KIND.prediction_files(*(rows.validation.examples, found.predictions)).items()
    }
    wanted = {"predictions.json", "raw_predictions.json", "null_odds.json", "nbest_predictions.json"}
    assert set(files) == wanted
    assert list(files["predictions.json"]) == ["q0", "q1", "q2", "q3", "q4"]
    assert {"exact_match", "f1", "best_f1", "best_f1_threshold", "no_answer_f1"} <= set(found.figures)
    is_empty = files["predictions.json"]["q2"] == ""
    assert found.figures["no_answer_exact_match"] == (100.0 if is_empty else 0.0)


def test_the_official_script_finds_its_best_threshold_in_the_raw_answers(tmp_path: Path) -> None:
    rows, _ = rows_of(qa_task(write_questions(tmp_path)))
    # How much better no answer is, and the best answer: right, right but too weak, made up, wrong, wrong and too weak.
    found = [(-3.0, "Paris"), (1.0, "London"), (2.0, "play"), (-1.0, "book"), (3.0, "is")]
    texts = [(*one, rows.train.examples[index].texts[1]) for index, one in enumerate(found)]
    spans = [[odds, [[0.0, text.index(answer), text.index(answer) + len(answer)]]] for odds, answer, text in texts]
    summaries = [spans[feature.example] for feature in rows.train.features]
    predictions = KIND.predict(rows.train.examples, rows.train.features, summaries, {})
    files = {name: json.loads(text) for name, text in KIND.prediction_files(rows.train.examples, predictions).items()}
    assert list(files["predictions.json"].values()) == ["Paris", "", "", "book", ""]
    raw, null_odds = files["raw_predictions.json"], files["null_odds.json"]
    assert list(raw.values()) == ["Paris", "London", "play", "book", "is"]
    golds = {one["id"]: {answer["text"] for answer in one["answers"]} for paragraph in QUESTIONS for one in paragraph}

    def exact_at(threshold: float) -> float:
        """What evaluate-v2.0.py scores at a threshold; these texts need no normalisation."""
        right = [not golds[key] if null_odds[key] > threshold else raw[key] in golds[key] for key in golds]
        return 100.0 * sum(right) / len(right)

    assert max((exact_at(threshold), -threshold) for threshold in null_odds.values()) == (60.0, -1.0)
    figures = KIND.measure(rows.train.examples, predictions, {})
    assert (figures["best_exact_match"], figures["best_exact_match_threshold"]) == (60.0, 1.0)
    assert figures["exact_match"] == exact_at(0.0) == 40.0


def test_answers_go_by_the_threshold_and_the_number_of_the_task(tmp_path: Path) -> None:
    asked = {"rules": "squad2", "stride": 6, "null_threshold": 1.5, "num_best": 2}
    rows, _ = rows_of(qa_task(write_questions(tmp_path), question_answering=asked))
    features = rows.train.features
    windows = [feature for feature in features if feature.example == 0]
    assert len(windows) > 1
    # No answer is better by 1 than "Paris" in the first window and by 4 in the others; the smallest counts.
    first = rows.train.examples[0].texts[1].index("Paris")
    summaries = [[1.0 if feature is windows[0] else 4.0, [[0.0, first, first + 5]]] for feature in features]
    predictions = KIND.predict(rows.train.examples, features, summaries, {})
    assert (predictions[0].value, predictions[0].scores["no_answer"]) == ("Paris", 1.0)
    figures = KIND.measure(rows.train.examples[:1], predictions[:1], {})
    assert figures["exact_match"] == 100.0
    scores = np.arange(2 * len(windows[0].input_ids), dtype=np.float32).reshape(-1, 2)
    assert len(KIND.summarise(windows[0], {"token_scores": scores})[1]) == 2


def test_a_question_longer_than_the_window_is_refused_with_its_place(tmp_path: Path) -> None:
    task = qa_task(write_questions(tmp_path), max_seq_length=8)
    with pytest.raises(
        DataError, match=r"train.json:data\[0\].paragraphs\[0\].qas\[0\]: the question has 9 pieces, wanted at most 4"
    ):
        rows_of(task)


def test_an_impossible_question_needs_rules_that_know_one(tmp_path: Path) -> None:
    task = qa_task(write_questions(tmp_path), question_answering={"rules": "squad1"})
    with pytest.raises(DataError, match=r"qas\[2\]: the question has no answer, which only .*rules squad2 allows"):
        rows_of(task)


def test_settings_of_another_kind_are_refused(tmp_path: Path) -> None:
    task = qa_task(write_questions(tmp_path), sentence_embedding={})
    with pytest.raises(
        ConfigError, match="sentence_embedding: is for sentence_embedding tasks, the kind is question_answering"
    ):
        load_task(task)


def test_a_small_model_learns_where_answers_stand_and_that_one_has_none(tmp_path: Path) -> None:
    join_alone()
    third = "This book is boring."
    qas = [[QUESTIONS[0][0]], [QUESTIONS[1][0]], [question("q5", "Where is the book?", third)]]
    paragraphs = [{"context": text, "qas": one} for text, one in zip((*CONTEXTS, third), qas, strict=True)]
    (tmp_path / "train.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    task_file = qa_task(tmp_path, max_seq_length=48)
    rows, _ = rows_of(task_file)
    model = make_task_model(KIND, CONFIG, {}, kernels="torch", init_seed=1)
    batch = pack(rows.train.features, counts=KIND.count_targets(rows.train.features))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        loss_sums_L, _ = model(**batch.model_inputs())
        (loss_sums_L[0] / batch.counts["span"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = measure_side(model.eval(), load_task(task_file), rows.validation, {})
    assert [prediction.value for prediction in found.predictions] == ["Paris", "great", ""]
    assert found.figures["exact_match"] == 100.0
