"""What fine-tuning and its outcome hand to their parts, looked at in this process."""

from __future__ import annotations

import json
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from call_watch import Calls
from downstream_cases import CONFIG, PIECES, review_rows, review_task, task_of, write_lines
from tiny_training import join_alone
from torch.nn.functional import cross_entropy

import bert_ds.finetune
import bert_ds.pretrain
import bert_ds.score
from bert_ds.basics.ranks import Ranks
from bert_ds.configuration.deepspeed_file.ds_config import load_ds_config
from bert_ds.configuration.task.task_config import TaskConfig, load_task, trained_task
from bert_ds.corpus.tokenizer.wordpiece import TextRules, WordPieceTokenizer
from bert_ds.downstream.kinds.kind import Prediction
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.rows.features import Feature
from bert_ds.downstream.rows.task_batch import pack
from bert_ds.downstream.tuning import task_engine
from bert_ds.downstream.tuning.evaluation_history import Measured, read_history, write_history
from bert_ds.downstream.tuning.outcome import Measurement, measure_side, row_counts, write_side
from bert_ds.downstream.tuning.task_engine import EvaluationHistory, build_model
from bert_ds.downstream.tuning.task_folder import make_task_model
from bert_ds.downstream.tuning.task_rows import TaskRows, read_task
from bert_ds.encoder.fused_ops import fused_ops
from bert_ds.training.checkpoints.train_state import TrainState
from bert_ds.training.launch.launch_precision import Decision
from bert_ds.training.launch.restart import StopRequest

TOKENIZER = WordPieceTokenizer(PIECES, TextRules())
FILES = ("train", "validation", "test")


def reviews(folder: Path, **content: Any) -> tuple[TaskConfig, TaskRows]:
    """A task of three bad rows for each good one in training, of as many in validation, and a half labelled test."""
    rows = review_rows(32)
    sides = {
        "train": rows[::2][:12] + rows[1::2][:4],
        "held": rows[24:],
        "test": [*rows[:2], "we saw it\t", *rows[2:4]],
    }
    for name, lines in sides.items():
        write_lines(folder / name, ["text\tlabel", *lines])
    files = {side: [{"path": name, "format": "tsv"}] for side, name in zip(FILES, sides, strict=True)}
    data = {**files, "fields": {"text": "text", "label": "label"}, "drop_overlap": False}
    task = load_task(review_task(folder, data=data, **content))
    return task, read_task(task, TOKENIZER, say=lambda text: None)


@pytest.mark.parametrize("verb", [bert_ds.pretrain, bert_ds.finetune], ids=lambda verb: verb.__name__)
def test_a_command_line_reaches_the_launch(
    verb: ModuleType, tmp_path: Path, tiny_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join_alone()
    run_dir, is_finetune = tmp_path / "run", verb is bert_ds.finetune
    own: dict[str, Any] = {"pretrain": 0}
    if is_finetune:
        own = {"open_task": Mock(decision=Decision("bf16", "")), "finetune": 0, "write_summary": None}
    parts = {"joined_ranks": nullcontext(), "preflight": None, "refuse_foreign_folders": None, "follow_launcher": None}
    calls = Calls(monkeypatch, verb, **parts, **own, read_ranks=Ranks(1, 1, 2))
    monkeypatch.setattr(verb, "StopRequest", stop := Mock())
    needed: Any = None if is_finetune else Calls(monkeypatch, verb, needs_of=Mock())["needs_of"]
    words = ["--hang_limit", "5000", "--start_limit", "9", "--preflight", "on", "--run_dir", str(run_dir)]
    if is_finetune:
        words += ["--task", str(review_task(tmp_path)), "--model", str(tiny_export), "--seeds", "3", "1"]
    monkeypatch.setattr("sys.argv", [verb.__name__, *words])
    assert verb.main() == 0
    (joined,) = calls["joined_ranks"]
    assert joined["timeout"] == timedelta(seconds=3 * 5000 + 600) and joined["start_limit_s"] == 9
    joined["first"]()
    (measured,) = calls["preflight"]
    assert measured["when"] == "on" and measured["run_dir"] == run_dir
    assert (measured["needs"] is None) == is_finetune
    assert is_finetune or needed[0]["plan"].world_size == 2
    stop().install.assert_called_once_with(speaks=False)
    assert [call["stop"] for call in calls["follow_launcher"]] == [stop()]
    seeds = [run_dir / "seed_3", run_dir / "seed_1"]
    wanted = [seeds, [run_dir]] if is_finetune else [[run_dir]]
    assert [call["run_dirs"] for call in calls["refuse_foreign_folders"]] == wanted
    if is_finetune:
        made = [(call["task"].seed, call["task"].training.precision, call["run_dir"]) for call in calls["finetune"]]
        assert made == [(3, "bf16", seeds[0]), (1, "bf16", seeds[1])]
        assert calls["open_task"][0]["run_dirs"] == calls["write_summary"][0]["folders"] == seeds


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny_export: Path) -> tuple[Calls, Path, TaskConfig, Any]:
    """A fine-tuning in this process: what its parts were given, its folder, its task, and what seeds share."""
    join_alone()
    folder = tmp_path_factory.mktemp("tuned")
    training = {"epochs": 1, "train_batch_size": 8, "precision": "bf16", "kernels": "torch"}
    task, _ = reviews(folder, training=training, evaluation={"every_epochs": 0.5, "batch_size": 3}, seed=4)
    ds = load_ds_config("zero1")
    layers = {"number_checkpoints": CONFIG.num_hidden_layers}
    ds = replace(ds, settings={**ds.settings, "activation_checkpointing": layers})
    args = Namespace(model=tiny_export, trivial=True, resume="never", random_weights=False, hang_limit=0.0, search=None)
    with pytest.MonkeyPatch.context() as patch:
        names = ("trivial_figures", "prove_same_files", "build_model", "make_optimizer", "train_watched")
        calls = Calls(patch, bert_ds.finetune, **dict.fromkeys(names, Calls.THROUGH))
        ranks, run_dir = Ranks(0, 0, 1), folder / "run"
        start = bert_ds.finetune.open_task(task, ds, args=args, ranks=ranks, stop=StopRequest(), run_dirs=[run_dir])
        assert bert_ds.finetune.finetune(task, run_dir, start=start) == 0
    return calls, run_dir, task, start


@pytest.mark.parametrize("is_exhausted", [True, False])
def test_a_run_that_has_nothing_more_to_gain_is_finished_and_trains_no_more(
    is_exhausted: bool, tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, task, start = tuned
    calls = Calls(monkeypatch, bert_ds.finetune, train_watched=None, conclude=None)
    monkeypatch.setattr(EvaluationHistory, "is_exhausted", is_exhausted)
    monkeypatch.setattr(EvaluationHistory, "step", 3)
    assert bert_ds.finetune.finetune(task, tmp_path / "run", start=start) == (0 if is_exhausted else 75)
    assert (len(calls["train_watched"]), len(calls["conclude"])) == ((0, 1) if is_exhausted else (1, 0))
    assert (tmp_path / "run/DONE").exists() == is_exhausted


def test_seeds_behind_one_that_was_stopped_are_left_and_nothing_is_summed_up(
    tmp_path: Path, tiny_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join_alone()
    parts = {"joined_ranks": nullcontext(), "follow_launcher": None, "open_task": Mock(decision=Decision("fp32", ""))}
    calls = Calls(monkeypatch, bert_ds.finetune, **parts, finetune=75, write_summary=None)
    monkeypatch.setattr(bert_ds.finetune, "StopRequest", Mock())
    words = ["--task", str(review_task(tmp_path)), "--model", str(tiny_export), "--run_dir", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["finetune.py", *words, "--seeds", "3", "1"])
    assert bert_ds.finetune.main() == 75
    assert (len(calls["finetune"]), calls["write_summary"]) == (1, [])


@pytest.mark.parametrize("is_random", [True, False])
def test_a_network_starts_from_its_folder_unless_random_weights_are_asked_for(
    is_random: bool, tuned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {
        "build_model": (Mock(), None),
        "make_optimizer": None,
        "make_engine": None,
        "weight_patterns": ((), {}, ()),
    }
    calls = Calls(monkeypatch, bert_ds.finetune, **parts)
    start = replace(tuned[3], args=Namespace(random_weights=is_random))
    trained = trained_task(tuned[2], CONFIG, num_sequences=16)
    bert_ds.finetune.build_engine(trained, {}, start=start, log=Mock())
    assert calls["build_model"][0]["tensors"] == ({} if is_random else start.pretrained.tensors)


def test_only_a_step_that_is_better_than_all_before_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    join_alone()
    task, rows = reviews(tmp_path)
    best = EvaluationHistory(None, task, rows.validation, rows.labels, run_dir=tmp_path, from_step=0)
    saved = []
    for step, value in enumerate((0.5, 0.4, 0.7, 0.7), 1):
        Calls(monkeypatch, task_engine, measure_side=Measurement({"accuracy": value}, []))
        saved.append(best.evaluate(TrainState(step=step)).save)
    assert saved == [True, False, True, False]


def test_the_trivial_method_learns_from_the_training_rows_and_is_measured_on_the_validation_rows(tuned: Any) -> None:
    (given,) = tuned[0]["trivial_figures"]
    assert (len(given["train"]), len(given["validation"])) == (16, 8)


def test_all_files_of_a_task_have_to_be_the_same_on_every_rank(tuned: Any) -> None:
    assert [path.name for path in tuned[0]["prove_same_files"][0]["paths"]] == ["train", "held", "test"]


def test_model_and_optimizer_are_made_as_the_files_say(tuned: Any) -> None:
    (model,), (optimizer,) = tuned[0]["build_model"], tuned[0]["make_optimizer"]
    assert model["activation_checkpointing"] is True
    assert (optimizer["kernels"], optimizer["precision"]) == ("torch", "bf16")
    (trained,) = tuned[0]["train_watched"]
    assert trained["limit_s"] == 0.0 and trained["loop"].seed == 4


def test_sides_and_their_counts_are_told_apart_in_the_results(tuned: Any) -> None:
    results = json.loads((tuned[1] / "results.json").read_text())
    assert results["rows"] == {"train": 16, "validation": 8, "test": 5}
    assert set(results["test"]) == set(results["validation"]) - {"loss", "loss_label", "label_accuracy"}
    config = json.loads((tuned[1] / "hf/config.json").read_text())
    assert {str(number): name for name, number in config["label2id"].items()} == config["id2label"]
    _, *predicted = (tuned[1] / "predictions/test/predictions.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in predicted] == list("01234")


def test_rows_are_predicted_so_many_at_a_time(tmp_path: Path) -> None:
    join_alone()
    task, rows = reviews(tmp_path, evaluation={"batch_size": 3})
    model = make_task_model(KINDS[task.kind], CONFIG, rows.labels, kernels="torch").eval()
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, inputs: sizes.append(len(inputs["cu_seqlens"]) - 1), with_kwargs=True
    )
    found = measure_side(model, task, rows.validation, rows.labels)
    assert sizes == [3, 3, 2] and not model.training
    model.train()
    at_once = task.model_copy(update={"evaluation": task.evaluation.model_copy(update={"batch_size": 8})})
    wanted = measure_side(model, at_once, rows.validation, rows.labels)
    assert model.training and sizes[3:] == [8]
    assert found.figures["loss"] == pytest.approx(wanted.figures["loss"])


@pytest.mark.parametrize("side", FILES)
def test_a_folder_is_scored_on_its_side_of_that_name(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    join_alone()
    parts = {
        "read_task_folder": (Mock(), {}),
        "tokenizer_folder": None,
        "load_tokenizer": Mock(identity={"vocab_size": 9, "fingerprint": "f"}),
    }
    parts |= {"check_tokenizer": None, "read_task": Mock(**{name: name for name in FILES}), "measure_side": None}
    calls = Calls(monkeypatch, bert_ds.score, **parts, part_figures={}, row_counts={}, report=None)
    task, args = Mock(kind="classification"), Namespace(model=Path("hf"), side=side, output=None)
    bert_ds.score.score_fine_tuned(task, args, Ranks(0, 0, 1))
    assert calls["measure_side"][0]["side"] == calls["part_figures"][0]["side"] == side


def test_a_long_text_is_cut_to_the_length_of_its_task(tmp_path: Path) -> None:
    _, rows = reviews(tmp_path, max_seq_length=4)
    assert {len(feature.input_ids) for feature in rows.train.features} == {4}


def test_rows_are_counted_and_not_their_sequences(tmp_path: Path) -> None:
    write_lines(tmp_path / "train", [json.dumps({"words": ["film"] * 20, "tags": ["N"] * 19 + ["O"]})])
    write_lines(tmp_path / "held", [json.dumps({"words": ["it"], "tags": ["O"]})])
    files = {side: [{"path": name, "format": "jsonl"}] for side, name in (("train", "train"), ("validation", "held"))}
    data = {**files, "fields": {"words": "words", "tags": "tags"}}
    task = task_of(tmp_path, {"kind": "token_classification", "data": data, "max_seq_length": 8})
    rows = read_task(task, TOKENIZER, say=lambda text: None)
    assert len(rows.train.features) > 1 == row_counts(rows)["rows"]["train"]


def test_a_report_of_classes_pairs_each_labelled_row_with_its_own_prediction(tmp_path: Path) -> None:
    task, rows = reviews(tmp_path)
    assert rows.test is not None and [example.target for example in rows.test.examples][2] is None
    values = ["good" if example.target == "good" else "bad" for example in rows.test.examples]
    write_side(tmp_path, "test", task, rows.test, Measurement({}, [Prediction(value, {}) for value in values]))
    header, *table = (tmp_path / "figures/test_confusion.tsv").read_text().splitlines()
    assert [row.split("\t")[1:] for row in table] == [["2", "0"], ["0", "2"]], header


def test_evaluations_up_to_a_checkpoint_are_kept_and_decide_which_checkpoints_are(tmp_path: Path) -> None:
    join_alone()
    path = tmp_path / "evaluations.json"
    write_history(path, [Measured(1, 0.5), Measured(2, 0.6), Measured(3, 0.4), Measured(4, 0.9), Measured(5, 0.8)])
    assert [row.step for row in read_history(path, until_step=4)] == [1, 2, 3, 4]
    side: Any = None
    best = EvaluationHistory(None, load_task(review_task(tmp_path)), side, {}, run_dir=tmp_path, from_step=4)
    assert best.step == 4 and best.kept_steps() == {4, 2}


def test_a_model_starts_as_its_task_says(tmp_path: Path) -> None:
    task, rows = reviews(tmp_path, class_weights="balanced", seed=6, training={"kernels": "triton"})
    trained = trained_task(task, CONFIG, num_sequences=16)
    model, _ = build_model(trained, rows, tensors={}, activation_checkpointing=False, say=lambda text: None)
    assert rows.labels == {"label": ("bad", "good")}
    assert model.head.class_weights == (16 / (2 * 12), 16 / (2 * 4))  # of the training rows
    wanted = make_task_model(KINDS[task.kind], trained.model, rows.labels, kernels="torch", init_seed=6).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    assert model.head.classifier.ops == fused_ops("triton")


@pytest.mark.parametrize(
    ("kind", "target", "scores"),
    [("classification", "label", "scores"), ("token_classification", "tag", "token_scores")],
)
def test_weights_of_classes_weigh_the_losses_of_rows_and_of_words(kind: str, target: str, scores: str) -> None:
    weights, ids = (3.0, 0.5), np.array([2, 7, 8, 3], dtype=np.int32)
    values = [[1], [0]] if kind == "classification" else [[-100, 1, 0, -100], [-100, 0, -100, -100]]
    features = [Feature(place, ids, np.zeros(4, np.int8), {target: np.array(of)}) for place, of in enumerate(values)]
    labels = {target: ("a", "b")}
    model = make_task_model(KINDS[kind], CONFIG, labels, kernels="torch", class_weights=weights).eval()
    batch = pack(features, counts={})
    losses, _, found = model(**batch.model_inputs(), dropout_seed=None, with_scores=True)
    wanted = cross_entropy(found[scores], batch.targets[target], torch.tensor(weights), reduction="sum")
    assert losses[0].item() == pytest.approx(wanted.item(), rel=1e-5)
