"""What the loop, its meter, a replay and the factory of optimizers hand to each other, looked at in this process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
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

from bert_ds.basics.loss_term import LossTerm
from bert_ds.basics.ranks import DivergedError, Ranks
from bert_ds.configuration.recipe.optimizer_config import DeepSpeedFusedAdamConfig
from bert_ds.reporting.run_log import read_metrics
from bert_ds.training.checkpoints.checkpoint_loader import load_before
from bert_ds.training.checkpoints.checkpoint_saver import CheckpointPolicy, CheckpointSaver
from bert_ds.training.checkpoints.train_state import TrainState
from bert_ds.training.launch.launch_precision import Decision
from bert_ds.training.loop import evaluation, launch_steps, replay, step_budget, train_loop, trial_step
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


def test_fp16_may_overflow_as_often_as_it_likes_while_it_looks_for_its_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join_alone()
    engine, services = tiny_engine(ds_config(2)), tiny_services(tmp_path, 0, 1)
    monkeypatch.setattr(engine, "fp16_enabled", lambda: True)
    with pytest.raises(DivergedError):  # a loss that is no number is not the scale's
        train_loop.train(
            engine, sick(0, {1, 2}), state=TrainState(), loop=tiny_loop(3, max_bad_steps=2), services=services
        )
    monkeypatch.setattr(train_loop, "take_step", lambda engine: (False, torch.tensor(float("inf"))))
    state, loop = TrainState(), tiny_loop(3, max_bad_steps=2)
    train_loop.train(engine, sick(0, set()), state=state, loop=loop, services=services)
    assert (state.step, state.skipped_steps, state.bad_streak) == (3, 3, 0)


@pytest.mark.parametrize(("stage_starts", "known"), [((), [7.0, 8.0]), ((4,), [])])
def test_what_losses_are_compared_with_goes_back_with_the_run_and_begins_at_the_batch_of_a_stage(
    stage_starts: tuple[int, ...], known: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join_alone()
    state, forgotten, saved = TrainState(step=1, passed_over=2), [], []

    def go_back(state: TrainState) -> Iterator[Any]:
        state.go_back(TrainState(step=2, recent_losses=[7.0, 8.0]))
        return sick(7, set())

    def save(state: TrainState) -> bool:
        saved.append(state.recent_losses)
        return True

    monkeypatch.setattr(train_loop.LossGuard, "forget", lambda guard: forgotten.append(state.step))
    loop = tiny_loop(5, max_bad_steps=2, max_rollbacks=1, spike_sigmas=1e9, spike_window=5, stage_starts=stage_starts)
    services = tiny_services(tmp_path, 0, 1, roll_back=go_back, save=save)
    train_loop.train(tiny_engine(ds_config(2)), sick(3, {6, 7}), state=state, loop=loop, services=services)
    assert forgotten == [2] * len(stage_starts)  # the third step trains on the fifth batch
    assert [(losses[:-3], len(losses)) for losses in saved] == [(known, len(known) + 3)]


def test_a_launch_is_watched_by_the_limit_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, engine = Calls(monkeypatch, launch_steps, watched_for_hangs=nullcontext(), train=None), Mock()
    services = tiny_services(tmp_path, 1, 2)
    launch_steps.train_watched(engine, iter(()), state=TrainState(), loop=tiny_loop(1), services=services, limit_s=7.0)
    (given,) = calls["watched_for_hangs"]
    assert (given["limit_s"], given["ranks"], given["module"]) == (7.0, Ranks(1, 1, 2), engine.module)


def test_a_launch_says_why_it_computes_in_a_precision(tmp_path: Path) -> None:
    join_alone()
    folder = launch_steps.LaunchFolder(tmp_path / "run", {"run_config.json": "{}"}, "never")
    launch_steps.enter(folder, Ranks(0, 0, 1), total_steps=3, decision=Decision("bf16", "bf16 is faster here"))
    assert "bf16 is faster here" in (tmp_path / "run/logs/rank_0.log").read_text()


def test_rotation_goes_by_the_policy_of_the_saver(tmp_path: Path) -> None:
    join_alone()
    policy = CheckpointPolicy(keep_last=1, keep_every_steps=2, keep_steps=lambda: frozenset({3}))
    log = tiny_services(tmp_path, 0, 1).log
    saver = CheckpointSaver(tiny_engine(ds_config(2)), tmp_path, policy=policy, log=log)
    assert all(saver.save(TrainState(step=step)) for step in range(1, 6))
    left = {path.name.removeprefix("global_step") for path in (tmp_path / "checkpoints").glob("global_step*")}
    assert left == {"2", "3", "4", "5"}


def test_examples_of_stages_with_other_batches_add_up() -> None:
    state = TrainState()
    for examples, applied in ((4, True), (4, False), (12, True)):
        state.advance(applied, examples=examples)
    assert (state.consumed_examples, state.skipped_steps, state.step) == (20, 1, 3)


def test_batches_of_every_going_back_are_passed_over() -> None:
    state = TrainState(step=9)
    state.go_back(TrainState(step=6))
    state.step = 8
    state.go_back(TrainState(step=7, recent_losses=[2.0]))
    assert (state.step, state.passed_over, state.rollbacks, state.recent_losses) == (7, 4, 2, [2.0])


def test_nothing_is_saved_between_bad_steps(tmp_path: Path) -> None:
    join_alone()
    saved: list[int] = []
    services = tiny_services(tmp_path, 0, 1, save=lambda state: saved.append(state.step) is None)
    loop = tiny_loop(4, checkpoint_every_steps=1)
    train_loop.train(tiny_engine(ds_config(2)), sick(0, {2, 3}), state=TrainState(), loop=loop, services=services)
    assert saved == [1, 4]


def test_an_evaluation_leaves_the_model_training_and_a_loss_is_weighed() -> None:
    join_alone()
    engine, modes = tiny_engine(ds_config(2)), []
    engine.module.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    engine.train()
    evaluation.evaluate(engine, [micro_batch(1, 1)])
    assert (modes, engine.module.training) == ([False], True)
    means = evaluation.named_means(TinyModel.terms, [2.0, 4.0, 1.0, 1.0], counts={"rows": 1.0, "pairs": 2.0})
    assert means["loss"] == 2.0 + 0.5 * 2.0
    words = LossTerm("mlm", count="words", metric="mlm_correct", of_words=True)
    sums, counts = [8.0, 3.0, 6.0, 2.0, 2.0, 1.0], {"words": 4.0, "masked": 2.0, "kept": 2.0}
    told = evaluation._evaluated([words], sums, counts=counts, kinds=["masked", "kept"])
    assert told["loss_mlm_masked"] == 3.0 and not {"perplexity", "mlm_accuracy"} & set(told)


def test_a_micro_batch_is_settled_by_the_smallest_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    plan: Any = Mock()
    calls = Calls(monkeypatch, trial_step, with_auto_micro_batch=plan)
    monkeypatch.setattr(trial_step.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(trial_step.torch.cuda, "get_device_properties", lambda device: Mock(total_memory=100))
    monkeypatch.setattr(trial_step, "max_over_ranks", lambda value: max(value, -60.0))  # another rank has 60 bytes
    trial_step.settle_micro_batch(plan, [9.0], log=Mock())
    (given,) = calls["with_auto_micro_batch"]
    assert (given["memory_bytes"], given["mean_lengths"]) == (60, [9.0])


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


def test_a_replay_goes_by_what_the_checkpoint_has_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    join_alone()
    engine, log, places = tiny_engine(ds_config(2)), tiny_services(tmp_path, 0, 1).log, []
    saver = CheckpointSaver(engine, tmp_path, policy=CheckpointPolicy(facts=FACTS), log=log)
    assert saver.save(TrainState(step=2, passed_over=3))
    calls = Calls(monkeypatch, replay, gradient_report=[])

    def batch(place: int) -> Any:
        places.append(place)
        return [micro_batch(place, 0)]

    replay.replay_step(engine, 4, batch=batch, seed=8, facts=FACTS, log=log)
    (given,) = calls["gradient_report"]
    assert (places, given["seed"], given["step"]) == ([6], 8, 4)


def test_a_foreign_kernel_decays_what_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, model = Calls(monkeypatch, factory, make_foreign_optimizer=None), TinyModel()
    config = DeepSpeedFusedAdamConfig(lr=1e-3, weight_decay=0.3)
    factory.make_optimizer(config, model.named_parameters(), facts=TensorFacts(no_decay=("pair.*",)))
    decayed, not_decayed = calls["make_foreign_optimizer"][0]["groups"]
    assert (decayed["weight_decay"], not_decayed["weight_decay"]) == (0.3, 0.0)
    assert {id(one) for one in not_decayed["params"]} == {id(model.pair.weight), id(model.pair.bias)}
