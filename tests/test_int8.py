"""ONNX files of fine-tuned folders: the answers of predict, int8 matrices, and what they cost the task."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from downstream_cases import GOOD, PIECES, review_task, write_lines
from test_predictor import asked, written

import bert_ds
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.task.task_config import load_task
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.corpus.tokenizer.wordpiece import TextRules, WordPieceTokenizer
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.rows.features import Feature
from bert_ds.downstream.tuning import int8
from bert_ds.downstream.tuning.int8 import write_int8
from bert_ds.downstream.tuning.outcome import measure_side
from bert_ds.downstream.tuning.task_folder import read_task_folder
from bert_ds.downstream.tuning.task_rows import read_task
from bert_ds.encoder.hf_onnx import quantise, write_onnx
from bert_ds.export_hf import export_int8
from bert_ds.folders.replaced_folders import foreign_in_export, replaced_export
from bert_ds.launch.verb_arguments import export_hf_arguments


def numbers(value: Any) -> list[float]:
    """The numbers of an answer, in their order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for one in value for number in numbers(one)]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.campaign
@pytest.mark.parametrize("kind", ["question_answering", "sentence_embedding", "token_classification"])
def test_an_onnx_file_answers_like_its_folder_and_is_measured_in_int8_too(
    kind: str, tmp_path: Path, tiny_export: Path
) -> None:
    examples, _ = written(kind, tmp_path, tiny_export)
    rows = [asked(kind, example.texts) for example in examples]
    if kind == "sentence_embedding":
        rows = [text for example in examples for text in example.texts]
    for name in ("onnx", "int8"):
        (tmp_path / name).mkdir()
    write_onnx(tmp_path / "hf", tmp_path / "onnx")
    wanted, found = (bert_ds.load_predictor(tmp_path / name)(rows, batch_size=2) for name in ("hf", "onnx"))
    assert [list(answer) for answer in found] == [list(answer) for answer in wanted]
    assert numbers(found) == pytest.approx(numbers(wanted), abs=1e-4)
    task = load_task(tmp_path / "task.json")
    check = write_int8(tmp_path / "hf", tmp_path / "int8", task, say=lambda text: None)
    model, labels = read_task_folder(tmp_path / "hf", KINDS[kind], kernels="torch")
    side = read_task(task, load_tokenizer(tmp_path / "hf"), labels=labels, say=lambda text: None)
    figures = measure_side(model, task, side.validation, side.labels).figures
    assert check.fp32 == pytest.approx(figures[check.metric], abs=1e-3)
    assert len(bert_ds.load_predictor(tmp_path / "int8")(rows)) == len(rows)


def test_the_verb_says_the_metric_in_both_and_predict_takes_either_file(
    tmp_path: Path, tiny_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = review_task(tmp_path, rows=12)
    examples, _ = written("classification", tmp_path, tiny_export, task)
    (tmp_path / "task_config.json").write_text(task.read_text(encoding="utf-8"), encoding="utf-8")
    model = tmp_path / "hf"
    args = export_hf_arguments(["--model", str(model), "--onnx", "--int8"])
    (tmp_path / "onnx").mkdir()

    def kept(path: Path) -> None:
        shutil.copytree(path.parent, tmp_path / "onnx", dirs_exist_ok=True)
        quantise(path)

    monkeypatch.setattr(int8, "quantise", kept)
    with replaced_export(model / "onnx_int8") as folder:
        said = export_int8(model, folder, args.task, shown=model / "onnx_int8")
    assert foreign_in_export(model) is None
    facts = json.loads((model / "onnx_int8/config.json").read_text())["onnx"]
    assert facts["num_rows"] == len(examples) and facts["matrices"] == "int8" and facts["metric"] == "accuracy"
    assert f"accuracy of tiny {facts['fp32']:.4f} in fp32, {facts['int8']:.4f} in int8" in said
    assert facts["int8_bytes"] == (model / "onnx_int8/model.onnx").stat().st_size < facts["fp32_bytes"]
    graph = onnx.load(model / "onnx_int8/model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulInteger") >= 6 * 2, "the matrices of both layers are multiplied in int8"
    texts = ["the film is great", "a dull play", ""]
    folders = (model, tmp_path / "onnx", model / "onnx_int8")
    wanted, fp32, small = (bert_ds.load_predictor(folder)(texts) for folder in folders)
    assert numbers(fp32) == pytest.approx(numbers(wanted), abs=1e-5) and fp32[2]["error"] == "text is empty"
    assert numbers(small) == pytest.approx(numbers(wanted), abs=0.1) and numbers(small) != numbers(fp32)


class Answers:
    """What is right of two classes in an order that is not the task's, or that all is good."""

    labels: ClassVar[dict[str, Any]] = {"label": ("good", "bad")}

    def __init__(self, folder: Path, kind: str) -> None:
        self._is_small = (folder / "model.onnx").stat().st_size < 1000

    def __call__(self, features: Sequence[Feature]) -> list[dict[str, np.ndarray]]:
        good = {PIECES.index(word) for word in GOOD}
        are_good = [self._is_small or bool(good & {*one.input_ids.tolist()}) for one in features]
        return [{"scores": np.array([[1.0, 0.0] if is_good else [0.0, 1.0]])} for is_good in are_good]


def test_each_file_is_measured_by_its_own_scores_of_the_validation_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = {"train": ["great\tgood", "it is dull\tbad"], "validation": ["great\tgood"]}
    sides["validation"] += ["the film is very dull\tbad", "the play is great\tgood"]  # the longest is computed first
    for name, rows in sides.items():
        write_lines(tmp_path / name, ["text\tlabel", *rows])
    data = {name: [{"path": name, "format": "tsv"}] for name in sides} | {"drop_overlap": False}
    data |= {"fields": {"text": "text", "label": "label"}}
    task = load_task(review_task(tmp_path, data=data, metric="macro_f1", evaluation={"batch_size": 2}))

    def write(model: Path, folder: Path) -> None:
        (folder / "model.onnx").write_bytes(bytes(2000))
        (folder / "config.json").write_text("{}")

    tokenizer = WordPieceTokenizer(PIECES, TextRules())
    for name, fake in {
        "kind_of": lambda folder: "classification",
        "write_onnx": write,
        "load_tokenizer": lambda folder: tokenizer,
        "check_tokenizer": lambda folder, **identity: None,
        "make_scorer": Answers,
        "quantise": lambda path: path.write_bytes(bytes(500)),
    }.items():
        monkeypatch.setattr(int8, name, fake)
    check = write_int8(tmp_path, tmp_path, task, say=print)
    assert check == int8.Int8Check("macro_f1", 1.0, pytest.approx(0.4), 3, 2000, 500)


def test_int8_wants_the_task_of_the_folder_and_onnxruntime(
    tmp_path: Path, tiny_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="does not lie in the run that made it: wanted --task, and --data with it"):
        export_hf_arguments(["--model", str(tiny_export), "--onnx", "--int8"])
    written("regression", tmp_path, tiny_export)
    (tmp_path / "task_config.json").write_bytes((tmp_path / "task.json").read_bytes())
    words = ["--model", str(tmp_path / "hf"), "--onnx", "--int8"]
    named = export_hf_arguments([*words, "--task", str(review_task(tmp_path / "named"))]).task
    assert (export_hf_arguments(words).task.kind, named.kind) == ("regression", "classification")
    task = load_task(review_task(tmp_path / "other"))
    with pytest.raises(
        ConfigError, match="was fine-tuned for regression, the task tiny is classification: wanted its own"
    ):
        write_int8(tmp_path / "hf", tmp_path, task, say=print)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else sys)
    with pytest.raises(ConfigError, match="onnxruntime not installed: --onnx wants pip install onnx onnxscript"):
        write_int8(tmp_path / "hf", tmp_path, load_task(tmp_path / "task.json"), say=print)
