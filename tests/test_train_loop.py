"""The loop and one optimizer step of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks_harness import run_ranks
from tiny_training import ds_config, full_weights, step_batches, tiny_engine, tiny_plan, tiny_services

from bert_ds.run_log import read_metrics
from bert_ds.training.train_loop import train
from bert_ds.training.train_state import TrainState


def train_tiny(rank: int, world_size: int, run_dir: str, stage: int, accumulation: int) -> list[float]:
    engine = tiny_engine(ds_config(stage, accumulation=accumulation, world_size=world_size))
    services = tiny_services(Path(run_dir), rank, world_size)
    batches = step_batches(0, rank, accumulation)
    train(engine, batches, state=TrainState(), plan=tiny_plan(4), services=services)
    return full_weights(engine).tolist()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_does_not_depend_on_how_it_is_cut_into_ranks_and_micro_steps(stage: int, tmp_path: Path) -> None:
    results = {}
    for world_size, accumulation in ((1, 4), (2, 2), (4, 1)):
        folder = tmp_path / f"{world_size}x{accumulation}"
        weights = run_ranks(train_tiny, world_size, str(folder), stage, accumulation)
        results[world_size] = torch.tensor(weights[0]), [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]
    weights_1, losses_1 = results[1]
    for world_size in (2, 4):
        weights, losses = results[world_size]
        print(stage, world_size, (weights - weights_1).abs().max() / weights_1.abs().max(), losses, losses_1)
        assert losses == pytest.approx(losses_1, rel=1e-6)
        assert (weights - weights_1).abs().max() <= 1e-6 * weights_1.abs().max()
