"""Twenty steps of the trainer against a plain script: losses, rates, norms, dropout seeds, skipped steps, weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_training import PlainStep, Settings, Weights, work_out
from ranks_harness import run_ranks
from tiny_training import TinyBatch, TinyModel, ds_config, full_weights, join_alone, micro_batch, tiny_services
from torch import Tensor
from torch.func import functional_call

from bert_ds.configuration.recipe.optimizer_config import AdamWConfig
from bert_ds.configuration.recipe.schedule_config import ScheduleConfig
from bert_ds.reporting.run_log import read_metrics
from bert_ds.training.checkpoints.train_state import LoopSettings, TrainState
from bert_ds.training.engine import make_engine
from bert_ds.training.loop.train_loop import train
from bert_ds.training.optimizers.factory import make_optimizer

SETTINGS = Settings(not_decayed=("dense.bias", "LayerNorm.weight", "LayerNorm.bias", "pair.bias"))
NUM_PARTS = 4
NOT_A_NUMBER, SPIKE = 7, 16


class SeedKeeper(TinyModel):
    """A TinyModel that remembers which dropout seeds it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds: list[int] = []

    def forward(self, *, dropout_seed: Tensor | None, **inputs: Any) -> tuple:
        if dropout_seed is not None:
            self.seeds.append(int(dropout_seed))
        return super().forward(dropout_seed=dropout_seed, **inputs)


def parts_of(step: int) -> list[TinyBatch]:
    """The four micro-batches of a step; one step has a target that is no number, one has huge targets."""
    parts = [micro_batch(step, part) for part in range(NUM_PARTS)]
    parts[1].y_T.mul_({NOT_A_NUMBER: float("nan"), SPIKE: 30.0}.get(step, 1.0))
    return parts


def sums_of(weights: Weights, batch: TinyBatch, seed: int | None) -> Tensor:
    inputs = {**batch.model_inputs(), "dropout_seed": None if seed is None else torch.tensor([seed])}
    return functional_call(TinyModel(), weights, (), inputs)[0]


@pytest.fixture(scope="module")
def plain() -> tuple[list[PlainStep], Weights]:
    """What the plain script makes of the same start and batches."""
    weights = {name: parameter.detach().clone() for name, parameter in TinyModel().named_parameters()}
    return work_out(weights, parts_of, sums_of, lambda batch: batch.counts.values(), SETTINGS), weights


def trained(rank: int, world_size: int, run_dir: str, stage: int) -> dict[str, Any]:
    """Rows, seeds and weights of the trainer, the batch cut into ranks and micro-steps."""
    torch.set_num_threads(1)
    model, accumulation = SeedKeeper(), NUM_PARTS // world_size
    given = {"lr": 0.5, "betas": SETTINGS.betas, "eps": SETTINGS.eps, "weight_decay": SETTINGS.decay}
    config = ds_config(stage, accumulation=accumulation, world_size=world_size) | {"gradient_clipping": SETTINGS.clip}
    engine = make_engine(model, make_optimizer(AdamWConfig(**given), model.named_parameters()), config)
    schedule = ScheduleConfig(type="cosine", warmup_steps=SETTINGS.warmup, min_lr_fraction=SETTINGS.final_share)
    loop = LoopSettings(
        SETTINGS.total_steps,
        SETTINGS.seed,
        SETTINGS.peak_lr,
        schedule,
        log_every_steps=1,
        spike_sigmas=SETTINGS.sigmas,
        spike_window=SETTINGS.window,
    )
    mine = slice(rank * accumulation, (rank + 1) * accumulation)
    batches: Iterator[Any] = (parts_of(step)[mine] for step in range(1, SETTINGS.total_steps + 1))
    services = tiny_services(Path(run_dir), rank, world_size)
    train(engine, batches, state=TrainState(), loop=loop, services=services)
    path = Path(run_dir) / "metrics.jsonl"
    rows = [read_metrics(path, kind) for kind in ("train", "skipped")] if rank == 0 else [[], []]
    return {"rows": rows, "seeds": model.seeds, "weights": full_weights(engine)}


def assert_same_run(found: dict[str, Any], plain: tuple[list[PlainStep], Weights]) -> None:
    steps, weights = plain
    taken, skipped = found["rows"]
    assert [row["step"] for row in skipped] == [NOT_A_NUMBER, SPIKE]
    assert [row["spike"] for row in skipped] == [False, True]
    assert [row["step"] for row in taken] == [n for n, step in enumerate(steps, start=1) if step.applied]
    for row in taken:
        step = steps[row["step"] - 1]
        figures = [row["loss"], row["loss_square"], row["loss_pair"], row["grad_norm"]]
        assert figures == pytest.approx([step.loss, *step.means, step.norm], rel=2e-4)
        assert row["lr"] == pytest.approx(step.lr, rel=1e-12)
    assert max(step.norm for step in steps if step.applied) > SETTINGS.clip > min(step.norm for step in steps)
    flat = torch.cat([weights[name].flatten() for name, _ in TinyModel().named_parameters()])
    torch.testing.assert_close(found["weights"], flat, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_twenty_steps_are_those_of_the_plain_script(stage: int, plain: Any, tmp_path: Path) -> None:
    join_alone()
    found = trained(0, 1, str(tmp_path), stage)
    assert_same_run(found, plain)
    bad = NUM_PARTS * (NOT_A_NUMBER - 1)
    seeds = [seed for step in plain[0] for seed in step.seeds]
    # A bad step is taken again for its report, with the same dropout.
    again = [*seeds[: bad + 4], *seeds[bad : bad + 4], *seeds[bad + 4 : 4 * SPIKE]]
    assert found["seeds"] == [*again, *seeds[4 * (SPIKE - 1) : 4 * SPIKE], *seeds[4 * SPIKE :]]


def test_two_ranks_take_the_same_twenty_steps(plain: Any, tmp_path: Path) -> None:
    first, second = run_ranks(trained, 2, str(tmp_path), 2)
    assert_same_run(first, plain)
    assert torch.equal(first["weights"], second["weights"])
    assert first["seeds"][:4] == [*plain[0][0].seeds[:2], *plain[0][1].seeds[:2]]
    assert second["seeds"][:4] == [*plain[0][0].seeds[2:], *plain[0][1].seeds[2:]]
