"""Texts that have to find their partners: rows, bad rows, settings, and a whole run with its export."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from downstream_cases import BAD, CONFIG, GOOD, PIECES, write_lines, write_task, write_tiny_export
from forked_verbs import run_verb
from sentence_transformers import SentenceTransformer

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.deepspeed_file.ds_config import load_ds_config
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.configuration.task.task_checks import checked_split
from bert_ds.configuration.task.task_config import load_task, trained_task
from bert_ds.corpus.tokenizer.wordpiece import TextRules, WordPieceTokenizer
from bert_ds.downstream.kinds.embedding_kind import folder_settings
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.scores.ranking import cosine_ranks, ranking_figures
from bert_ds.downstream.tuning.predictor import Predictor
from bert_ds.downstream.tuning.task_folder import TaskFacts, make_task_model, write_task_folder
from bert_ds.downstream.tuning.task_rows import TaskRows, read_task

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = WordPieceTokenizer(PIECES, TextRules())
KIND = KINDS["sentence_embedding"]
FILE = {"path": "rows.jsonl", "format": "jsonl"}
CONTRASTIVE = {"loss": "contrastive"}


def task_file(folder: Path, rows: Any, *, fields: Any = (), section: Any = CONTRASTIVE, **more: Any) -> Path:
    write_lines(folder / "rows.jsonl", [json.dumps(row) for row in rows])
    data = {"train": [FILE], "validation": [FILE], "drop_overlap": False}
    data["fields"] = {"text": "q", "text_pair": "p", **dict(fields)}
    return write_task(folder, {"kind": "sentence_embedding", "data": data, "sentence_embedding": section, **more})


def rows_of(path: Path) -> TaskRows:
    return read_task(load_task(path), TOKENIZER, say=print)


def test_a_row_is_a_text_its_partner_and_its_negatives_each_behind_its_prompt(tmp_path: Path) -> None:
    prompts = {**CONTRASTIVE, "query_prompt": "we ", "passage_prompt": "it "}
    rows = [{"q": "paris", "p": "london", "n": ["a play", "in"], "m": "the"}]
    path = task_file(tmp_path, rows, fields={"negatives": ["n", "m"]}, section=prompts)
    (feature,) = rows_of(path).train.features
    text = TOKENIZER.decode(feature.input_ids.tolist())
    words = ("we paris", "it london", "it a play", "it in", "it the")
    assert text == " ".join(f"[CLS] {one} [SEP]" for one in words)
    assert feature.lengths == (4, 4, 5, 4, 4)
    assert feature.targets["partner"].tolist() == [0]
    assert feature.targets["texts"].shape == (1, 5)
    assert len(set(feature.targets["texts"][0].tolist())) == 5
    assert KIND.count_targets([feature]) == {"pair": 1.0}


def test_equal_texts_have_equal_numbers_whatever_their_prompts_are(tmp_path: Path) -> None:
    section = {**CONTRASTIVE, "query_prompt": "we "}
    features = rows_of(
        task_file(tmp_path, [{"q": "it", "p": "it"}, {"q": "in", "p": "it"}], section=section)
    ).train.features
    (a, b), (c, d) = (feature.targets["texts"][0].tolist() for feature in features)
    assert a == b == d != c


def test_of_scored_rows_the_good_ones_have_to_be_found(tmp_path: Path) -> None:
    rows = [{"q": "it", "p": "in", "s": 4.5}, {"q": "it", "p": "we", "s": 1}]
    features = rows_of(task_file(tmp_path, rows, fields={"score": "s"})).train.features
    assert [feature.targets["partner"].tolist() for feature in features] == [[0], [IGNORE_INDEX]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "it", "p": " ", "n": "in"}, "jsonl:2: text_pair is empty, wanted text"),
        ({"q": "", "p": "it", "n": "in"}, "jsonl:2: text is empty, wanted text"),
        ({"q": "we", "p": "it", "n": ""}, 'jsonl:2: one of the negatives is "", wanted text'),
        ({"q": "we", "p": "it", "n": ["in", 3]}, "jsonl:2: one of the negatives is 3, wanted text"),
        ({"q": "we", "p": "it", "n": ["in", "a"]}, "jsonl:2: 2 negatives, wanted 1 as in the first row"),
        ({"q": "we", "p": "it"}, 'jsonl:2 has no column "n"'),
    ],
)
def test_a_row_with_an_empty_side_is_refused_with_its_line(tmp_path: Path, row: Any, message: str) -> None:
    rows = [{"q": "we", "p": "it", "n": "in"}, row]
    with pytest.raises(DataError, match=message):
        rows_of(task_file(tmp_path, rows, fields={"negatives": "n"}))


@pytest.mark.parametrize(
    ("fields", "section", "metric", "message"),
    [
        ({}, {"loss": "cosine"}, None, 'data.fields.score: is missing, .* sentence_embedding.loss is "cosine"'),
        ({}, {"loss": "cosent"}, None, 'data.fields.score: is missing, .* sentence_embedding.loss is "cosent"'),
        ({"score": "s", "negatives": "n"}, CONTRASTIVE, None, "data.fields.negatives: is for .* without a score"),
        ({}, CONTRASTIVE, "spearman", 'metric: "spearman" is of rows with a score'),
        ({"score": "s"}, CONTRASTIVE, "mrr", 'metric: "mrr" is of rows without a score'),
        ({}, {**CONTRASTIVE, "matryoshka": [0]}, None, "sentence_embedding.matryoshka"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, fields: Any, section: Any, metric: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_task(task_file(tmp_path, [{}], fields=fields, section=section, metric=metric))


def test_a_size_beyond_the_vector_is_refused(tmp_path: Path) -> None:
    task = load_task(task_file(tmp_path, [{}], section={**CONTRASTIVE, "matryoshka": [8, 33]}))
    ds = load_ds_config(ROOT / "ds_configs/zero0.json")
    with pytest.raises(ConfigError, match=r"sentence_embedding.matryoshka: 33 is more than the model's hidden_size 32"):
        checked_split(trained_task(task, CONFIG, num_sequences=8), ds, 1)


def test_the_metric_goes_with_the_rows(tmp_path: Path) -> None:
    assert load_task(task_file(tmp_path, [{}])).chosen_metric == "ndcg_10"
    assert load_task(task_file(tmp_path, [{}], fields={"score": "s"})).chosen_metric == "spearman"


def test_all_partners_of_a_text_are_to_be_found_among_all_texts_of_the_side(tmp_path: Path) -> None:
    rows = [
        {"q": "it", "p": "a film", "n": "in"},
        {"q": "it", "p": "a play", "n": "the"},
        {"q": "we", "p": "a film", "n": "is"},
    ]
    side = rows_of(task_file(tmp_path, rows, fields={"negatives": "n"})).train
    vectors = {
        "it": (1, 0),
        "we": (0, 1),
        "a film": (1, 1),
        "a play": (1, 0),
        "in": (3, 1),
        "the": (0, 2),
        "is": (-1, 0),
    }
    summaries = [
        KIND.summarise(feature, {"vectors": np.array([vectors[text] for text in example.texts])})
        for feature, example in zip(side.features, side.examples, strict=True)
    ]
    found = KIND.predict(side.examples, side.features, summaries, {})
    assert [prediction.value for prediction in found] == [(1, 3), (1, 3), (2,)]
    assert KIND.measure(side.examples, found, {})["mrr"] == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert KIND.prediction_files(side.examples, found)["predictions.tsv"].split() == [
        "index",
        "prediction",
        "0",
        "1,3",
        "1",
        "1,3",
        "2",
        "2",
    ]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_export: Path) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rows = [
        {"q": f"the {word} film", "p": f"{word} play {place}"}
        for word in (*GOOD, *BAD)
        for place in ("paris", "london")
    ]
    section = {**CONTRASTIVE, "pooling": "cls", "query_prompt": "we ", "passage_prompt": "it ", "matryoshka": [8]}
    training = {"epochs": 2, "train_batch_size": 10, "kernels": "torch", "log_every_steps": 1, "precision": "fp32"}
    path = task_file(folder, rows, section=section, training=training, optimizer={"type": "adamw", "lr": 1e-3})
    files = ("--task", path, "--model", tiny_export, "--deepspeed_config", ROOT / "ds_configs/zero1.json")
    done = run_verb(ROOT / "bert_ds/finetune.py", *files, "--run_dir", folder / "run", "--trivial")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_run_is_measured_with_the_pooling_and_the_prompts_that_sentence_transformers_reads(run_dir: Path) -> None:
    rows = [json.loads(line) for line in (run_dir.parent / "rows.jsonl").read_text().splitlines()]
    theirs = SentenceTransformer(str(run_dir / "hf"), device="cpu")
    queries, passages = list(dict.fromkeys(row["q"] for row in rows)), [row["p"] for row in rows]
    wanted = [[place for place, row in enumerate(rows) if row["q"] == query] for query in queries]
    found = cosine_ranks(theirs.encode_query(queries), theirs.encode_document(passages), wanted)
    results = json.loads((run_dir / "results.json").read_text())
    measured = {name: results["validation"][name] for name in ranking_figures(found)}
    assert measured == pytest.approx(ranking_figures(found), abs=1e-6)
    assert results["metric"] == "ndcg_10"
    assert set(results["trivial"]) == set(measured)
    assert results["trivial"]["recall_10"] == 1.0, "BM25 sees the adjective"


def test_a_mean_over_layers_is_that_of_sentence_transformers(tmp_path: Path) -> None:
    write_tiny_export(tmp_path / "export")
    section = {**CONTRASTIVE, "pooling": "last_layers", "pooled_layers": 2}
    task = load_task(task_file(tmp_path, [{"q": "it", "p": "we"}], section=section))
    model = make_task_model(KIND, CONFIG, {}, kernels="torch", init_seed=5, settings=task.own_section)
    facts = TaskFacts("tiny", "sentence_embedding", {}, TOKENIZER.fingerprint, 24, {}, settings=task.own_section)
    write_task_folder(tmp_path / "hf", model, facts=facts, tokenizer=tmp_path / "tokenizer")
    theirs = SentenceTransformer(str(tmp_path / "hf"), device="cpu")
    texts = ["the film is dull", "we"]
    found = [answer["vector"] for answer in Predictor(tmp_path / "hf")(texts)]
    assert np.allclose(found, theirs.encode(texts), atol=1e-5)
    shutil.copytree(tmp_path / "hf", tmp_path / "onnx", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "onnx/model.onnx").touch()
    with pytest.raises(ConfigError, match=r"model.onnx gives the last layer, its vectors are of several"):
        Predictor(tmp_path / "onnx")


def test_more_layers_than_there_are_is_refused(tmp_path: Path) -> None:
    task = load_task(task_file(tmp_path, [{}], section={**CONTRASTIVE, "pooling": "last_layers", "pooled_layers": 9}))
    ds = load_ds_config(ROOT / "ds_configs/zero0.json")
    with pytest.raises(
        ConfigError, match=r"sentence_embedding.pooled_layers: 9 is more than the model's num_hidden_layer"
    ):
        checked_split(trained_task(task, CONFIG, num_sequences=8), ds, 1)


def test_the_folder_says_how_it_pools_and_is_read_so_again(run_dir: Path, tmp_path: Path) -> None:
    settings = folder_settings(run_dir / "hf")
    assert (settings.pooling, settings.query_prompt, settings.passage_prompt) == ("cls", "we ", "it ")
    theirs = SentenceTransformer(str(run_dir / "hf"), device="cpu").encode(["the film is dull"])[0]
    (answer,) = Predictor(run_dir / "hf")(["the film is dull"])
    assert answer["vector"] == pytest.approx(theirs.tolist(), abs=1e-5)
    rows = [{"query": "the film"}, {"passage": "the film"}, {"text": "we the film"}, {"query": " "}]
    query, passage, whole, empty = Predictor(run_dir / "hf")(rows)
    assert query == whole != passage
    assert empty["error"] == "text is empty"
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode": "mean"}')
    assert folder_settings(tmp_path).pooling == "mean"
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode": ["max", "mean"]}')
    with pytest.raises(ConfigError, match="pools by max, mean_tokens, wanted one of mean and cls"):
        folder_settings(tmp_path)
