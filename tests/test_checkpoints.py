"""Saving, damage, resuming: on one rank in this process, and on two ranks in one launch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_harness import run_ranks
from tiny_training import (
    ds_config,
    full_weights,
    optimizer_digest,
    step_batches,
    tiny_engine,
    tiny_plan,
    tiny_services,
)

from bert_ds.run_log import read_metrics
from bert_ds.training.checkpoint_folder import find_checkpoint
from bert_ds.training.checkpoints import CheckpointPolicy, checkpoint_bytes, resume, save_checkpoint
from bert_ds.training.fp32_weights import load_fp32_state_dict
from bert_ds.training.train_loop import train
from bert_ds.training.train_state import TrainState

FACTS = {"data_fingerprint": "d1"}


def run_tiny(
    run_dir: Path, rank: int, world_size: int, *, config: dict[str, Any], steps: int
) -> tuple[Any, TrainState]:
    """Resume what the folder holds and train on to `steps`, saving every second step."""
    engine = tiny_engine(config)
    services = tiny_services(run_dir, rank, world_size)
    log = services.log
    state = resume(engine, run_dir, name=None, facts=FACTS, log=log) or TrainState()
    policy = CheckpointPolicy(keep_last=2, facts=FACTS)

    def save(state: TrainState) -> bool:
        return save_checkpoint(engine, run_dir, state=state, policy=policy, log=log) is not None

    log.start(state.step, {})
    accumulation = config["gradient_accumulation_steps"]
    batches = step_batches(state.step, rank, accumulation)
    plan = tiny_plan(6, checkpoint_every_steps=2, max_steps=steps)
    train(engine, batches, state=state, plan=plan, services=replace(services, save=save))
    log.close()
    return engine, state


def resume_everywhere(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """For each stage and precision: six steps at once, and three then three."""
    results = {}
    for stage, precision in ((0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")):
        config = ds_config(stage, precision=precision, accumulation=2, world_size=world_size)
        name = f"{stage}-{precision}"
        whole, _ = run_tiny(Path(folder) / name / "whole", rank, world_size, config=config, steps=6)
        run_tiny(Path(folder) / name / "parts", rank, world_size, config=config, steps=3)
        parts, _ = run_tiny(Path(folder) / name / "parts", rank, world_size, config=config, steps=6)
        path = find_checkpoint(Path(folder) / name / "parts")
        exported = load_fp32_state_dict(path)
        live = dict(zip(exported_names(parts), full_weights(parts, flat=False), strict=True))
        results[name] = {
            "weights_equal": torch.equal(full_weights(whole), full_weights(parts)),
            "optimizer_equal": optimizer_digest(whole) == optimizer_digest(parts),
            "exported_equal": all(torch.equal(exported[key], value) for key, value in live.items()),
            "exported_names": sorted(exported),
            "tied": torch.equal(exported["tied.weight"], exported["dense.weight"]),
            "wrapper": type(parts.optimizer).__name__,
            "bytes": (sum(p.stat().st_size for p in path.iterdir()), checkpoint_bytes(parts)),
        }
    return results


def exported_names(engine: Any) -> list[str]:
    return [name for name, _ in engine.module.named_parameters()]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("resumed")
    return folder, run_ranks(resume_everywhere, 2, str(folder), timeout_s=300.0)[0]


CASES = ["0-fp32", "0-bf16", "1-bf16", "2-fp32", "3-fp32", "3-bf16"]


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(case: str, resumed: Any) -> None:
    folder, results = resumed
    losses = {
        part: [row["loss"] for row in read_metrics(folder / case / part / "metrics.jsonl")]
        for part in ("whole", "parts")
    }
    assert len(losses["whole"]) == 6
    assert losses["parts"] == losses["whole"]
    assert results[case]["weights_equal"]
    assert results[case]["optimizer_equal"]


@pytest.mark.parametrize("case", CASES)
def test_the_exported_weights_are_the_live_masters(case: str, resumed: Any) -> None:
    assert resumed[1][case]["exported_equal"]
    assert resumed[1][case]["exported_names"] == [
        "LayerNorm.bias",
        "LayerNorm.weight",
        "dense.bias",
        "dense.weight",
        "pair.bias",
        "pair.weight",
        "tied.weight",
    ]


def test_a_tied_weight_is_exported_under_both_names(resumed: Any) -> None:
    assert [resumed[1][case]["tied"] for case in CASES] == [True] * len(CASES)


def test_stage_1_with_fp32_accumulation_in_bf16_was_the_engine_under_test(resumed: Any) -> None:
    assert resumed[1]["1-bf16"]["wrapper"] == "BF16_Optimizer"


def test_the_announced_size_is_enough_and_not_much_more(resumed: Any) -> None:
    for case in CASES:
        written, announced = resumed[1][case]["bytes"]
        assert written <= announced
