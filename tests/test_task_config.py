"""A task file: what it may say, what it leaves to defaults, and every mistake at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from config_cases import launched
from downstream_cases import review_task, task_of

from bert_ds.configuration.deepspeed_file.ds_config import load_ds_config, resolve_ds_config
from bert_ds.configuration.families.bert import BertConfig
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.configuration.task.task_config import dump_task, load_task, trained_task

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted(path.stem for path in (ROOT / "ds_configs/tasks").glob("*.json"))
DATA = {
    "train": [{"path": "a.tsv", "format": "tsv"}],
    "fields": {"text": "t", "label": "l"},
    "validation_fraction": 0.1,
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_task_is_valid_and_its_files_are_below_the_data_folder(name: str, tmp_path: Path) -> None:
    task = load_task(name, data=tmp_path)
    assert task.name == name
    assert all(Path(file.path).is_relative_to(tmp_path) for file in (*task.data.train, *task.data.validation))


def test_a_task_survives_being_written_and_read(tmp_path: Path) -> None:
    task = load_task(review_task(tmp_path))
    (tmp_path / "again.json").write_text(dump_task(task))
    assert load_task(tmp_path / "again.json") == task


def test_an_override_may_change_a_part_of_a_section_that_the_file_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"name": "x", "kind": "classification", "data": DATA}))
    assert load_task(path, ["optimizer.lr=0.001"]).optimizer.lr == 0.001


def problems(folder: Path, **content: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        task_of(folder, {"kind": "classification", "data": DATA, **content})
    return [line.partition("task.json: ")[2] for line in str(caught.value).splitlines()]


def test_every_mistake_is_said_at_once(tmp_path: Path) -> None:
    data = {**DATA, "fields": {"text": "t", "lable": "l"}, "validation": [{"path": "b", "format": "tsv"}]}
    found = problems(tmp_path, data=data, metric="acuracy", training={"epochs": 2.0, "total_steps": 5})
    assert found == [
        'data.fields.lable: a classification task has no such field; wanted one of "text", "label", "text_pair", "id"; '
        'did you mean "label"?',
        "data.fields.label: is missing, wanted the column that holds it",
        'metric: found "acuracy", wanted one of "accuracy", "macro_f1", "macro_precision", "macro_recall", "micro_f1", '
        '"matthews"; did you mean "accuracy"?',
        "data.validation: give exactly one of data.validation and data.validation_fraction",
        "training.epochs: give training.epochs or training.total_steps, not both",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"kind": "clasification"}, 'kind: found "clasification", wanted one of'),
        ({"droput": 0.1}, 'droput: unknown setting; did you mean "dropout"?'),
        ({"layerwise_lr_decay": 0}, "layerwise_lr_decay: found 0, wanted > 0"),
        ({"data": {**DATA, "tag_scheme": "bio"}}, "data.tag_scheme: a classification task has no tags"),
        (
            {"data": {**DATA, "train": [{"path": "a", "format": "tsv", "pattern": "x"}]}},
            'data.train.0.pattern: is for "lines", the format is "tsv"',
        ),
        (
            {"data": {**DATA, "train": [{"path": "a", "format": "xml"}]}},
            "data.train.0.record: is missing, wanted the element that is a row",
        ),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    assert any(message in line for line in problems(tmp_path, **content))


@pytest.mark.parametrize(
    ("scheme", "wrong", "right"), [("none", "conlleval_f1", "micro_f1"), ("bio", "macro_recall", "strict_f1")]
)
def test_a_metric_of_the_other_way_of_tagging_is_refused(tmp_path: Path, scheme: str, wrong: str, right: str) -> None:
    data = {**DATA, "fields": {"words": "w", "tags": "t"}, "tag_scheme": scheme}
    task = {"kind": "token_classification", "data": data}
    assert task_of(tmp_path, {**task, "metric": right}).chosen_metric == right
    assert problems(tmp_path, **task, metric=wrong) == [
        f'metric: "{wrong}" does not go with data.tag_scheme "{scheme}"'
    ]


def test_intents_with_slots_that_mark_no_entities_have_no_f1(tmp_path: Path) -> None:
    data = {**DATA, "fields": {"words": "w", "tags": "t", "intent": "i"}}
    assert problems(tmp_path, kind="intent_slot", data=data, metric="f1") == [
        'metric: "f1" does not go with data.tag_scheme "none"'
    ]


def test_a_task_that_is_not_shipped_is_named_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r'--task: found "sst3", wanted .*did you mean "sst2"'):
        load_task("sst3")


def test_a_truncated_file_is_no_task(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text('{"name": "x", "kind": ')
    with pytest.raises(ConfigError, match="not JSON"):
        load_task(tmp_path / "task.json")


def test_epochs_become_steps_and_the_deepspeed_file_gets_the_batch(tmp_path: Path) -> None:
    task = launched(load_task(review_task(tmp_path, training={"epochs": 2.5, "train_batch_size": 8})))
    plan = trained_task(task, BertConfig(vocab_size=100), num_sequences=50)
    assert plan.training.total_steps == 16
    assert plan.every_steps(1.0, num_sequences=50) == 7
    effective = resolve_ds_config(plan, load_ds_config(ROOT / "ds_configs/zero2.json"), 2)
    assert (effective["train_batch_size"], effective["train_micro_batch_size_per_gpu"]) == (8, 4)
