"""What the loop, its meter, a replay and the factory of optimizers hand to each other, looked at in this process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from call_watch import Calls
from tiny_training import (
    FACTS,
    TinyModel,
    ds_config,
    join_alone,
    micro_batch,
    run_tiny,
    step_batches,
    tiny_engine,
    tiny_loop,
    tiny_services,
)

from bert_ds.basics.ranks import Ranks
from bert_ds.configuration.recipe.optimizer_config import DeepSpeedFusedAdamConfig
from bert_ds.reporting.run_log import read_metrics
from bert_ds.training.checkpoints.checkpoint_loader import load_before
from bert_ds.training.checkpoints.train_state import TrainState
from bert_ds.training.loop import evaluation, step_budget, train_loop
from bert_ds.training.loop.evaluation import Evaluation
from bert_ds.training.loop.throughput import Throughput
from bert_ds.training.optimizers import factory
from bert_ds.training.optimizers.param_groups import TensorFacts


@dataclass
class Meter(Throughput):
    """Remembers what it was asked, and knows whether it stands still."""

    left: list[int] = field(default_factory=list)
    is_paused: bool = False

    def report(self, *, steps_left: int) -> dict[str, float | None]:
        self.left.append(steps_left)
        return super().report(steps_left=steps_left)

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.is_paused = True
        with super().paused():
            yield
        self.is_paused = False


def sick(start: int, bad: set[int]) -> Iterator[Any]:
    """Batches after a place of the order, of which some have a target that is no number."""
    for number, micro_batches in enumerate(step_batches(start, 0, 1), start=start + 1):
        if number in bad:
            micro_batches[-1].y_T.mul_(float("nan"))
        yield micro_batches


def test_steps_left_are_counted_and_what_is_no_training_is_no_time_of_it(tmp_path: Path) -> None:
    join_alone()
    meter, still = Meter(world_size=1), []

    def go_back(state: TrainState) -> Iterator[Any]:
        still.append(("back", meter.is_paused))
        state.go_back(TrainState(step=2))
        return sick(5, set())

    services = tiny_services(
        tmp_path,
        0,
        1,
        throughput=meter,
        evaluate=lambda state: still.append(("evaluate", meter.is_paused)) or Evaluation({}),
        save=lambda state: still.append(("save", meter.is_paused)) is None,
        roll_back=go_back,
    )
    how = {"evaluate_every_steps": 2, "checkpoint_every_steps": 4, "max_bad_steps": 2, "max_rollbacks": 1}
    state = train_loop.train(
        tiny_engine(ds_config(2)), sick(0, {3, 5}), state=TrainState(), loop=tiny_loop(6, **how), services=services
    )
    assert (state.step, state.rollbacks) == (6, 0)
    assert {name for name, _ in still} == {"evaluate", "save"} and all(paused for _, paused in still)
    bad = sick(0, {3, 4})
    train_loop.train(tiny_engine(ds_config(2)), bad, state=TrainState(), loop=tiny_loop(6, **how), services=services)
    assert ("back", True) in still
    assert meter.left[:4] == [5, 4, 2, 0] and meter.left[-4:] == [3, 2, 1, 0]


def test_the_wait_for_data_is_that_of_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    join_alone()
    agree = train_loop.agree_on_totals
    monkeypatch.setattr(train_loop, "agree_on_totals", lambda *a, **k: agree(*a, **k)._replace(data_wait_s=900.0))
    services = tiny_services(tmp_path, 0, 1)
    train_loop.train(
        tiny_engine(ds_config(2)), step_batches(0, 0, 1), state=TrainState(), loop=tiny_loop(1), services=services
    )
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["data_wait_share"] == 1.0


def test_the_report_of_a_bad_step_says_its_batch_after_going_back(tmp_path: Path) -> None:
    join_alone()
    services = tiny_services(tmp_path, 0, 1)
    state = TrainState(passed_over=4)
    train_loop.train(tiny_engine(ds_config(2)), sick(4, {6}), state=state, loop=tiny_loop(3), services=services)
    report = json.loads((tmp_path / "trouble/step_2/rank_0.json").read_text())
    assert (report["step"], report["batch"]) == (2, 6)


def test_examples_of_stages_with_other_batches_add_up() -> None:
    state = TrainState()
    for examples, applied in ((4, True), (4, False), (12, True)):
        state.advance(applied, examples=examples)
    assert (state.consumed_examples, state.skipped_steps, state.step) == (20, 1, 3)


def test_sources_whose_paths_end_alike_keep_figures_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"": 1.0, "a/text": 2.0, "b/text/": 3.0, "b/books": 4.0}
    monkeypatch.setattr(evaluation, "evaluate", lambda engine, batches: {"loss_mlm_masked": losses[batches], "loss": 9})
    engine: Any = None
    found = evaluation.evaluate_sources(engine, ((path, path) for path in losses))  # type: ignore[misc]
    assert found == {
        "loss_mlm_masked": 1.0,
        "loss": 9,
        "loss_mlm_masked of a/text": 2.0,
        "loss_mlm_masked of b/text/": 3.0,
        "loss_mlm_masked of books": 4.0,
    }


def test_an_evaluation_is_timed_by_a_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    join_alone()
    monkeypatch.setattr(step_budget, "evaluate", lambda engine, part: time.sleep(0.01 * len(part)))
    batches = iter(step_batches(0, 0, 1))
    costs = step_budget.time_steps(tiny_engine(ds_config(2)), batches, held_out=[micro_batch(1, 1)] * 40, minutes=1e-6)
    assert costs.evaluation_s >= 0.4


def test_a_step_is_replayed_on_the_weights_from_before_it(tmp_path: Path) -> None:
    join_alone()
    run_tiny(tmp_path, Ranks(0, 0, 1), config=ds_config(2), steps=3, save_every=1)
    log = tiny_services(tmp_path, 0, 1).log
    assert load_before(tiny_engine(ds_config(2)), tmp_path, 3, facts=FACTS, log=log).step == 2


def test_a_foreign_kernel_decays_what_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, model = Calls(monkeypatch, factory, make_foreign_optimizer=None), TinyModel()
    config = DeepSpeedFusedAdamConfig(lr=1e-3, weight_decay=0.3)
    factory.make_optimizer(config, model.named_parameters(), facts=TensorFacts(no_decay=("pair.*",)))
    decayed, not_decayed = calls["make_foreign_optimizer"][0]["groups"]
    assert (decayed["weight_decay"], not_decayed["weight_decay"]) == (0.3, 0.0)
    assert {id(one) for one in not_decayed["params"]} == {id(model.pair.weight), id(model.pair.bias)}
