"""What pre-training hands to its parts, looked at in this process, in a recipe of two sources and two stages."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from call_watch import Calls
from corpus_fixtures import random_documents, write_shards
from test_verb_wiring import ALONE, RECIPE, SPREAD
from tiny_training import join_alone

import bert_ds.pretrain
from bert_ds.basics.ranks import Ranks
from bert_ds.configuration.deepspeed_file.ds_config import load_pair
from bert_ds.configuration.run_plan import RunPlan, make_plan
from bert_ds.corpus.batches import loader
from bert_ds.corpus.batches.batch_stages import data_settings
from bert_ds.corpus.batches.plan_batches import held_out_batches, longest_batches
from bert_ds.reporting.run_log import read_metrics
from bert_ds.training.checkpoints.train_state import TrainState
from bert_ds.training.launch.restart import StopRequest
from bert_ds.training.loop import step_budget
from bert_ds.training.loop.rank_times import RankTimes

CORPUS = {**RECIPE["corpus"], "sources": [{"path": "shards"}, {"path": "more"}]}
STAGED = {**RECIPE, "corpus": CORPUS, "stages": [{"until": 0.5, "mlm_probability": 0.4}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shard folders and the two files."""
    join_alone()
    folder = tmp_path_factory.mktemp("run")
    for number, name in enumerate(("shards", "more")):
        write_shards(folder / name, random_documents(60, seed=number), random_documents(20, seed=7 + number))
    (folder / "run.json").write_text(json.dumps(STAGED), encoding="utf-8")
    (folder / "ds.json").write_text(json.dumps(SPREAD), encoding="utf-8")
    return folder


def plan_of(folder: Path, *overrides: str) -> RunPlan:
    run, ds = load_pair(folder / "run.json", folder / "ds.json", overrides=list(overrides))
    return make_plan(run, ds, 1)


def arguments(run_dir: Path, **options: Any) -> Any:
    given = {"resume": "never", "dry_run": False, "find_micro_batch": False, "replay_step": None, "hang_limit": 0.0}
    return Namespace(run_dir=run_dir, **{**given, **options})


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Calls, RunPlan, Path]:
    """A run that is finished and then entered again: what its parts were given, its plan and its folder."""
    names = ("decide_precision", "prove_same_files", "enter", "make_services", "Services")
    names += ("StageChanges", "peak_flops", "train_watched", "settle_micro_batch", "PretrainingData")
    names += ("load_tokenizer_for",)
    plan, run_dir = plan_of(folder, "checkpoints.asynchronous=true", "training.num_workers=0"), folder / "runs/whole"
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch, bert_ds.pretrain, **dict.fromkeys(names, Calls.THROUGH))
        for resume in ("never", "auto"):
            args = arguments(run_dir, resume=resume)
            assert bert_ds.pretrain.pretrain(plan, ALONE, args=args, stop=StopRequest()) == 0
    return calls, plan, run_dir


def test_a_launch_is_told_of_the_run_that_it_goes_on_with_and_of_its_end(trained: Any) -> None:
    calls, _, run_dir = trained
    assert [call["earlier"] for call in calls["decide_precision"]] == [[], [run_dir]]
    assert [call["total_steps"] for call in calls["enter"]] == [4, 4]
    assert "step 4/4" in (run_dir / "logs/rank_0.log").read_text()
    assert {call["limit_s"] for call in calls["train_watched"]} == {0.0}


def test_corpus_and_micro_batch_are_those_of_the_family_the_run_and_all_stages(trained: Any) -> None:
    calls, plan, run_dir = trained
    assert {call["cache_dir"] for call in calls["PretrainingData"]} == {run_dir / "examples"}
    assert [call["model"] for call in calls["load_tokenizer_for"]] == [plan.run.model] * 2
    lengths = read_metrics(run_dir / "metrics.jsonl", "start")[0]["data"]["mean_length_by_stage"]
    assert [call["mean_lengths"] for call in calls["settle_micro_batch"]] == [lengths] * 2


def test_a_run_that_is_asked_to_stop_is_not_done(folder: Path) -> None:
    stop, run_dir = StopRequest(), folder / "runs/stopped"
    stop.request("SIGTERM")
    assert bert_ds.pretrain.pretrain(plan_of(folder), ALONE, args=arguments(run_dir), stop=stop) == 75
    assert not (run_dir / "DONE").exists()


def test_every_source_has_to_be_the_same_on_all_ranks(trained: Any, folder: Path) -> None:
    given = [[path.parent.name for path in call["paths"]] for call in trained[0]["prove_same_files"]]
    assert given == [["shards", "more"]] * 2


def test_utilisation_is_measured_by_the_precision_and_by_each_stage_itself(trained: Any) -> None:
    calls, plan, run_dir = trained
    assert {call["precision"] for call in calls["peak_flops"]} == {"fp32"}
    found = calls["StageChanges"][0]["flops_per_token"]
    lengths = read_metrics(run_dir / "metrics.jsonl", "start")[0]["data"]["mean_length_by_stage"]
    assert found == [plan.flops_per_token(*one) for one in zip(lengths, (s.run for s in plan.stages), strict=True)]
    assert found[0] > 1.01 * found[1]


def test_a_save_behind_the_training_is_settled_and_ranks_are_compared_where_there_are_several(trained: Any) -> None:
    calls = trained[0]
    opened, stages = (calls["make_services"][0][name] for name in ("opened", "stages"))
    assert calls["Services"][0]["settle"] is not None and calls["Services"][0]["rank_times"] is None
    checkpoints = opened.plan.run.checkpoints.model_copy(update={"asynchronous": False})
    plan = replace(opened.plan, run=opened.plan.run.model_copy(update={"checkpoints": checkpoints}))
    other = replace(opened, plan=plan, ranks=Ranks(1, 1, 2))
    services = bert_ds.pretrain.make_services(other, TrainState(passed_over=2), stages, stop=StopRequest())
    assert services.row_facts is not None
    first, third = (opened.data.source_counts(place, place + 1) for place in (0, 2))
    assert services.row_facts(1)["sources"] == {name: count._asdict() for name, count in third.items()}
    assert third != first
    assert services.settle is None and isinstance(services.rank_times, RankTimes)


@pytest.mark.parametrize("option", ["dry_run", "find_micro_batch"])
def test_a_trial_looks_for_a_larger_batch_where_it_is_asked_to(
    option: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch, bert_ds.pretrain, try_longest=None)
    args = arguments(folder / f"runs/{option}", **{option: True})
    assert bert_ds.pretrain.pretrain(plan_of(folder), ALONE, args=args, stop=StopRequest()) == 0
    (given,) = calls["try_longest"]
    assert given["search"] == (option == "find_micro_batch")
    assert given["split"] == plan_of(folder).split and given["split"].accumulation == 4
    assert not (args.run_dir / "DONE").exists()
    calls |= Calls(monkeypatch, bert_ds.pretrain, with_total_steps=None)
    clock = plan_of(folder, "training.total_steps=null", "training.max_minutes=9")
    args = arguments(folder / f"runs/{option}-clock", **{option: True})
    assert bert_ds.pretrain.pretrain(clock, ALONE, args=args, stop=StopRequest()) == 0
    assert calls["with_total_steps"] == []


def test_a_replay_has_the_seed_and_the_batches_of_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, bert_ds.pretrain, replay_step=None)
    plan, args = plan_of(folder, "training.num_workers=0"), arguments(folder / "runs/replay", replay_step=3)
    assert bert_ds.pretrain.pretrain(plan, ALONE, args=args, stop=StopRequest()) == 0
    (given,) = calls["replay_step"]
    assert (given["step"], given["seed"]) == (3, 11)
    data = bert_ds.pretrain.open_corpus(plan, args.run_dir, log=given["log"])
    (one, *_), (wanted, *_) = given["batch"](1), data.rank_batches(1, rank=0, split=plan.split)
    assert torch.equal(one.input_ids_T, wanted.input_ids_T)


def test_deepspeed_is_given_the_micro_batch_that_was_settled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_file = folder / "open.json"
    open_file.write_text("{}")
    run, ds = load_pair(folder / "run.json", open_file, overrides=["stages=[]"])
    plan = make_plan(run, ds, 1)
    assert plan.split.micro_batch_size != 4
    settled = make_plan(run, replace(ds, settings={**ds.settings, "train_micro_batch_size_per_gpu": 4}), 1)
    calls = Calls(monkeypatch, bert_ds.pretrain, settle_micro_batch=settled, build_engine=None)
    opened = bert_ds.pretrain.open_run(plan, ALONE, args=arguments(folder / "runs/open"))
    described = json.loads(opened.folder.descriptions["ds_config.json"])
    given = calls["build_engine"][0]["ds_config"]
    assert given["train_micro_batch_size_per_gpu"] == described["train_micro_batch_size_per_gpu"] == 4


def test_word_vectors_have_the_width_of_the_embedding_and_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Mock(ids=[3], vectors=[[1.0]], text="one piece has one")
    nothing = dict.fromkeys(("load_tokenizer", "start_at_vectors", "make_optimizer", "make_engine", "decided"))
    calls = Calls(
        monkeypatch, bert_ds.pretrain, read_word_vectors=found, build_model=Mock(), weight_patterns=(), **nothing
    )
    run = Mock(init_from=None, word_vectors="v.txt", output_bias="zero", model=Mock(embedding_width=3, hidden_size=9))
    plan, log, data = Mock(run=run), Mock(run_dir=Path("run")), Mock()
    bert_ds.pretrain.build_engine(plan, data, {}, log=log)
    assert calls["read_word_vectors"][0]["width"] == 3
    (given,) = calls["start_at_vectors"]
    assert (given["ids"], given["vectors"]) == ([3], [[1.0]])
    log.info.assert_called_once_with("one piece has one")


def test_all_layers_that_learn_are_compiled_with_the_kernels_that_they_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mock(encoders=lambda: [Mock(layer=["a", "b"]), Mock(layer=["c"])])
    parts = {"kernels_for": "triton", "make_objectives": (), "PretrainingModel": model}
    monkeypatch.setattr(bert_ds.pretrain, "compile_layers", compiled := Mock())
    Calls(monkeypatch, bert_ds.pretrain, **parts)
    training = Mock(compile=True, kernels="auto", left_out={})
    plan = Mock(run=Mock(distillation=None, training=training), ds=Mock(activation_checkpointing=False))
    assert bert_ds.pretrain.build_model(plan, Path("run")) is model
    assert [*compiled.call_args.args[0]] == ["a", "b", "c"] and compiled.call_args.kwargs == {"kernels": "triton"}


def test_words_that_another_jieba_may_cut_are_other_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jieba", reason="the extra zh is not installed")
    plan, found = plan_of(folder, "masking.whole_word_mask=true", "masking.word_segmenter=jieba"), set()
    for number in ("1", "2"):
        monkeypatch.setattr(loader, "version", lambda name, number=number: number)
        found.add(bert_ds.pretrain.open_corpus(plan, folder / "runs/jieba", log=Mock()).fingerprint)
    assert len(found) == 2


def test_the_longest_batch_is_cut_as_in_the_stage_that_needs_most(folder: Path) -> None:
    data, plan = Mock(), plan_of(folder, 'stages=[{"until": 0.5, "train_batch_size": 16}]', "training.few_shapes=true")
    longest_batches(plan, data)(3)
    data.longest_batch.assert_called_once_with(6, stage=0)
    assert data_settings(plan.run, plan.stages).few_shapes


def test_a_run_by_the_clock_has_the_stages_and_the_files_of_its_steps(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_steps, run_dir = plan_of(folder, "training.total_steps=8"), folder / "runs/clock"
    clock = plan_of(folder, "training.total_steps=null", "training.max_minutes=9")
    calls = Calls(monkeypatch, bert_ds.pretrain, with_total_steps=by_steps)
    opened = bert_ds.pretrain.open_run(clock, ALONE, args=arguments(run_dir))
    (given,) = calls["with_total_steps"]
    monkeypatch.setattr(step_budget, "_steps_of_earlier_launch", lambda run_dir: 8)
    settled = step_budget.with_total_steps(**{**given, "log": Mock()}).run.training
    assert (settled.total_steps, settled.max_minutes) == (8, None)
    assert len(given["held_out"]()) == len(held_out_batches(clock.run, opened.data, ALONE)) > 2
    assert json.loads(opened.folder.descriptions["run_config.json"])["training"]["total_steps"] == 8
    wanted = bert_ds.pretrain.open_corpus(by_steps, run_dir, log=opened.log).fingerprint
    assert opened.data.fingerprint == wanted


def test_the_steps_of_each_stage_are_timed_for_its_share_of_the_minutes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch, step_budget, time_steps=step_budget.Costs(1.0, 1.0, 1.0), _throw_away=None)
    engine: Any = None
    plan = plan_of(folder, 'stages=[{"until": 0.25, "mlm_probability": 0.4}]')
    step_budget._timed(plan, engine, batches=lambda place: iter([[place]]), held_out=[], minutes=8.0)
    assert [(*next(call["batches"]), call["minutes"]) for call in calls["time_steps"]] == [(0, 2.0), (1, 6.0)]
