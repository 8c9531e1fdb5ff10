"""Each kind from its file to predictions: sequences, heads, folders that transformers reads with the same answers."""

from __future__ import annotations

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from downstream_cases import CONFIG, review_rows, task_of, write_lines, write_task
from encoder_cases import spread_weights
from tiny_training import join_alone

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.configuration.task.task_config import TaskConfig, load_task
from bert_ds.configuration.task.task_kinds import KIND_FACTS, WORD_METRICS
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.corpus.tokenizer.wordpiece import WordPieceTokenizer
from bert_ds.downstream.kinds.kind import Prediction
from bert_ds.downstream.kinds.table import KINDS, UNTRAINED
from bert_ds.downstream.kinds.task_model import TaskModel, role_of
from bert_ds.downstream.rows.task_batch import pack
from bert_ds.downstream.tuning.outcome import Measurement, measure_side
from bert_ds.downstream.tuning.task_folder import TaskFacts, make_task_model, read_task_folder, write_task_folder
from bert_ds.downstream.tuning.task_rows import TaskRows, read_task

TSV = {"train": [{"path": "train", "format": "tsv"}], "validation": [{"path": "train", "format": "tsv"}]}
CONLL = {"train": [{"path": "train", "format": "conll"}], "validation": [{"path": "train", "format": "conll"}]}
JSONL = {"train": [{"path": "train", "format": "jsonl"}], "validation": [{"path": "train", "format": "jsonl"}]}
TAGGED = ["we\tO", "saw\tO", "london\tB-LOC", "", "the\tO", "film\tI-ART", "in\tO", "paris\tB-LOC", ""]
SLOTS = [
    {"words": ["play", "this", "film"], "tags": ["O", "O", "B-ART"], "intent": "play"},
    {"words": ["book", "london"], "tags": ["O", "B-LOC"], "intent": "book"},
]
CHOICES = [
    {"text": "we saw it", "ask": "the film is", "choices": ["great", "very dull"], "label": "B"},
    {"text": "the book", "ask": "it is", "choices": ["clumsy", "the story", "moving"], "label": 2},
]
SETTINGS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "classification": (["text\tlabel", *review_rows(6)], {**TSV, "fields": {"text": "text", "label": "label"}}),
    "multi_label": (
        ["a\tb\tl", "the film\tis great\tx,y", "the book\tis dull\ty", "a play\tin paris\tz"],
        {**TSV, "fields": {"text": "a", "text_pair": "b", "labels": "l"}},
    ),
    "regression": (
        ["a\tb\ts", "the film\tthe film\t5.0", "we saw it\tin paris\t0.5", "great\tmoving\t3"],
        {**TSV, "fields": {"text": "a", "text_pair": "b", "score": "s"}},
    ),
    "token_classification": (TAGGED, {**CONLL, "fields": {"words": 0, "tags": 1}, "tag_scheme": "bio"}),
    "intent_slot": (
        [json.dumps(row) for row in SLOTS],
        {**JSONL, "fields": {"words": "words", "tags": "tags", "intent": "intent"}, "tag_scheme": "bio"},
    ),
    "multiple_choice": (
        [json.dumps(row) for row in CHOICES],
        {**JSONL, "fields": {"text": "text", "text_pair": "ask", "choices": "choices", "label": "label"}},
    ),
}


def write_kind(kind: str, folder: Path, **settings: Any) -> Path:
    """Write the file and the task of a kind and return the latter."""
    lines, data = SETTINGS[kind]
    write_lines(folder / "train", lines)
    return write_task(folder, {"kind": kind, "data": {**data, "drop_overlap": False}, **settings})


class Case:
    """A kind with its rows and a model of random weights."""

    def __init__(self, kind: str, folder: Path, tokenizer: WordPieceTokenizer, **settings: Any) -> None:
        self.said: list[str] = []
        self.task: TaskConfig = load_task(write_kind(kind, folder, **settings))
        self.kind = KINDS[kind]
        self.rows: TaskRows = read_task(self.task, tokenizer, say=self.said.append)
        self.model: TaskModel = make_task_model(self.kind, CONFIG, self.rows.labels, kernels="torch")
        spread_weights(self.model, CONFIG, scale=0.3)
        self.model.eval()

    def measured(self) -> Measurement:
        join_alone()
        return measure_side(self.model, self.task, self.rows.validation, self.rows.labels)

    def exported(self, folder: Path, tokenizer: Path) -> Path:
        facts = TaskFacts("tiny", self.task.kind, self.rows.labels, load_tokenizer(tokenizer).fingerprint, 24, {})
        write_task_folder(folder, self.model, facts=facts, tokenizer=tokenizer)
        return folder


@pytest.fixture(scope="module")
def tokenizer(tiny_export: Path) -> WordPieceTokenizer:
    return load_tokenizer(tiny_export)


def pipeline(name: str, folder: Path, **settings: Any) -> Any:
    return transformers.pipeline(name, model=str(folder), device="cpu", **settings)


def pairs(case: Case) -> list[dict[str, str]]:
    texts = [example.texts for example in case.rows.validation.examples]
    return [dict(zip(("text", "text_pair"), text, strict=False)) for text in texts]


def test_the_classification_pipeline_gives_our_labels_and_scores(
    tmp_path: Path, tiny_export: Path, tokenizer: WordPieceTokenizer
) -> None:
    case = Case("classification", tmp_path, tokenizer)
    found = case.measured().predictions
    answers = pipeline("text-classification", case.exported(tmp_path / "hf", tiny_export))(pairs(case))
    assert [answer["label"] for answer in answers] == [prediction.value for prediction in found]
    for answer, prediction in zip(answers, found, strict=True):
        assert answer["score"] == pytest.approx(float(torch.tensor(prediction.scores).softmax(0).max()), abs=1e-5)


def test_the_pipeline_gives_our_labels_of_a_multi_label_task(
    tmp_path: Path, tiny_export: Path, tokenizer: WordPieceTokenizer
) -> None:
    case = Case("multi_label", tmp_path, tokenizer)
    classify = pipeline("text-classification", case.exported(tmp_path / "hf", tiny_export), top_k=None)
    for pair, prediction in zip(pairs(case), case.measured().predictions, strict=True):
        answer = classify(pair)
        assert tuple(sorted(one["label"] for one in answer if one["score"] > 0.5)) == prediction.value


def test_the_pipeline_gives_our_numbers_of_a_regression_task(
    tmp_path: Path, tiny_export: Path, tokenizer: WordPieceTokenizer
) -> None:
    case = Case("regression", tmp_path, tokenizer)
    answers = pipeline("text-classification", case.exported(tmp_path / "hf", tiny_export))(pairs(case))
    values = [prediction.value for prediction in case.measured().predictions]
    assert [answer["score"] for answer in answers] == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize(("kind", "folder"), [("token_classification", "."), ("intent_slot", "tags")])
def test_the_token_pipeline_gives_our_tags(
    kind: str, folder: str, tmp_path: Path, tiny_export: Path, tokenizer: WordPieceTokenizer
) -> None:
    case = Case(kind, tmp_path, tokenizer)
    tag = pipeline("token-classification", case.exported(tmp_path / "hf", tiny_export) / folder, ignore_labels=[])
    for example, prediction in zip(case.rows.validation.examples, case.measured().predictions, strict=True):
        answer = tag(" ".join(example.texts))
        tags = prediction.value if kind == "token_classification" else prediction.value[1]
        assert tuple(one["entity"] for one in answer if not one["word"].startswith("##")) == tuple(tags)


def test_the_pipeline_gives_our_intents(tmp_path: Path, tiny_export: Path, tokenizer: WordPieceTokenizer) -> None:
    case = Case("intent_slot", tmp_path, tokenizer)
    classify = pipeline("text-classification", case.exported(tmp_path / "hf", tiny_export) / "intent")
    texts = [" ".join(example.texts) for example in case.rows.validation.examples]
    intents = [prediction.value[0] for prediction in case.measured().predictions]
    assert [answer["label"] for answer in classify(texts)] == intents


def test_transformers_multiple_choice_gives_our_choices(
    tmp_path: Path, tiny_export: Path, tokenizer: WordPieceTokenizer
) -> None:
    case = Case("multiple_choice", tmp_path, tokenizer)
    folder = case.exported(tmp_path / "hf", tiny_export)
    theirs = transformers.AutoModelForMultipleChoice.from_pretrained(folder).eval()
    encode = transformers.AutoTokenizer.from_pretrained(folder)
    for row, prediction in zip(CHOICES, case.measured().predictions, strict=True):
        choices = row["choices"]
        assert isinstance(choices, list)
        texts, asked = [row["text"]] * len(choices), [f"{row['ask']} {choice}" for choice in choices]
        inputs = encode(texts, asked, return_tensors="pt", padding=True)
        with torch.no_grad():
            scores = theirs(**{name: tensor[None] for name, tensor in inputs.items()}).logits[0]
        assert scores.tolist() == pytest.approx(prediction.scores, abs=1e-4)


@pytest.mark.parametrize("kind", ["classification", "multi_label", "regression", "token_classification"])
def test_the_loss_is_that_of_transformers(
    kind: str, tmp_path: Path, tiny_export: Path, tokenizer: WordPieceTokenizer
) -> None:
    case = Case(kind, tmp_path, tokenizer)
    folder = case.exported(tmp_path / "hf", tiny_export)
    (form,) = case.kind.hf_forms
    theirs = getattr(transformers, role_of(case.model.config, form.role).architecture).from_pretrained(folder).eval()
    features = case.rows.train.features
    batch = pack(features, counts=case.kind.count_targets(features))
    ours, _ = case.model(**batch.model_inputs())
    total = 0.0
    for feature in features:
        target = torch.from_numpy(next(iter(feature.targets.values())))
        inputs = {"input_ids": feature.input_ids, "token_type_ids": feature.token_type_ids}
        tensors = {name: torch.from_numpy(array).long()[None] for name, array in inputs.items()}
        answer = theirs(**tensors, labels=target[None] if kind == "token_classification" else target)
        total += answer.loss.item() * sum(case.kind.count_targets([feature]).values())
    assert ours.item() == pytest.approx(total, rel=1e-5)


def test_a_folder_that_is_read_back_predicts_the_same(
    tmp_path: Path, tiny_export: Path, tokenizer: WordPieceTokenizer
) -> None:
    case = Case("intent_slot", tmp_path, tokenizer)
    before = case.measured()
    case.model, labels = read_task_folder(case.exported(tmp_path / "hf", tiny_export), case.kind, kernels="torch")
    assert labels == case.rows.labels
    assert case.measured() == before


def test_only_the_first_piece_of_a_word_has_a_target(tmp_path: Path, tokenizer: WordPieceTokenizer) -> None:
    case = Case("token_classification", tmp_path, tokenizer)
    feature = case.rows.train.features[0]
    assert case.rows.labels == {"tag": ("B-ART", "B-LOC", "I-ART", "I-LOC", "O")}
    assert feature.targets["tag"].tolist() == [IGNORE_INDEX, 4, 4, 1, IGNORE_INDEX]
    assert "1 tags were not allowed at their place in bio and were mended" in case.said[0]


def test_a_long_sentence_becomes_several_sequences_and_every_word_is_predicted(
    tmp_path: Path, tokenizer: WordPieceTokenizer
) -> None:
    case = Case("token_classification", tmp_path, tokenizer, max_seq_length=4)
    assert [feature.example for feature in case.rows.train.features] == [0, 0, 1, 1]
    assert [len(found.value) for found in case.measured().predictions] == [3, 4]


def test_every_kind_that_a_task_file_may_name_has_its_functions_in_the_table() -> None:
    trained = {kind for kind, facts in KIND_FACTS.items() if facts.is_trained}
    assert trained == set(KINDS)
    assert set(KIND_FACTS) - trained == {*UNTRAINED, "masked_words", "retrieval"}
    assert {kind for kind in KINDS if KINDS[kind].trivial is None} == {"multi_label", "intent_slot"}


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_metric_that_can_be_chosen_is_measured(kind: str, tmp_path: Path, tokenizer: WordPieceTokenizer) -> None:
    case = Case(kind, tmp_path, tokenizer)
    examples = case.rows.validation.examples
    figures = case.kind.measure(examples, [Prediction(example.target) for example in examples], case.rows.labels)
    metrics = set(KIND_FACTS[kind].metrics)
    if kind == "token_classification":
        metrics -= set(WORD_METRICS)
        words = examples[0]._replace(target=("NOUN", "VERB", "NOUN"))
        found = case.kind.measure([words], [Prediction(words.target)], {"tag": ("NOUN", "VERB")})
        assert set(found) == {"accuracy", *WORD_METRICS}
    assert {name: figures[name] for name in metrics} == pytest.approx(dict.fromkeys(metrics, 1.0))


@pytest.mark.parametrize("kind", ["token_classification", "intent_slot"])
def test_strict_and_conllevals_scores_have_their_own_names(
    kind: str, tmp_path: Path, tokenizer: WordPieceTokenizer
) -> None:
    case = Case(kind, tmp_path, tokenizer)
    gold, found = ("O", "B-LOC", "I-LOC", "B-LOC"), ("O", "I-LOC", "I-LOC", "B-LOC")
    example = case.rows.train.examples[0]._replace(target=gold if kind == "token_classification" else ("play", gold))
    prediction = Prediction(found if kind == "token_classification" else ("play", found))
    figures = case.kind.measure([example], [prediction], case.rows.labels)
    assert figures["f1"] == figures["strict_f1"] == figures["strict_f1_LOC"] == 2 / 3
    assert (figures["strict_precision"], figures["strict_recall"]) == (1.0, 1 / 2)
    assert figures["conlleval_f1"] == figures["conlleval_precision"] == figures["conlleval_recall"] == 1.0


def test_predictions_are_written_in_columns(tmp_path: Path, tokenizer: WordPieceTokenizer) -> None:
    case = Case("token_classification", tmp_path, tokenizer)
    found = case.measured().predictions
    (text,) = case.kind.prediction_files(case.rows.validation.examples, found).values()
    first = text.split("\n\n")[0].splitlines()
    assert [line.split("\t")[:2] for line in first] == [["we", "O"], ["saw", "O"], ["london", "B-LOC"]]


def read_with(folder: Path, tokenizer: WordPieceTokenizer, rows: list[str], data: Mapping[str, Any], kind: str) -> None:
    write_lines(folder / "train", rows)
    read_task(task_of(folder, {"kind": kind, "data": dict(data)}), tokenizer, say=lambda text: None)


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("classification", ["text\tlabel", "\t1", "a\t2"], "train:2: text is empty, wanted text"),
        ("classification", ["text\tlabel", "a\t", "b\t2"], "train:2: label is empty, wanted a label"),
        ("classification", ["tekst\tlabel", "a\t1"], 'has no column "text", it has "tekst", "label"; did you mean'),
        ("regression", ["a\tb\ts", "x\ty\tNaN"], 'train:2: score is "NaN", wanted a finite number'),
        ("regression", ["a\tb\ts", "x\ty\tfive"], 'train:2: score is "five", wanted a finite number'),
        ("token_classification", ["a\tO", "b\tX-LOC", ""], 'train:1: found the tag "X-LOC", wanted O, B-TYPE, I-TYPE'),
        ("multiple_choice", [json.dumps({**CHOICES[0], "label": 5})], 'train:1: label is "5", wanted 0 to 1'),
        ("multiple_choice", [json.dumps({**CHOICES[0], "choices": ["x"]})], "train:1: found 1 choice, wanted at least"),
        ("intent_slot", [json.dumps({**SLOTS[0], "tags": ["O"]})], "train:1: found 1 tags for 3 words"),
    ],
)
def test_a_bad_row_is_named(
    kind: str, rows: list[str], message: str, tmp_path: Path, tokenizer: WordPieceTokenizer
) -> None:
    with pytest.raises(DataError, match=message):
        read_with(tmp_path, tokenizer, rows, SETTINGS[kind][1], kind)


def test_a_label_that_training_has_never_seen_is_named(tmp_path: Path, tokenizer: WordPieceTokenizer) -> None:
    write_lines(tmp_path / "other", ["text\tlabel", "the book is very dull\tgoood"])
    data = {**SETTINGS["classification"][1], "validation": [{"path": "other", "format": "tsv"}]}
    with pytest.raises(
        DataError, match=r'other:2: the label "goood" is none of the 2 .*: bad, good; did you mean "good"'
    ):
        read_with(tmp_path, tokenizer, SETTINGS["classification"][0], data, "classification")


def test_weights_of_classes_are_balanced_with_a_mean_of_one(tmp_path: Path, tokenizer: WordPieceTokenizer) -> None:
    from bert_ds.downstream.tuning.task_rows import balanced_weights

    lines = ["text\tlabel", "a b\tx", "a c\tx", "a d\tx", "a e\ty"]
    write_lines(tmp_path / "train", lines)
    task = task_of(
        tmp_path, {"kind": "classification", "data": SETTINGS["classification"][1] | {"drop_overlap": False}}
    )
    rows = read_task(task, tokenizer, say=lambda text: None)
    assert balanced_weights(("x", "y"), rows.train.features, target="label") == (4 / 6, 2.0)
