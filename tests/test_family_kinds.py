"""Every kind of task on every family: a step, the folder, what transformers and sentence-transformers make of it."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from downstream_cases import PIECES, review_task, tokenizer_of, write_tiny_export
from encoder_cases import spread_weights
from family_cases import EVERY_FAMILY, OWN_LAYERS, WIRED, of_size
from forked_verbs import run_verb
from sentence_transformers import SentenceTransformer
from test_embedding_kind import pair_task
from test_qa_kind import qa_task, write_questions
from test_task_kinds import SETTINGS, write_kind
from tiny_training import join_alone

from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.task.task_config import load_task
from bert_ds.configuration.task.task_sections import FreezeConfig
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.kinds.task_model import TaskModel
from bert_ds.downstream.rows.task_batch import pack
from bert_ds.downstream.tuning.outcome import measure_side
from bert_ds.downstream.tuning.task_engine import freeze, layer_lr_scale
from bert_ds.downstream.tuning.task_folder import TaskFacts, make_task_model, read_task_folder, write_task_folder
from bert_ds.downstream.tuning.task_rows import TaskRows, read_task
from bert_ds.encoder.pretrained import load_pretrained
from bert_ds.reporting.run_log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
CAMPAIGN = pytest.mark.campaign


def task_file(kind: str, folder: Path) -> Path:
    if kind == "question_answering":
        return qa_task(write_questions(folder))
    return pair_task(folder) if kind == "sentence_embedding" else write_kind(kind, folder)


def model_of(kind: str, config: EncoderConfig, rows: TaskRows) -> TaskModel:
    config = of_size(config, vocab_size=len(PIECES)).with_dropout(0.1)
    model = make_task_model(KINDS[kind], config, rows.labels, kernels="torch")
    spread_weights(model, config, scale=0.3)
    return model


CLASSES = ("classification", "token_classification", "multiple_choice", "question_answering", "sentence_embedding")
"""A kind for each class that transformers has of a family."""


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        pytest.param(
            *(kind, config), id=f"{name}-{kind}", marks=() if name in OWN_LAYERS or kind in CLASSES else CAMPAIGN
        )
        for name, config in WIRED.items()
        for kind in (*SETTINGS, "question_answering", "sentence_embedding")
    ],
)
def test_a_kind_learns_is_written_is_read_and_opened(kind: str, config: EncoderConfig, tmp_path: Path) -> None:
    join_alone()
    tokenizer, task = tokenizer_of(config), load_task(task_file(kind, tmp_path))
    tokenizer.save(tmp_path / "tokenizer")
    rows = read_task(task, tokenizer, say=lambda text: None)
    model = model_of(kind, config, rows).train()
    features = rows.train.features
    batch = pack(features, counts=KINDS[kind].count_targets(features))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    losses, _ = model(**batch.model_inputs(), dropout_seed=torch.tensor([5]))
    losses.sum().backward()
    optimizer.step()
    still = {name for name, weight in model.named_parameters() if torch.equal(before[name], weight)}
    assert all(weight.grad is not None for weight in model.parameters())
    assert {name for name in still if not name.endswith("bias")} == set()  # a softmax does not see some biases

    facts = TaskFacts("tiny", kind, rows.labels, tokenizer.fingerprint, 24, {})
    write_task_folder(tmp_path / "hf", model, facts=facts, tokenizer=tmp_path / "tokenizer")
    read, labels = read_task_folder(tmp_path / "hf", KINDS[kind], kernels="torch")
    assert labels == rows.labels
    found = measure_side(model.eval(), task, rows.validation, labels)
    assert measure_side(read, task, rows.validation, labels) == found
    check_opened(kind, found.predictions, rows, tmp_path / "hf")


def begins_word(piece: str, *, spaced: bool) -> bool:
    """Whether a piece of one of our two tokenizers is the first of a word."""
    return piece.startswith("▁") if spaced else not piece.startswith("##")


def check_opened(kind: str, predictions: Any, rows: TaskRows, folder: Path) -> None:
    """Compare our predictions with what transformers' pipelines make of the texts."""
    pairs = [example.texts for example in rows.validation.examples]
    if kind == "sentence_embedding":
        opened = SentenceTransformer(str(folder), device="cpu")
        left, right = (opened.encode([pair[side] for pair in pairs], convert_to_tensor=True) for side in (0, 1))
        wanted = torch.nn.functional.cosine_similarity(left, right).tolist()
        assert [found.value for found in predictions] == pytest.approx(wanted, abs=1e-5)
    for form in KINDS[kind].hf_forms:
        source = str(folder / form.folder)
        facts = json.loads((folder / form.folder / "tokenizer_config.json").read_text())
        names = transformers.AutoTokenizer.from_pretrained(source)("a", "b")
        has_segments = getattr(transformers.AutoConfig.from_pretrained(source), "type_vocab_size", 0) > 1
        assert ("token_type_ids" in names) == ("token_type_ids" in facts["model_input_names"]) == has_segments
        if form.pipeline == "text-classification":
            open_form = transformers.pipeline(form.pipeline, model=source, device="cpu", top_k=None)
            for texts, found in zip(pairs, predictions, strict=True):
                text = dict(zip(("text", "text_pair"), texts, strict=False))
                answer = open_form(text if kind != "intent_slot" else {"text": " ".join(texts)})
                best = max(answer, key=lambda one: one["score"])
                if kind == "regression":
                    assert best["score"] == pytest.approx(found.value, abs=1e-5)
                elif kind == "multi_label":
                    assert tuple(sorted(one["label"] for one in answer if one["score"] > 0.5)) == found.value
                else:
                    assert best["label"] == (found.value[0] if kind == "intent_slot" else found.value)
        elif form.pipeline:
            open_form = transformers.pipeline(form.pipeline, model=source, device="cpu", ignore_labels=[])
            spaced = open_form.tokenizer.mask_token == "<mask>"
            for texts, found in zip(pairs, predictions, strict=True):
                tags = [one["entity"] for one in open_form(" ".join(texts)) if begins_word(one["word"], spaced=spaced)]
                assert tags == list(found.value[1] if kind == "intent_slot" else found.value)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=() if name in (*OWN_LAYERS, "albert") else CAMPAIGN)  # its layers are one
        for name, config in WIRED.items()
    ],
)
def test_the_verb_fine_tunes_at_stage_3_and_a_student_learns_from_what_it_made(
    config: EncoderConfig, tmp_path: Path
) -> None:
    encoder = of_size(config, vocab_size=len(PIECES))
    model = write_tiny_export(tmp_path / "export", has_pair_head=False, encoder=encoder)
    task = review_task(tmp_path / "task", rows=16, training={"epochs": 1, "train_batch_size": 8, "precision": "fp32"})
    files = ("--task", task, "--model", model, "--deepspeed_config", ROOT / "ds_configs/zero3.json")
    slower, first, last = ("--set=layerwise_lr_decay=0.5", "--set=freeze.layers=1"), "bert.layer.0.", "bert.layer.1."
    if config.shares_layers:
        slower, first, last = ("--set=freeze.embeddings=true",), "bert.embeddings.", "bert.layer.0."
    taught = (f"--set=distillation.teacher={tmp_path / 'teacher/hf'}",)
    for name, settings in (("teacher", slower), ("student", taught)):
        done = run_verb(ROOT / "bert_ds/finetune.py", *files, "--run_dir", tmp_path / name, *settings)
        assert done.returncode == 0, done.stdout + done.stderr
        read, _ = read_task_folder(tmp_path / name / "hf", KINDS["classification"], kernels="torch")
        begun = load_pretrained(model).tensors
        moved = {key for key, weight in read.state_dict().items() if key in begun and not weight.equal(begun[key])}
        assert any(key.startswith(last) for key in moved)
        assert any(key.startswith(first) for key in moved) == (name == "student")
    assert any(row.get("loss_soft") for row in read_metrics(tmp_path / "student/metrics.jsonl"))


@EVERY_FAMILY
def test_frozen_is_what_is_below_the_head_and_rates_fall_from_layer_to_layer(
    config: EncoderConfig, tmp_path: Path
) -> None:
    rows = read_task(load_task(task_file("classification", tmp_path)), tokenizer_of(config), say=print)
    model = model_of("classification", config, rows)
    names = [name for name, _ in model.named_parameters()]
    number = freeze(model, FreezeConfig(encoder=True))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    front = {name for name in names if name.startswith(("bert.pooler.", "bert.front."))}
    assert front and trained == front | {"head.classifier.weight", "head.classifier.bias"}
    assert number == sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    layers = config.num_hidden_layers
    rates = {name: layer_lr_scale(name, layers, 0.5) for name in names}
    for name, rate in rates.items():
        place = layers + 1 if "embeddings" in name else layers - int(name.split(".")[2]) if ".layer." in name else 0
        assert rate == 0.5 ** (1 if "final_norm" in name else place), name
