"""What the rows of a task become on their way to a step: sides, sequences with their targets, the parts of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from call_watch import Calls
from downstream_cases import CONFIG, PIECES, review_task, task_of, write_lines
from torch.nn.functional import cross_entropy

from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.configuration.task.task_config import load_task
from bert_ds.configuration.task.task_sections import QuestionAnsweringConfig
from bert_ds.corpus.tokenizer.wordpiece import TextRules, WordPieceTokenizer
from bert_ds.downstream.kinds import qa_kind
from bert_ds.downstream.kinds.heads import ChoiceHead
from bert_ds.downstream.kinds.split_rows import split_rows
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.rows.features import Feature
from bert_ds.downstream.rows.task_batches import step_batches
from bert_ds.downstream.scores.qa_scores import answer_scores
from bert_ds.downstream.tuning.task_rows import TaskRows, read_task
from bert_ds.downstream.untrained import masked_words
from bert_ds.downstream.untrained.minimal_pairs import pair_accuracies
from bert_ds.encoder.fused_ops import fused_ops

TOKENIZER = WordPieceTokenizer(PIECES, TextRules())


def rows_of(folder: Path, kind: str, fields: dict[str, str], rows: list[dict[str, Any]], **data: Any) -> TaskRows:
    """The rows of a task of sequences of 8 tokens that is trained on what it is measured on."""
    write_lines(folder / "rows", [json.dumps(row) for row in rows])
    files = {side: [{"path": "rows", "format": "jsonl"}] for side in ("train", "validation")}
    content = {**files, "fields": fields, "drop_overlap": False, **data}
    task = task_of(folder, {"kind": kind, "data": content, "max_seq_length": 8})
    return read_task(task, TOKENIZER, say=lambda text: None)


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({"validation_fraction": 0.25}, (30, 10)),
        ({"validation_fraction": 0.4}, (24, 16)),
        ({"max_train_rows": 7, "max_validation_rows": 3}, (7, 3)),
    ],
)
def test_rows_are_held_out_and_bounded_as_the_task_says(
    given: dict[str, Any], sizes: tuple[int, int], tmp_path: Path
) -> None:
    path = review_task(tmp_path)
    write_lines(tmp_path / "train.tsv", ["text\tlabel", *(f"film number {row}\tgood" for row in range(10, 50))])
    content = json.loads(path.read_text())
    content["data"] |= given
    path.write_text(json.dumps(content))
    task = load_task(path)
    found = split_rows(task, KINDS[task.kind], say=lambda text: None)
    assert (len(found.train), len(found.validation)) == sizes


def test_ranks_share_the_sequences_of_a_step_in_the_order_of_the_seed() -> None:
    ids = [np.array([2, 10 + number, 3], dtype=np.int32) for number in range(16)]
    features = [Feature(number, one, np.zeros(3, np.int8), {}) for number, one in enumerate(ids)]

    def seen(rank: int, *, seed: int) -> list[int]:
        split = BatchSplit(4, 2, 2)
        batches = step_batches(features, 0, seed=seed, rank=rank, split=split, count_targets=lambda group: {})
        return [token for batch in next(batches) for token in batch.input_ids_T.tolist() if token >= 10]

    assert sorted(seen(0, seed=3) + seen(1, seed=3)) == list(range(10, 26))
    assert len({tuple(seen(1, seed=seed)) for seed in (0, 3, 4)}) == 3


def test_each_of_several_labels_and_tags_of_a_row_is_renamed(tmp_path: Path) -> None:
    rows = [{"text": "we saw it", "labels": ["a", "b"]}]
    found = rows_of(tmp_path, "multi_label", {"text": "text", "labels": "labels"}, rows, rename_labels={"a": "z"})
    assert found.train.examples[0].target == ("z", "b")
    tagged = [{"words": ["we", "saw"], "tags": ["a", "b"]}]
    fields = {"words": "words", "tags": "tags"}
    found = rows_of(tmp_path, "token_classification", fields, tagged, rename_labels={"a": "z"})
    assert found.train.examples[0].target == ("z", "b")


def test_the_second_sequence_of_a_sentence_has_its_own_tags_and_no_intent(tmp_path: Path) -> None:
    long = {"words": ["film"] * 8, "tags": ["O"] * 6 + ["B-x", "I-x"], "intent": "seen"}
    short = {"words": ["it"], "tags": ["O"], "intent": "other"}
    fields = {"words": "words", "tags": "tags", "intent": "intent"}
    rows = rows_of(tmp_path, "intent_slot", fields, [long, short], tag_scheme="bio")
    first, second, _ = rows.train.features
    tags, intents = rows.labels["tag"], rows.labels["intent"]
    assert [[tags[i] for i in one.targets["tag"] if i >= 0] for one in (first, second)] == [["O"] * 6, ["B-x", "I-x"]]
    assert [one.targets["intent"].tolist() for one in (first, second)] == [[intents.index("seen")], [IGNORE_INDEX]]
    said = [[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
    summaries = [{"intent": one, "tags": [0]} for one in said]
    found = KINDS["intent_slot"].predict(rows.train.examples, rows.train.features, summaries, rows.labels)
    assert [prediction.value[0] for prediction in found] == [intents[1], intents[0]]


def test_answers_are_chosen_as_the_task_says(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = KINDS["question_answering"]
    settings = QuestionAnsweringConfig(rules="squad2", num_best=2, max_answer_pieces=5, null_threshold=-9.0)
    feature: Any = Mock(example=0, facts=Mock(settings=settings))
    calls = Calls(monkeypatch, qa_kind, best_candidates=[])
    kind.summarise(feature, {"token_scores": np.zeros((4, 2))})
    (given,) = calls["best_candidates"]
    assert (given["max_answer_pieces"], given["num_best"]) == (5, 2)
    example: Any = Mock(texts=("what", "the film is great"))
    spans = [[3.0, 0, 3], [2.0, 4, 8], [1.0, 9, 11]]
    (found,) = kind.predict([example], [feature], [[-5.0, spans]], {})
    assert [answer["text"] for answer in found.scores["answers"]] == ["the", "film"]
    assert found.value == ""  # no answer is 8 worse than the best one, which is less than 9


def test_a_question_without_an_answer_counts_nothing() -> None:
    head, drawn = ChoiceHead(CONFIG, ops=fused_ops("torch")).eval(), torch.Generator().manual_seed(0)
    for weight in head.parameters():  # empty until an encoder's row fills them
        torch.nn.init.normal_(weight, std=0.1, generator=drawn)
    hidden_ND = torch.randn(5, CONFIG.hidden_size, generator=drawn)
    stream: Any = Mock(sequence_ND=hidden_ND, dropout_seed=None)
    targets = {"choice": torch.tensor([1, IGNORE_INDEX]), "num_choices": torch.tensor([2, 3])}
    losses, _, found = head(stream, targets)
    wanted = cross_entropy(found["scores"][None, :2], torch.tensor([1]))
    assert losses.item() == pytest.approx(wanted.item(), rel=1e-5) and losses.item() > 0.01


def test_scores_of_what_is_not_trained_are_those_of_their_definitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[Any] = [Mock(pair=Mock(paradigm=name), is_right=name == "a") for name in "aaab"]
    assert pair_accuracies(judged) == {"accuracy": 0.5, "accuracy_a": 1.0, "accuracy_b": 0.0}
    at_threshold = answer_scores({"q": ["x"]}, {"q": "x"}, rules="squad2", no_answer_scores={"q": 1.0}, threshold=1.0)
    assert at_threshold["exact_match"] == 100.0  # only a better score than the threshold means no answer
    model: Any = Mock(vocab_size=9, encode=lambda text: np.arange(len(text.split()), dtype=np.int32))
    for name, text in (("one.txt", "we saw"), ("two.txt", "it was a film")):
        write_lines(tmp_path / name, [text])
    read = masked_words.read_pieces([tmp_path / "one.txt", tmp_path / "two.txt"], model)
    assert (read.document_ends.tolist(), len(read.ids), read.num_characters) == ([2, 6], 6, 19)
    monkeypatch.setattr(masked_words, "MAX_COUNTED_TOKENS", 3)
    assert masked_words._counts([tmp_path / "two.txt"], model).tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]
