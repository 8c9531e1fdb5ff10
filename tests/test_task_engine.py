"""What fine-tuning adds around the loop: frozen weights and rates by layer under ZeRO, predictions, best steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from downstream_cases import CONFIG, review_task, write_tiny_export
from ranks_harness import run_ranks
from tiny_training import ds_config

from bert_ds.basics.ranks import DataError, Ranks
from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.configuration.task.task_config import FreezeConfig, load_task, trained_task
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.rows.features import Feature
from bert_ds.downstream.rows.task_batches import features_fingerprint, step_batches
from bert_ds.downstream.tuning.evaluation_history import (
    Measured,
    best_of,
    extended,
    is_exhausted,
    read_history,
    write_history,
)
from bert_ds.downstream.tuning.outcome import measure_side
from bert_ds.downstream.tuning.task_engine import build_model, freeze, layer_lr_scale
from bert_ds.downstream.tuning.task_rows import read_task
from bert_ds.encoder.families.table import weight_patterns
from bert_ds.encoder.pretrained import check_tokenizer, load_pretrained
from bert_ds.reporting.run_log import RunLog
from bert_ds.training.checkpoints.checkpoint_loader import CheckpointPolicy, save_checkpoint
from bert_ds.training.checkpoints.fp32_weights import load_fp32_state_dict
from bert_ds.training.checkpoints.train_state import TrainState
from bert_ds.training.engine import make_engine
from bert_ds.training.loop.train_step import agree_on_totals, forward_backward, take_step
from bert_ds.training.optimizers.factory import make_optimizer
from bert_ds.training.optimizers.param_groups import TensorFacts

FROZEN = {"layers": 1, "embeddings": True}
CASES = [(stage, "fp32", FROZEN) for stage in range(4)]
CASES += [(2, "bf16", FROZEN), (3, "bf16", {"encoder": True}), (0, "fp32", {"encoder": True})]


def train_frozen(rank: int, world_size: int, folder: str) -> list[dict[str, Any]]:
    """Two steps of each case; what of the merged weights moved, and the predictions of all ranks' rows."""
    return [_train(Path(folder), rank, world_size, *case, at=str(index)) for index, case in enumerate(CASES)]


def _train(
    folder: Path, rank: int, world_size: int, stage: int, precision: str, freeze: dict[str, Any], *, at: str
) -> dict[str, Any]:
    task = load_task(folder / "task.json").model_copy(update={"layerwise_lr_decay": 0.5})
    task = task.model_copy(update={"freeze": task.freeze.model_copy(update=freeze)})
    pretrained = load_pretrained(folder / "hf")
    rows = read_task(task, load_tokenizer(folder / "hf"), say=lambda text: None)
    plan = trained_task(task, pretrained.config, num_sequences=len(rows.train.features))
    model, rates = build_model(
        plan, rows, tensors=pretrained.tensors, activation_checkpointing=False, say=lambda text: None
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(
        plan.optimizer,
        model.named_parameters(),
        facts=TensorFacts(*weight_patterns(model.config)),
        lr_scale_of=rates,
    )
    engine = make_engine(model, optimizer, ds_config(stage, precision=precision, accumulation=2, world_size=world_size))
    count = KINDS[task.kind].count_targets
    split = BatchSplit(2, 2, world_size)
    batches = step_batches(rows.train.features, 0, seed=1, rank=rank, split=split, count_targets=count)
    for step in (1, 2):
        micro_batches = next(batches)
        totals = agree_on_totals(micro_batches, data_wait_s=0.0, stop=False)
        forward_backward(engine, micro_batches, counts=totals.counts, seed=1, step=step)
        assert take_step(engine)[0]
    found = measure_side(engine, task, rows.validation, rows.labels)
    run_dir = folder / at
    log = RunLog(run_dir, Ranks(rank, rank, world_size), total_steps=2)
    path = save_checkpoint(engine, run_dir, state=TrainState(step=2), policy=CheckpointPolicy(), log=log)
    assert path is not None
    merged = load_fp32_state_dict(path)
    moved = {name: bool((merged[name] - old).abs().max() > 4e-3 * old.abs().max()) for name, old in before.items()}
    values = [prediction.scores for prediction in found.predictions]
    return {"moved": moved, "scores": values, "figures": found.figures}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("frozen")
    write_tiny_export(folder / "hf")
    review_task(folder, rows=40, optimizer={"type": "adamw", "lr": 0.05}, evaluation={"batch_size": 3})
    return run_ranks(train_frozen, 2, str(folder), timeout_s=300)


def is_frozen(name: str, freeze: dict[str, Any]) -> bool:
    if name.startswith("bert.embeddings.") or name.startswith("bert.layer.0."):
        return True
    return bool(freeze.get("encoder")) and name.startswith("bert.layer.")


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"stage{s}-{p}-{'-'.join(f)}" for s, p, f in CASES])
def test_frozen_weights_stay_and_all_others_move_and_both_are_in_the_merged_checkpoint(
    index: int, two_ranks: list[list[dict[str, Any]]]
) -> None:
    moved, freeze = two_ranks[0][index]["moved"], CASES[index][2]
    assert {name for name, has_moved in moved.items() if has_moved} == {n for n in moved if not is_frozen(n, freeze)}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_gives_the_same_predictions_on_all_ranks(stage: int, two_ranks: list[list[dict[str, Any]]]) -> None:
    assert two_ranks[0][stage] == two_ranks[1][stage]
    assert two_ranks[0][stage]["figures"]["loss"] == pytest.approx(two_ranks[0][0]["figures"]["loss"], rel=1e-4)
    scores = torch.tensor(two_ranks[0][stage]["scores"])
    assert scores.shape == (10, 2)
    assert torch.allclose(scores, torch.tensor(two_ranks[0][0]["scores"]), atol=1e-4)


def test_of_twelve_layers_those_that_are_counted_are_frozen() -> None:
    model = torch.nn.Module()
    model.bert = torch.nn.Module()
    model.bert.layer = torch.nn.ModuleList(torch.nn.Linear(1, 1, bias=False) for _ in range(12))
    assert freeze(model, FreezeConfig(layers=2)) == 2
    left = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert left == [f"bert.layer.{layer}.weight" for layer in range(2, 12)]


def test_the_rate_falls_from_the_head_to_the_embeddings() -> None:
    names = ("head.classifier.weight", "bert.pooler.dense_bias", "bert.layer.2.attention.qkv_bias")
    assert [layer_lr_scale(name, 3, 0.5) for name in names] == [1.0, 1.0, 0.5]
    assert layer_lr_scale("bert.layer.0.attention.qkv_weight", 3, 0.5) == 0.125
    assert layer_lr_scale("bert.embeddings.word_weight", 3, 0.5) == 0.0625


def test_the_earliest_of_equal_evaluations_is_the_best() -> None:
    history = [Measured(10, 0.5), Measured(20, 0.7), Measured(30, 0.7), Measured(40, 0.6)]
    assert best_of(history) == (20, 0.7)
    assert (is_exhausted(history, 2), is_exhausted(history, 3), is_exhausted(history, None)) == (True, False, False)


def test_a_resumed_run_forgets_the_evaluations_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.json"
    assert read_history(path, until_step=9) == []
    write_history(path, [Measured(10, 0.5), Measured(20, 0.9)])
    kept = read_history(path, until_step=15)
    assert extended(kept, Measured(10, 0.4)) == [(10, 0.4)]


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_export(tmp_path / "hf")
    with pytest.raises(DataError, match=f"the tokenizer has 99 pieces, the model {CONFIG.vocab_size}"):
        check_tokenizer(folder, vocab_size=99, fingerprint="a")


def test_two_tokenizers_of_one_size_are_not_mixed_up(tmp_path: Path) -> None:
    folder = write_tiny_export(tmp_path / "hf", fingerprint="one")
    with pytest.raises(DataError, match="with the tokenizer one, the folder holds two: two tokenizers are mixed up"):
        check_tokenizer(folder, vocab_size=CONFIG.vocab_size, fingerprint="two")


def test_whatever_changes_the_batches_of_a_task_changes_its_fingerprint() -> None:
    ids, types = np.array([1, 2, 3]), np.array([0, 0, 1])
    feature = Feature(0, ids, types, {"label": np.array([1])})
    others = [
        feature._replace(input_ids=ids[::-1].copy()),
        feature._replace(token_type_ids=types[::-1].copy()),
        feature._replace(targets={"label": np.array([0])}),
    ]
    prints = [features_fingerprint([one], settings="1 8 a") for one in (feature, *others)]
    prints += [features_fingerprint([feature], settings="2 8 a"), features_fingerprint([feature] * 2, settings="1 8 a")]
    assert len(set(prints)) == 6
    assert prints[0] == features_fingerprint([feature._replace(example=7)], settings="1 8 a")
