"""What verbs hand to their parts, looked at in this process; `test_pretrain_wiring` looks at whole runs."""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from call_watch import Calls
from corpus_fixtures import random_documents, write_shards
from tiny_training import tiny_services

import bert_ds.finetune
import bert_ds.pretrain
from bert_ds import train_tokenizer, train_wordpiece
from bert_ds.basics.ranks import Ranks
from bert_ds.configuration.deepspeed_file.ds_config import load_pair
from bert_ds.configuration.recipe import optimizer_config
from bert_ds.configuration.run_plan import RunPlan, make_plan
from bert_ds.corpus.batches.loader import PretrainingData
from bert_ds.corpus.batches.plan_batches import training_batches
from bert_ds.encoder.pretraining_model import PretrainingModel
from bert_ds.launch import verb_arguments
from bert_ds.launch.command_line import add_launch_options
from bert_ds.training.optimizers import foreign_optimizers

RECIPE: dict[str, Any] = {
    "name": "wired",
    "seed": 11,
    "model": {
        "vocab_size": 1000,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
    },
    "corpus": {"type": "shards", "sources": [{"path": "shards"}], "tokenizer": "shards/tokenizer"},
    "sequences": {"max_seq_length": 64, "short_seq_prob": 0.5},
    "optimizer": {"type": "adamw", "lr": 1e-3},
    "schedule": {"type": "linear", "warmup_steps": 1},
    "training": {"total_steps": 4, "train_batch_size": 8, "num_workers": 1, "precision": "fp32", "kernels": "torch"},
    "evaluation": {"num_examples": 8, "batch_size": 4},
}
SPREAD = {"train_micro_batch_size_per_gpu": 2}
ALONE = Ranks(0, 0, 1)


class Opened:
    """A plan of four micro-steps and its corpus."""

    def __init__(self, folder: Path) -> None:
        write_shards(folder / "shards", random_documents(60), random_documents(20, seed=1))
        recipe, spread = folder / "run.json", folder / "ds.json"
        recipe.write_text(json.dumps(RECIPE), encoding="utf-8")
        spread.write_text(json.dumps(SPREAD), encoding="utf-8")
        run, ds = load_pair(recipe, spread, overrides=[])
        self.plan: RunPlan = make_plan(run, ds, 1)
        self.log = tiny_services(folder / "run", 0, 1).log
        self.data: PretrainingData = bert_ds.pretrain.open_corpus(self.plan, folder / "run", log=self.log)
        self.run_dir = folder / "run"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    from tiny_training import join_alone

    join_alone()
    return Opened(tmp_path_factory.mktemp("wired"))


def test_the_utilisation_is_that_of_the_mean_length(opened: Opened) -> None:
    plan, mean_length = opened.plan, opened.data.facts()["mean_length"]
    assert isinstance(mean_length, float)
    stages = bert_ds.pretrain.follow_stages(plan, opened.data, Mock(), log=opened.log)
    next(stages.follow(iter([[]]), 0))
    found = stages.throughput.flops_per_token
    assert found == plan.flops_per_token(mean_length) != plan.flops_per_token(64)


def test_the_balance_is_that_of_all_micro_steps(opened: Opened) -> None:
    assert opened.plan.split.accumulation == 4
    said = bert_ds.pretrain.announce(opened.plan, opened.data, log=opened.log)["data"]["tokens_max_over_mean"]
    assert said == opened.data.facts(num_parts=4)["tokens_max_over_mean"] > 1.0


@pytest.mark.parametrize("recomputes", [False, True])
def test_the_model_has_the_seed_of_the_recipe_and_recomputes_where_the_deepspeed_file_says_so(
    recomputes: bool, opened: Opened
) -> None:
    kept = {"activation_checkpointing": {"number_checkpoints": 1}} if recomputes else {}
    plan = replace(opened.plan, ds=replace(opened.plan.ds, settings={**opened.plan.ds.settings, **kept}))
    model = bert_ds.pretrain.build_model(plan, opened.run_dir)
    assert model.bert.activation_checkpointing == recomputes
    wanted = PretrainingModel(plan.run.model, kernels="torch", init_seed=11).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_from_as_many_processes_as_the_recipe_says(num_workers: int, opened: Opened) -> None:
    training = opened.plan.run.training.model_copy(update={"num_workers": num_workers})
    plan = replace(opened.plan, run=opened.plan.run.model_copy(update={"training": training}))
    before = len(multiprocessing.active_children())
    batches = training_batches(plan, opened.data, ALONE, start=2)
    (first, *_), wanted = next(batches), opened.data.rank_batches(2, rank=0, split=plan.split)
    assert len(multiprocessing.active_children()) - before == num_workers
    assert torch.equal(first.input_ids_T, wanted[0].input_ids_T)


@pytest.mark.parametrize("verb", [bert_ds.pretrain, bert_ds.finetune], ids=lambda verb: verb.__name__)
def test_every_option_of_a_launch_is_read_by_the_verb(verb: ModuleType) -> None:
    parser = argparse.ArgumentParser()
    add_launch_options(parser)
    options = set(vars(parser.parse_args([]))) - {"deepspeed", "local_rank"}
    assert options >= {"resume", "hang_limit", "start_limit", "preflight"}
    assert options <= set(re.findall(r"\bargs\.(\w+)", inspect.getsource(verb)))


@pytest.mark.parametrize(
    ("verb", "trains", "words", "wanted"),
    [
        (
            train_tokenizer,
            "train_subwords",
            ["--kind", "unigram", "--marks", "bert"],
            {"kind": "unigram", "marks": "bert"},
        ),
        (train_wordpiece, "train_wordpiece", ["--cased"], {"lowercase": False}),
        (train_wordpiece, "train_wordpiece", [], {"lowercase": True}),
    ],
)
def test_a_tokenizer_is_trained_as_the_command_line_says(
    verb: ModuleType, trains: str, words: list[str], wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Mock(files=[Mock(num_bytes=9)], skipped=[])
    parts = {"find_input_files": found, "DocumentTexts": ["text"], trains: Mock(vocab_size=99, fingerprint="f")}
    calls = Calls(monkeypatch, verb, **parts)
    given = ["--input", "a", "b", "--output", "made", "--vocab_size", "99", "--text_field", "body"]
    monkeypatch.setattr("sys.argv", ["train.py", *given, *words])
    verb.main()
    (read,), (trained,) = calls["DocumentTexts"], calls[trains]
    assert read["text_field"] == "body"
    assert {"vocab_size": 99, "output": "made", **wanted}.items() <= trained.items()


MODEL_WORDS = {
    "finetune": ["--task", "sst2", "--model"],
    "score": ["--task", "sst2", "--model"],
    "probe": ["--task", "ud_pos", "--model"],
    "predict": ["--model"],
    "show_masks": ["--model"],
    "export_hf": ["--onnx", "--model"],
    "init": ["new.json", "--corpus", "shards", "--like"],
}


@pytest.mark.parametrize("verb", MODEL_WORDS)
def test_every_verb_that_takes_a_model_takes_one_by_its_name_on_the_hub(
    verb: str, tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        verb_arguments, "hub_folder", lambda path, option: tiny_export if str(path) == "you/it" else path
    )
    args = getattr(verb_arguments, f"{verb}_arguments")([*MODEL_WORDS[verb], "you/it"])
    assert (args.like if verb == "init" else args.model) == tiny_export


class Taken:
    """Stands where a foreign kernel is, which wants a GPU or a compiler, and keeps what it was given."""

    def __init__(self, groups: Any, **settings: Any) -> None:
        self.groups, self.settings = groups, settings


@pytest.mark.parametrize(
    ("kind", "module", "name", "own"),
    [
        ("DeepSpeedFusedAdam", "deepspeed.ops.adam", "FusedAdam", {"adam_w_mode": True}),
        ("DeepSpeedCpuAdam", "deepspeed.ops.adam", "DeepSpeedCPUAdam", {"adamw_mode": True}),
        ("DeepSpeedFusedLamb", "deepspeed.ops.lamb", "FusedLamb", {"min_coeff": 0.02, "max_coeff": 7.0}),
    ],
)
def test_a_foreign_kernel_gets_the_settings_of_the_recipe(
    kind: str, module: str, name: str, own: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = getattr(optimizer_config, f"{kind}Config")
    given = {"lr": 0.5, "betas": (0.7, 0.8), "eps": 1e-3}
    chosen = {key: value for key, value in own.items() if key.endswith("coeff")}
    monkeypatch.setattr(f"{module}.{name}", Taken)
    monkeypatch.setattr(foreign_optimizers, "_missing_compiler", lambda: [])
    kinds = {key: (lambda: [], build) for key, (_, build) in foreign_optimizers._KINDS.items()}
    monkeypatch.setattr(foreign_optimizers, "_KINDS", kinds)
    groups = [{"params": [], "weight_decay": 0.3}]
    found: Any = foreign_optimizers.make_foreign_optimizer(
        config(**given, **chosen, weight_decay=0.3, bias_correction=False), groups
    )
    assert found.groups is groups
    assert found.settings == {**given, **own, "bias_correction": False}
