"""Queries that have to find passages of a corpus, by a folder as it is and by BM25 beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from downstream_cases import GOOD, write_lines, write_task
from forked_verbs import run_verb

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.task.task_config import TaskConfig, load_task
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.rows.features import encode_text, wrap
from bert_ds.downstream.scores.ranking import ranking_figures
from bert_ds.downstream.tuning.predictor import Predictor
from bert_ds.downstream.tuning.reranking import ranks_of, reranked
from bert_ds.downstream.tuning.retrieval import read_collection, score_retrieval
from bert_ds.downstream.tuning.task_folder import TaskFacts, make_task_model, write_task_folder
from bert_ds.encoder.pretrained import load_pretrained, make_encoder

ROOT = Path(__file__).resolve().parents[1]
PASSAGES = [
    {"k": f"p{number}", "t": f"the {word} play in {place}"}
    for number, (word, place) in enumerate([(word, place) for word in GOOD for place in ("paris", "london")])
]
QUERIES = [
    {"q": "a great film in paris", "r": ["p2", "p3"], "i": "first"},
    {"q": "superb london", "r": "p7", "i": "second"},
]
BY_ID = {"text": "q", "relevant": "r", "id": "i", "passage": "t", "passage_id": "k"}


def task_file(folder: Path, queries: Any, passages: Any, fields: Any, **more: Any) -> Path:
    write_lines(folder / "queries.jsonl", list(map(json.dumps, queries)))
    write_lines(folder / "corpus.jsonl", list(map(json.dumps, passages)))
    data = {"validation": [{"path": "queries.jsonl", "format": "jsonl"}], "fields": fields, **more}
    if passages:
        data["corpus"] = [{"path": "corpus.jsonl", "format": "jsonl"}]
    return write_task(folder, {"kind": "retrieval", "data": data, "max_seq_length": 8})


def by_id(folder: Path, queries: Any = QUERIES, passages: Any = PASSAGES, **more: Any) -> TaskConfig:
    return load_task(task_file(folder, queries, passages, BY_ID, **more))


def test_relevant_passages_are_named_by_their_ids(tmp_path: Path) -> None:
    found = read_collection(by_id(tmp_path))
    assert found.ids == ["first", "second"]
    assert found.queries == [query["q"] for query in QUERIES]
    assert found.wanted == [[2, 3], [7]]
    assert found.passages == [passage["t"] for passage in PASSAGES]
    assert len(read_collection(by_id(tmp_path, max_validation_rows=1)).ids) == 1


def test_or_they_stand_in_the_rows_and_a_question_that_comes_twice_is_one(tmp_path: Path) -> None:
    rows = [
        {"q": "it", "p": "a play"},
        {"q": "we", "p": "a film"},
        {"q": "it", "p": "a book"},
        {"q": "it", "p": "a play"},
    ]
    fields = {"text": "q", "text_pair": "p"}
    found = read_collection(load_task(task_file(tmp_path, rows, [], fields)))
    assert found[1:] == (["it", "we"], [[0, 2], [1]], ["a play", "a film", "a book"])
    more = [{"t": "a film"}, {"t": "a story"}]
    found = read_collection(load_task(task_file(tmp_path, rows, more, {**fields, "passage": "t"})))
    assert found[2:] == ([[2, 3], [0]], ["a film", "a story", "a play", "a book"])


@pytest.mark.parametrize(
    ("query", "passage", "message"),
    [
        (
            {"q": "we", "r": [], "i": "x"},
            None,
            "queries.jsonl:3: relevant is an empty list, wanted the id of at least one",
        ),
        ({"q": "we", "r": None, "i": "x"}, None, "queries.jsonl:3: relevant is null, wanted the id of at least one"),
        ({"q": "we", "r": "p99", "i": "x"}, None, 'queries.jsonl:3: relevant is "p99", which is no passage_id of data'),
        ({"q": " ", "r": "p1", "i": "x"}, None, "queries.jsonl:3: text is empty"),
        ({"q": "we", "r": "p1", "i": "first"}, None, 'queries.jsonl:3: id "first" is also at .*queries.jsonl:1'),
        (None, {"k": "p1", "t": "it"}, 'corpus.jsonl:11: passage_id "p1" is also at .*corpus.jsonl:2'),
        (None, {"k": "p10", "t": ""}, "corpus.jsonl:11: passage is empty"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path: Path, query: Any, passage: Any, message: str) -> None:
    queries, passages = [*QUERIES, *[query] * bool(query)], [*PASSAGES, *[passage] * bool(passage)]
    with pytest.raises(DataError, match=message):
        read_collection(by_id(tmp_path, queries, passages))


@pytest.mark.parametrize(
    ("fields", "passages", "message"),
    [
        ({"text": "q"}, PASSAGES, "data.fields.relevant: give exactly one of it"),
        ({**BY_ID, "text_pair": "t"}, PASSAGES, "data.fields.relevant: give exactly one of it"),
        (BY_ID, [], "data.corpus: is empty, wanted the passages that data.fields.relevant names"),
        ({"text": "q", "relevant": "r", "passage": "t"}, PASSAGES, "data.fields.passage_id: is missing"),
        ({"text": "q", "text_pair": "r"}, PASSAGES, "data.fields.passage: is missing"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, fields: Any, passages: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_task(task_file(tmp_path, QUERIES, passages, fields))


def test_a_corpus_is_for_retrieval_alone(tmp_path: Path) -> None:
    path = task_file(tmp_path, QUERIES, PASSAGES, BY_ID)
    with pytest.raises(ConfigError, match=r"data.corpus: is for retrieval tasks, the kind is minimal_pairs"):
        load_task(path, ['kind="minimal_pairs"'])


def test_a_folder_is_scored_by_its_pooling_and_its_prompts(tmp_path: Path, tiny_export: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_export, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode": "cls"}')
    prompts = {"prompts": {"query": "we saw ", "document": "it is "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    tokenizer, task = load_tokenizer(folder), by_id(tmp_path)
    said: list[str] = []
    found = score_retrieval(folder, tokenizer, task, said.append)
    pretrained = load_pretrained(folder)
    encoder = make_encoder(pretrained.config, pretrained.tensors, kernels="torch")

    def vector(text: str) -> torch.Tensor:
        ids, types = wrap(tokenizer, [encode_text(tokenizer, text)[:6]])
        bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
        inputs = {"position_ids_T": torch.arange(len(ids)), "cu_seqlens": bounds, "max_seqlen": len(ids)}
        row = encoder(torch.tensor(ids).long(), torch.tensor(types).long(), **inputs)[0]
        return row / row.norm()

    passages = torch.stack([vector("it is " + passage["t"]) for passage in PASSAGES])
    ranks = []
    for query, places in zip(QUERIES, ([2, 3], [7]), strict=True):
        order = (passages @ vector("we saw " + query["q"])).argsort(descending=True, stable=True).tolist()
        ranks.append(tuple(sorted(order.index(place) + 1 for place in places)))
    assert found.figures == pytest.approx(ranking_figures(ranks))
    shown = [",".join(map(str, places)) for places in ranks]
    assert found.files["predictions.tsv"].split() == ["index", "prediction", "first", shown[0], "second", shown[1]]
    assert found.parts["bm25"]["recall_1"] == pytest.approx(0.75)
    assert found.facts == {"rows": {"validation": 2, "corpus": 10}}
    assert said[0] == "2 queries, 10 passages"


def test_places_behind_the_depth_stay() -> None:
    assert ranks_of([[4, 7], [1, 0]], [(1, 9), (2,)], [[4, 3], [0]]) == [(1, 9), (2,)]
    assert ranks_of([[7, 4]], [(1, 3)], [[4, 5]]) == [(2, 3)]


def written(folder: Path, kind: str, labels: Any, export: Path) -> Path:
    """Write a folder of random weights as a fine-tuning of a kind leaves it."""
    config, fingerprint = load_pretrained(export).config, load_tokenizer(export).fingerprint
    model = make_task_model(KINDS[kind], config, labels, kernels="torch", init_seed=4)
    write_task_folder(folder, model, facts=TaskFacts("tiny", kind, labels, fingerprint, 24, {}), tokenizer=export)
    return folder


def test_a_cross_encoder_puts_the_first_passages_into_its_own_order(tmp_path: Path, tiny_export: Path) -> None:
    reranker = written(tmp_path / "hf", "classification", {"label": ("apart", "together")}, tiny_export)
    path = task_file(tmp_path, QUERIES, PASSAGES, BY_ID)
    found = {}
    for depth in (1, 10):
        section = {"reranker": str(reranker), "depth": depth}
        path.write_text(json.dumps({**json.loads(path.read_text()), "retrieval": section}))
        found[depth] = score_retrieval(tiny_export, load_tokenizer(tiny_export), load_task(path), lambda text: None)
    assert found[1].parts["reranked"] == found[1].figures
    predictor, ranks = Predictor(reranker), []
    for query, places in zip(QUERIES, ([2, 3], [7]), strict=True):
        answers = predictor([(query["q"], passage["t"]) for passage in PASSAGES])
        order = np.argsort([-answer["probabilities"]["together"] for answer in answers]).tolist()
        ranks.append(tuple(sorted(order.index(place) + 1 for place in places)))
    assert found[10].parts["reranked"] == pytest.approx(ranking_figures(ranks))
    assert found[10].parts["reranked"] != found[10].figures, "another order was to be tried"


def test_a_reranker_of_another_kind_is_refused(tmp_path: Path, tiny_export: Path) -> None:
    folder = written(tmp_path / "hf", "sentence_embedding", {}, tiny_export)
    with pytest.raises(ConfigError, match="is of kind sentence_embedding, wanted regression or classification"):
        reranked(folder, [], [], [], batch_size=1)


def test_the_verb_says_the_figures_of_both(tmp_path: Path, tiny_export: Path) -> None:
    path = task_file(tmp_path, QUERIES, PASSAGES, BY_ID)
    done = run_verb(ROOT / "bert_ds/score.py", "--model", tiny_export, "--task", path, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "tiny, validation: ndcg_10" in done.stdout
    assert "tiny, bm25: ndcg_10" in done.stdout
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["metric"] == "ndcg_10"
    assert results["bm25"]["recall_1"] == pytest.approx(0.75)
    assert results["rows"] == {"validation": 2, "corpus": 10}
