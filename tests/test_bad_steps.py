"""Losses and gradients that spike or are not finite: skipped, looked into, and left behind by going back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_harness import run_ranks
from tiny_training import (
    FACTS,
    TinyModel,
    ds_config,
    full_weights,
    join_alone,
    optimizer_digest,
    step_batches,
    tiny_engine,
    tiny_loop,
    tiny_services,
)

from bert_ds.basics.loss_term import LossTerm
from bert_ds.basics.ranks import DivergedError
from bert_ds.configuration.recipe.optimizer_config import AdamWConfig
from bert_ds.configuration.recipe.schedule_config import ScheduleConfig
from bert_ds.training.checkpoints.checkpoint_loader import resume, roll_back
from bert_ds.training.checkpoints.checkpoint_saver import CheckpointPolicy, CheckpointSaver
from bert_ds.training.checkpoints.train_state import TrainState
from bert_ds.training.engine import make_engine
from bert_ds.training.loop.bad_steps import _finite_first
from bert_ds.training.loop.loss_guard import LossGuard
from bert_ds.training.loop.train_loop import MAX_REPORTS, train
from bert_ds.training.optimizers.factory import make_optimizer

BAD_STEP = 11
FAULTS = {"nan": float("nan"), "inf": float("inf"), "spike": 100.0}
GUARDED = {"spike_sigmas": 6.0, "spike_window": 8}


def sick_batches(rank: int, start: int, fault: str, bad: set[int], *, accumulation: int = 2) -> Iterator[Any]:
    """Batches after `start`; the last micro-batch of the bad ones has odd targets."""
    for number, micro_batches in enumerate(step_batches(start, rank, accumulation), start=start + 1):
        if number in bad:
            micro_batches[-1].y_T.mul_(FAULTS[fault])
        yield micro_batches


def one_bad_step(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """For each stage and fault: are the weights the same before and after, do they move in the next step."""
    found = {}
    for stage, precision in ((0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (3, "bf16")):
        for fault in FAULTS:
            name = f"{stage}-{precision}-{fault}"
            engine = tiny_engine(ds_config(stage, precision=precision, accumulation=2, world_size=world_size))
            services, state = tiny_services(Path(folder) / name, rank, world_size), TrainState()
            batches = sick_batches(rank, 0, fault, {BAD_STEP} if rank == 1 else set())
            digests = []
            for last in (BAD_STEP - 1, BAD_STEP, BAD_STEP + 1):
                loop = tiny_loop(20, max_steps=last, **GUARDED)
                train(engine, batches, state=state, loop=loop, services=replace(services, save=lambda at: True))
                digests.append((full_weights(engine).numpy().tobytes(), optimizer_digest(engine)))
            found[name] = (digests[0] == digests[1], digests[1] == digests[2], state.skipped_steps)
    return found


@pytest.fixture(scope="module")
def bad_steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("bad")
    return folder, run_ranks(one_bad_step, 2, str(folder), timeout_s=300.0)


def test_a_bad_loss_on_one_rank_changes_no_weight_or_moment_on_any_and_is_counted_on_all(bad_steps: Any) -> None:
    for found in bad_steps[1]:
        assert len(found) == 21
        assert found == dict.fromkeys(found, (True, False, 1))


def test_the_report_names_rank_micro_batch_and_tensors(bad_steps: Any) -> None:
    for name in ("0-fp32-nan", "2-fp32-nan", "3-bf16-nan"):
        ranks = [
            json.loads((bad_steps[0] / f"{name}/trouble/step_{BAD_STEP}/rank_{rank}.json").read_text())
            for rank in (0, 1)
        ]
        parts = [part["not_finite"] for rank in ranks for part in rank["micro_batches"]]
        assert parts[:3] == [[], [], []]
        assert "dense.weight" in parts[3]
        assert ranks[1]["micro_batches"][1]["loss_shares"]["square"] == "nan"
        assert (ranks[0]["step"], ranks[0]["batch"]) == (BAD_STEP, BAD_STEP)


def test_the_reports_of_all_ranks_add_up_to_the_loss_of_the_step_with_its_dropout(bad_steps: Any) -> None:
    folder = bad_steps[0] / f"1-fp32-spike/trouble/step_{BAD_STEP}"
    ranks = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    shares = [part["loss_shares"] for rank in ranks for part in rank["micro_batches"]]
    for name in ("square", "pair"):
        assert sum(share[name] for share in shares) == pytest.approx(ranks[0][f"loss_{name}"], rel=1e-5)


def test_the_report_of_a_spike_has_its_height_and_the_largest_gradients(bad_steps: Any) -> None:
    folder = bad_steps[0] / f"1-fp32-spike/trouble/step_{BAD_STEP}"
    sane, sick = (json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1))
    assert " sigma above " in sane["reason"]
    largest = [max(part["largest_gradients"].values()) for part in sane["micro_batches"] + sick["micro_batches"]]
    assert largest[3] > 20 * max(largest[:3])


def test_looking_into_a_bad_step_changes_nothing_that_is_trained(tmp_path: Path) -> None:
    join_alone()
    for stage in (2, 3):
        weights = []
        for skipped_before in (0, MAX_REPORTS):
            engine, services = tiny_engine(ds_config(stage, accumulation=2)), tiny_services(tmp_path, 0, 1)
            state = TrainState(skipped_steps=skipped_before)
            train(engine, sick_batches(0, 0, "nan", {2}), state=state, loop=tiny_loop(4), services=services)
            weights.append(full_weights(engine))
        assert torch.equal(*weights)


def run_sick(run_dir: Path, bad: set[int], *, steps: int, rank: int = 0, world_size: int = 1) -> tuple[Any, TrainState]:
    """Resume and train, saving every second step and going back after three bad steps in a row."""
    if world_size == 1:
        join_alone()
    model, accumulation = TinyModel(), 2 // world_size
    optimizer = make_optimizer(AdamWConfig(lr=1e-2), model.named_parameters())
    engine = make_engine(model, optimizer, ds_config(2, accumulation=accumulation, world_size=world_size))
    services = tiny_services(run_dir, rank, world_size)
    state = resume(engine, run_dir, name=None, facts=FACTS, log=services.log) or TrainState()
    saver = CheckpointSaver(engine, run_dir, policy=CheckpointPolicy(facts=FACTS), log=services.log)

    def batches(at: TrainState) -> Iterator[Any]:
        return sick_batches(rank, at.step + at.passed_over, "nan", bad, accumulation=accumulation)

    def go_back(at: TrainState) -> Iterator[Any] | None:
        return batches(at) if roll_back(engine, run_dir, state=at, facts=FACTS, log=services.log) else None

    services = replace(services, save=saver.save, settle=saver.settle, roll_back=go_back)
    how = {"checkpoint_every_steps": 2, "max_bad_steps": 3, "max_rollbacks": 2, "max_steps": steps}
    train(engine, batches(state), state=state, loop=tiny_loop(12, **how), services=services)
    return engine, state


def test_after_bad_batches_in_a_row_the_run_goes_on_as_if_they_had_never_been_there(tmp_path: Path) -> None:
    join_alone()
    sick, state = run_sick(tmp_path / "sick", {7, 8, 9}, steps=12)
    assert (state.step, state.passed_over, state.rollbacks, state.skipped_steps) == (12, 3, 1, 3)
    assert not list((tmp_path / "sick/checkpoints").glob("*abandoned*")), "saved between bad steps"
    model = TinyModel()
    optimizer = make_optimizer(AdamWConfig(lr=1e-2), model.named_parameters())
    engine, services = make_engine(model, optimizer, ds_config(2, accumulation=2)), tiny_services(tmp_path, 0, 1)
    batches = step_batches(0, 0, 2)
    sane = (micro_batches for number, micro_batches in enumerate(batches, start=1) if number not in (7, 8, 9))
    train(engine, sane, state=TrainState(), loop=tiny_loop(12), services=services)
    assert torch.equal(full_weights(sick), full_weights(engine))
    assert optimizer_digest(sick) == optimizer_digest(engine)


def test_a_run_that_is_resumed_after_going_back_passes_over_the_same_batches(tmp_path: Path) -> None:
    whole, _ = run_sick(tmp_path / "whole", {7, 8, 9}, steps=12)
    run_sick(tmp_path / "parts", {7, 8, 9}, steps=8)
    parts, state = run_sick(tmp_path / "parts", {7, 8, 9}, steps=12)
    assert (state.passed_over, state.rollbacks) == (3, 1)
    assert torch.equal(full_weights(whole), full_weights(parts))


def save_on_two_ranks(rank: int, world_size: int, folder: str) -> None:
    """Worker: six steps of the batches that one rank takes in two micro-steps."""
    run_sick(Path(folder), set(), steps=6, rank=rank, world_size=world_size)


def test_a_run_goes_back_to_a_checkpoint_of_another_number_of_ranks(tmp_path: Path) -> None:
    run_ranks(save_on_two_ranks, 2, str(tmp_path / "two"))
    sick, state = run_sick(tmp_path / "two", {7, 8, 9}, steps=12)
    whole, _ = run_sick(tmp_path / "one", {7, 8, 9}, steps=12)
    assert (state.step, state.passed_over, state.rollbacks) == (12, 3, 1)
    assert torch.allclose(full_weights(sick), full_weights(whole), atol=2e-5)


def test_a_run_that_cannot_be_helped_ends_after_its_last_rollback_and_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(
        DivergedError,
        match=r"3 steps in a row, up to step 9, .* not finite after going back 2 times: look at .*trouble/step_7, the",
    ):
        run_sick(tmp_path, set(range(7, 99)), steps=12)


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="there is no checkpoint to go back to"):
        run_sick(tmp_path, {1, 2, 3}, steps=12)


def judge(guard: LossGuard, loss: float, *, armed: bool = True) -> bool:
    """Whether a step with this loss is good."""
    sums = torch.tensor([loss * 10.0, 3.0], dtype=torch.float64)
    return bool(
        torch.isfinite(guard.judge(sums, counts={"rows": 10.0}, terms=[LossTerm("square", count="rows")], armed=armed))
    )


def test_nothing_spikes_before_the_window_is_full_or_the_guard_is_armed() -> None:
    join_alone()
    guard = LossGuard(3.0, 4, recent=[], device="cpu")
    assert [judge(guard, loss) for loss in (1.0, 2.0, 100.0, 1.0)] == [True] * 4
    armed = LossGuard(3.0, 4, recent=[1.0, 1.1, 0.9, 1.0], device="cpu")
    assert judge(armed, 50.0, armed=False)


def test_the_largest_gradients_are_those_that_are_numbers() -> None:
    norms = {"small": 1.0, "none": math.nan, "large": 5.0}
    assert [name for name, _ in sorted(norms.items(), key=_finite_first)] == ["large", "small", "none"]


def test_a_ripple_of_a_loss_that_hardly_moves_is_no_spike() -> None:
    join_alone()
    assert judge(LossGuard(3.0, 4, recent=[1.0] * 4, device="cpu"), 1.002)
    assert not judge(LossGuard(3.0, 4, recent=[1.0] * 4, device="cpu"), 1.004)


@pytest.mark.parametrize(("at_step", "num_skipped"), [(10, 0), (11, 1)])
def test_the_guard_is_armed_by_the_first_step_after_the_warm_up(at_step: int, num_skipped: int, tmp_path: Path) -> None:
    join_alone()
    engine, services = tiny_engine(ds_config(0, accumulation=2)), tiny_services(tmp_path, 0, 1)
    loop = tiny_loop(12, schedule=ScheduleConfig(type="constant", warmup_steps=10), **GUARDED)
    state = train(engine, sick_batches(0, 0, "spike", {at_step}), state=TrainState(), loop=loop, services=services)
    assert state.skipped_steps == num_skipped


def test_a_spike_is_explained_and_does_not_count_for_later_steps() -> None:
    join_alone()
    guard = LossGuard(3.0, 4, recent=[1.0, 2.0, 1.0, 2.0], device="cpu")
    assert not judge(guard, 9.0)
    assert guard.explain() == "loss 9 is 13.0 sigma above 1.5, the mean of the steps before"
    assert guard.recent() == [1.0, 2.0, 1.0, 2.0]
    assert judge(guard, 3.0)
    assert guard.explain() is None
    assert guard.recent() == [2.0, 1.0, 2.0, 3.0]


def test_the_state_of_an_older_checkpoint_is_read_and_a_loss_that_is_no_number_is_not() -> None:
    old = {"step": 4, "consumed_examples": 8, "attempt": 1, "skipped_steps": 0, "bad_streak": 0}
    assert TrainState.from_dict(old) == TrainState(step=4, consumed_examples=8)
    with pytest.raises(ValueError, match="recent_losses is"):
        TrainState.from_dict(old | {"recent_losses": [float("nan")]})
