"""Trust ratios and update norms in metrics.jsonl: what users tune LAMB by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks_harness import run_ranks
from tiny_training import TinyModel, ds_config, join_alone, step_batches, tiny_loop, tiny_services

from bert_ds.configuration.recipe.optimizer_config import AdamWConfig, LambConfig, LansConfig
from bert_ds.reporting.run_log import read_metrics
from bert_ds.training.checkpoints.train_state import TrainState
from bert_ds.training.engine import make_engine
from bert_ds.training.loop.train_loop import train
from bert_ds.training.optimizers.factory import make_optimizer

CASES = {"lamb": LambConfig, "lans": LansConfig}
KINDS = {"dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias", "pair.weight", "pair.bias"}


def logged(folder: Path, config: Any, *, stage: int, rank: int = 0, world_size: int = 1) -> tuple[list[Any], Any]:
    """Train 5 steps, logging steps 1, 3 and 5; return the rows and the optimizer."""
    model = TinyModel()
    optimizer = make_optimizer(config(lr=1e-2, weight_decay=0.1), model.named_parameters())
    engine = make_engine(model, optimizer, ds_config(stage, accumulation=4 // world_size, world_size=world_size))
    services = tiny_services(folder, rank, world_size)
    loop = tiny_loop(5, log_every_steps=3)
    train(engine, step_batches(0, rank, 4 // world_size), state=TrainState(), loop=loop, services=services)
    return read_metrics(folder / "metrics.jsonl"), optimizer


def log_everywhere(rank: int, world_size: int, folder: str) -> dict[str, list[Any]]:
    """Worker: the trust part of the rows of every optimizer and stage."""
    found = {}
    for name, config in CASES.items():
        for stage in (0, 1, 2, 3):
            run_dir = Path(folder) / f"{name}-{stage}"
            rows, _ = logged(run_dir, config, stage=stage, rank=rank, world_size=world_size)
            found[f"{name}-{stage}"] = [row.get("trust") for row in rows] if rank == 0 else []
    return found


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_ranks(log_everywhere, 2, str(tmp_path_factory.mktemp("trust")))[0]


def flat(trust: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """kind/field/statistic -> value."""
    return {f"{k}/{f}/{s}": v for k, fields in trust.items() for f, spread in fields.items() for s, v in spread.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_logged_ratios_are_those_of_one_rank_without_zero(
    name: str, stage: int, on_two_ranks: Any, tmp_path: Path
) -> None:
    join_alone()
    rows, _ = logged(tmp_path, CASES[name], stage=0)
    for found, row in zip(on_two_ranks[f"{name}-{stage}"], rows, strict=True):
        assert flat(found) == pytest.approx(flat(row["trust"]), rel=1e-4)
        assert found.keys() == KINDS


def test_a_row_has_the_statistics_of_its_own_step(tmp_path: Path) -> None:
    join_alone()
    rows, optimizer = logged(tmp_path, LambConfig, stage=2)
    assert [row["step"] for row in rows] == [1, 3, 5]
    last = optimizer.trust_statistics()["dense.weight"]
    assert rows[-1]["trust"]["dense.weight"]["update_norm"] == {
        "min": last.update_norm,
        "median": last.update_norm,
        "max": last.update_norm,
    }
    assert rows[-1]["trust"]["dense.weight"]["trust_ratio"]["max"] == last.trust_ratio != 1.0
    assert rows[0]["trust"] != rows[-1]["trust"]


def test_nothing_is_read_from_the_device_at_a_step_that_is_not_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bert_ds.training.optimizers.lamb import Lamb

    join_alone()
    calls, genuine = [], Lamb.trust_statistics
    monkeypatch.setattr(Lamb, "trust_statistics", lambda self: calls.append(1) or genuine(self))
    logged(tmp_path, LambConfig, stage=0)
    assert len(calls) == 3


def test_an_optimizer_without_trust_ratios_logs_none(tmp_path: Path) -> None:
    join_alone()
    rows, _ = logged(tmp_path, AdamWConfig, stage=1)
    assert all("trust" not in row for row in rows)
