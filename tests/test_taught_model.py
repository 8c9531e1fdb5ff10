"""Distillation of a task: the loss term against its formula, runs under the launcher, teachers that do not fit."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from downstream_cases import CONFIG, review_task, task_of, write_lines, write_task
from forked_verbs import run_verb

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.configuration.task.task_config import TaskConfig, load_task
from bert_ds.configuration.task.task_sections import TaskDistillationConfig
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.kinds.task_model import TaskModel
from bert_ds.downstream.rows.task_batch import pack
from bert_ds.downstream.tuning.task_folder import make_task_model
from bert_ds.downstream.tuning.task_rows import read_task
from bert_ds.downstream.tuning.taught_model import TaughtTaskModel
from bert_ds.reporting.run_log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = TaskDistillationConfig(teacher="t", temperature=1.5, label_weight=0.5, soft_weight=2.0)


def model_of(kind: str, labels: dict[str, tuple[str, ...]], *, seed: int, **options: Any) -> TaskModel:
    """A small model whose head is large enough that its scores differ."""
    model = make_task_model(KINDS[kind], CONFIG.with_dropout(0.0), labels, kernels="torch", init_seed=seed, **options)
    with torch.no_grad():
        model.head.classifier.weight.mul_(20.0)
    return model


def pair_of(task: TaskConfig, folder: Path) -> tuple[TaughtTaskModel, TaskModel, TaskModel, MicroBatch]:
    """A student, the plain model of the same weights, the teacher, and a batch of the task."""
    rows = read_task(task, load_tokenizer(folder), say=lambda text: None)
    teacher = model_of(task.kind, rows.labels, seed=5)

    def make(*args: Any, **options: Any) -> TaughtTaskModel:
        return TaughtTaskModel(*args, teacher=teacher, settings=SETTINGS, **options)

    student = model_of(task.kind, rows.labels, seed=2, make=make)
    assert isinstance(student, TaughtTaskModel)
    features = rows.train.features[:7]
    batch = pack(features, counts=KINDS[task.kind].count_targets(features))
    return student, model_of(task.kind, rows.labels, seed=2), teacher, batch


def tag_task(folder: Path) -> TaskConfig:
    """Two tags, on sentences of two words that are several pieces each."""
    lines = [f"lovely{index}\tUP\nwe{index}\tNONE\n" for index in range(12)]
    write_lines(folder / "train.conll", lines)
    data = {"train": [{"path": "train.conll", "format": "conll"}], "fields": {"words": 0, "tags": 1}}
    return task_of(folder, {"kind": "token_classification", "data": {**data, "validation_fraction": 0.25}})


def score_task(folder: Path) -> TaskConfig:
    """Pairs with a number."""
    write_lines(folder / "train.tsv", ["a\tb\tscore", *(f"we saw {i}\tit saw {i}\t{i % 5}" for i in range(12))])
    fields = {"text": "a", "text_pair": "b", "score": "score"}
    data = {"train": [{"path": "train.tsv", "format": "tsv"}], "fields": fields, "validation_fraction": 0.25}
    return task_of(folder, {"kind": "regression", "data": data})


TASKS = {
    "classification": lambda folder: load_task(review_task(folder)),
    "token_classification": tag_task,
    "regression": score_task,
}


@pytest.mark.parametrize("kind", TASKS)
def test_the_soft_term_and_its_gradients_are_those_of_the_formula(tiny_export: Path, tmp_path: Path, kind: str) -> None:
    student, plain, teacher, batch = pair_of(TASKS[kind](tmp_path), tiny_export)
    student.train()
    losses, metrics = student(**batch.model_inputs())
    (losses * torch.tensor([0.5, 2.0])).sum().backward()
    hard, plain_metrics, own = plain(**batch.model_inputs(), with_scores=True)
    with torch.no_grad():
        *_, wanted = teacher(**batch.model_inputs(), with_scores=True)
    (name,) = own
    ((_, target),) = batch.targets.items()
    own_RL, wanted_RL = own[name], wanted[name]
    if kind == "regression":
        soft = ((own_RL - wanted_RL) ** 2).sum()
    else:
        kept = target >= 0
        p = (wanted_RL[kept] / 1.5).softmax(-1)
        soft = 1.5**2 * (p * (p.log() - (own_RL[kept] / 1.5).log_softmax(-1))).sum()
        assert int(kept.sum()) == batch.counts[student.terms[1].count]
    assert float(soft.detach()) > 0.01
    torch.testing.assert_close(losses, torch.stack((hard[0], soft)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics, plain_metrics)
    (0.5 * hard[0] + 2.0 * soft).backward()
    for (name, mine), theirs in zip(student.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5), name
    assert set(student.state_dict()) == set(plain.state_dict())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    student.eval()
    assert student(**batch.model_inputs())[0].tolist()[1] == 0.0, "the teacher is asked while training only"


def finetune(
    task: Path, model: Path, run_dir: Path, *extra: object, ranks: int = 1
) -> subprocess.CompletedProcess[str]:
    files = (
        "--task",
        task,
        "--model",
        model,
        "--run_dir",
        run_dir,
        "--deepspeed_config",
        ROOT / "ds_configs/zero3.json",
    )
    return run_verb(ROOT / "bert_ds/finetune.py", *files, *extra, world_size=ranks)


def test_a_student_is_taught_by_a_finished_run_on_two_ranks(tiny_export: Path, tmp_path: Path) -> None:
    task = review_task(tmp_path / "data", training={"epochs": 8, "train_batch_size": 8, "log_every_steps": 1})
    done = finetune(task, tiny_export, tmp_path / "teacher")
    assert done.returncode == 0, done.stdout + done.stderr
    teacher = f"--set=distillation={json.dumps({'teacher': str(tmp_path / 'teacher/hf'), 'label_weight': 0.0})}"
    done = finetune(task, tiny_export, tmp_path / "student", teacher, "--seed", 3, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(read_metrics(tmp_path / "student/metrics.jsonl"))
    assert rows[-1]["loss_soft"] < rows[0]["loss_soft"]
    assert rows[0]["loss"] == pytest.approx(rows[0]["loss_soft"], rel=1e-5)
    results = [
        json.loads((tmp_path / name / "results.json").read_text())["validation"] for name in ("teacher", "student")
    ]
    # No label was listened to: what the student knows is what the teacher knows.
    assert results[0]["accuracy"] == 1.0 and results[1]["accuracy"] > 0.9


def test_a_teacher_that_does_not_fit_is_refused(tiny_export: Path, tmp_path: Path) -> None:
    fields = {"words": 0, "tags": 1, "intent": 2}
    data = {"train": [{"path": "train.tsv", "format": "tsv"}], "fields": fields, "validation_fraction": 0.5}
    content = {"kind": "intent_slot", "data": data, "distillation": {"teacher": "x"}}
    with pytest.raises(ConfigError, match=r'distillation: is for one of "classification", "regression", "token_class'):
        load_task(write_task(tmp_path, content))
    task = review_task(tmp_path / "data", distillation={"teacher": str(tiny_export)})
    done = finetune(task, tiny_export, tmp_path / "run")
    assert done.returncode == 4
    assert "wanted ['BertForSequenceClassification'] for this task" in done.stderr
