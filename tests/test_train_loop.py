"""The loop, one step of it, and evaluation: alone in this process, and on two ranks in one launch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_harness import run_ranks
from tiny_training import (
    OverflowingModel,
    TinyBatch,
    TinyModel,
    ds_config,
    full_weights,
    join_alone,
    micro_batch,
    step_batches,
    tiny_engine,
    tiny_loop,
    tiny_services,
)

from bert_ds.basics.ranks import CheckpointError, DataError, DivergedError, Ranks
from bert_ds.reporting.run_log import RunLog, read_metrics, read_rows
from bert_ds.training.checkpoints.train_state import TrainState
from bert_ds.training.loop.evaluation import Evaluation, evaluate
from bert_ds.training.loop.train_loop import train

KINDS = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]


def train_cut(rank: int, world_size: int, folder: str, accumulation: int) -> dict[int, tuple[list[float], list[float]]]:
    """Weights and losses of four steps at each stage, the global batch cut into world_size x accumulation."""
    results = {}
    for stage in range(4):
        engine = tiny_engine(ds_config(stage, accumulation=accumulation, world_size=world_size))
        run_dir = Path(folder) / f"cut-{world_size}-{stage}"
        services = tiny_services(run_dir, rank, world_size)
        batches = step_batches(0, rank, accumulation)
        train(engine, batches, state=TrainState(), loop=tiny_loop(4), services=services)
        losses = [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl")] if rank == 0 else []
        results[stage] = full_weights(engine).tolist(), losses
    return results


def with_nan(batches: Iterator[Any], steps: set[int]) -> Iterator[list[TinyBatch]]:
    """The same batches, the last micro-batch of the given steps with a target that is not a number."""
    for step, micro_batches in enumerate(batches, start=1):
        if step in steps:
            micro_batches[-1].y_T[0] = float("nan")
        yield micro_batches


def nan_on_rank_1(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """At each stage and precision: one step, a second with a NaN on rank 1 alone, a third."""
    results = {}
    for stage, precision in KINDS:
        engine = tiny_engine(ds_config(stage, precision=precision, accumulation=2, world_size=world_size))
        start = torch.cat([parameter.detach().flatten() for parameter in TinyModel().parameters()])
        assert torch.equal(full_weights(engine), start)
        services = tiny_services(Path(folder) / f"nan-{stage}-{precision}", rank, world_size)
        batches = with_nan(step_batches(0, rank, 2), {2} if rank == 1 else set())
        state, weights = TrainState(), []
        for last in (1, 2, 3):
            train(engine, batches, state=state, loop=tiny_loop(9, max_steps=last), services=services)
            weights.append(full_weights(engine))
        unchanged = torch.equal(weights[0], weights[1])
        results[f"{stage}-{precision}"] = (unchanged, not torch.equal(weights[1], weights[2]), state.skipped_steps)
        assert torch.isfinite(weights[2]).all()
    return results


def stop_and_diverge(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    engine = tiny_engine(ds_config(2, world_size=world_size))
    services = tiny_services(Path(folder) / "stop", rank, world_size)

    def asking(batches: Iterator[Any]) -> Iterator[Any]:
        for step, micro_batches in enumerate(batches, start=1):
            if rank == 1 and step == 3:
                services.stop.request("SIGTERM")
            yield micro_batches

    saved: list[int] = []
    services = replace(services, save=lambda state: saved.append(state.step) is None)
    stopped = train(engine, asking(step_batches(0, rank, 1)), state=TrainState(), loop=tiny_loop(9), services=services)
    state, message = TrainState(), ""
    batches = with_nan(step_batches(0, rank, 1), {2, 3, 4, 5} if rank == 0 else set())
    loop, services = tiny_loop(9, max_bad_steps=3), tiny_services(Path(folder) / "diverge", rank, world_size)
    try:
        train(engine, batches, state=state, loop=loop, services=services)
    except DivergedError as error:
        message = str(error)
    return {"stopped": stopped.step, "saved": saved, "diverged": (state.step, message)}


def evaluate_unequal(rank: int, world_size: int) -> dict[int, dict[str, float]]:
    """Three batches on rank 0, one on rank 1."""
    mine = [micro_batch(0, part) for part in ((0, 1, 2), (3,))[rank]]
    return {stage: evaluate(tiny_engine(ds_config(stage, world_size=world_size)), mine) for stage in (0, 3)}


def everything_on_two_ranks(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    return {
        "cut": train_cut(rank, world_size, folder, 2),
        "nan": nan_on_rank_1(rank, world_size, folder),
        **stop_and_diverge(rank, world_size, folder),
        "evaluation": evaluate_unequal(rank, world_size),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(everything_on_two_ranks, 2, str(tmp_path_factory.mktemp("two")), timeout_s=300.0)


@pytest.fixture(scope="module")
def four_micro_steps(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    join_alone()
    return train_cut(0, 1, str(tmp_path_factory.mktemp("one")), 4)


def assert_same_training(one: Any, other: Any) -> None:
    (weights, losses), (other_weights, other_losses) = one, other
    assert len(losses) == 4
    assert other_losses == pytest.approx(losses, rel=1e-6)
    difference = (torch.tensor(weights) - torch.tensor(other_weights)).abs().max()
    assert difference <= 1e-6 * torch.tensor(weights).abs().max()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_with_four_micro_steps_trains_like_two_ranks_with_two(
    stage: int, two_ranks: Any, four_micro_steps: Any
) -> None:
    assert_same_training(four_micro_steps[stage], two_ranks[0]["cut"][stage])


@pytest.mark.campaign
def test_one_rank_with_four_micro_steps_trains_like_four_ranks_with_one(four_micro_steps: Any, tmp_path: Path) -> None:
    four_ranks = run_ranks(train_cut, 4, str(tmp_path), 1, timeout_s=300.0)[0]
    for stage in range(4):
        assert_same_training(four_micro_steps[stage], four_ranks[stage])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_trains_like_stage_0(stage: int, four_micro_steps: Any) -> None:
    assert_same_training(four_micro_steps[0], four_micro_steps[stage])


@pytest.mark.parametrize("kind", [f"{stage}-{precision}" for stage, precision in KINDS])
def test_a_nan_on_one_rank_changes_no_weight_anywhere_and_training_goes_on(kind: str, two_ranks: Any) -> None:
    for result in two_ranks:
        assert result["nan"][kind] == (True, True, 1)


@pytest.mark.parametrize(
    ("step", "said"), [(0, "no step was taken and nothing is saved"), (3, "no step since the checkpoint of step 3")]
)
def test_a_stop_before_the_first_step_of_a_launch_says_what_is_saved(tmp_path: Path, step: int, said: str) -> None:
    join_alone()
    services = tiny_services(tmp_path, 0, 1)
    services.stop.request("SIGTERM")
    batches = step_batches(step, 0, 1)
    train(tiny_engine(ds_config(0)), batches, state=TrainState(step=step), loop=tiny_loop(9), services=services)
    services.log.close()
    assert f"asked to stop (SIGTERM), {said}" in (tmp_path / "logs/rank_0.log").read_text()


def test_a_stop_asked_of_one_rank_stops_all_at_the_same_step_with_a_checkpoint(two_ranks: Any) -> None:
    assert [(result["stopped"], result["saved"]) for result in two_ranks] == [(2, [2]), (2, [2])]


def test_too_many_bad_steps_in_a_row_end_the_run_on_all_ranks(two_ranks: Any) -> None:
    for result in two_ranks:
        step, message = result["diverged"]
        assert step == 4
        assert message.startswith("3 steps in a row, up to step 4,")


@pytest.mark.parametrize("stage", [0, 3])
def test_evaluation_sums_over_all_ranks_with_unequal_numbers_of_batches(stage: int, two_ranks: Any) -> None:
    model, batches = TinyModel().eval(), [micro_batch(0, part) for part in range(4)]
    with torch.no_grad():
        sums = sum(torch.cat(model(**batch.model_inputs(), dropout_seed=None)).double() for batch in batches)
    rows, pairs = (sum(batch.counts[name] for batch in batches) for name in ("rows", "pairs"))
    wanted = {
        "loss_square": float(sums[0]) / rows,
        "loss_pair": float(sums[1]) / pairs,
        "loss": float(sums[0]) / rows + 0.5 * float(sums[1]) / pairs,
        "perplexity": float((sums[0] / rows).exp()),
        "square_accuracy": float(sums[2]) / rows,
        "pair_accuracy": float(sums[3]) / pairs,
    }
    for result in two_ranks:
        assert result["evaluation"][stage] == pytest.approx(wanted, rel=1e-6)


def alone(folder: Path, **changes: Any) -> tuple[Any, Any]:
    join_alone()
    return tiny_engine(ds_config(2)), tiny_services(folder, 0, 1, **changes)


def alone_and_evaluated(folder: Path) -> tuple[Any, Any]:
    engine, services = alone(folder)
    return engine, replace(services, evaluate=lambda state: Evaluation(evaluate(engine, [micro_batch(0, 0)])))


def test_a_rank_without_validation_batches_is_a_data_error(tmp_path: Path) -> None:
    engine, _ = alone(tmp_path)
    with pytest.raises(DataError, match="smaller than the number of ranks"):
        evaluate(engine, [])


@pytest.mark.parametrize("stage", [0, 2])
def test_an_infinite_loss_whose_gradients_are_finite_is_not_applied(stage: int, tmp_path: Path) -> None:
    join_alone()
    engine = tiny_engine(ds_config(stage), model=OverflowingModel())
    before = full_weights(engine)
    services = tiny_services(tmp_path, 0, 1)
    state = train(engine, step_batches(0, 0, 1), state=TrainState(), loop=tiny_loop(1), services=services)
    assert state.skipped_steps == 1
    assert torch.equal(full_weights(engine), before)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_with_the_optimizer_on_the_cpu_training_goes_on_after_a_bad_step(stage: int, tmp_path: Path) -> None:
    join_alone()
    config = ds_config(stage, precision="bf16", accumulation=2) | {"zero_force_ds_cpu_optimizer": False}
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    services = tiny_services(tmp_path, 0, 1)
    batches = with_nan(step_batches(0, 0, 2), {2})
    state = train(tiny_engine(config), batches, state=TrainState(), loop=tiny_loop(4), services=services)
    assert state.skipped_steps == 1


def test_rows_are_written_at_the_first_the_last_and_every_nth_step(tmp_path: Path) -> None:
    engine, services = alone(tmp_path, row_facts=lambda step: {"examples": {"wiki": 2 * step}})
    loop = tiny_loop(7, log_every_steps=3)
    train(engine, step_batches(0, 0, 1), state=TrainState(), loop=loop, services=services)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 3, 6, 7]
    assert rows[1]["examples"] == {"wiki": 6}
    assert rows[1].keys() >= {"loss", "loss_square", "loss_pair", "pair_accuracy", "lr", "grad_norm", "eta_s", "mfu"}


def test_the_run_is_evaluated_at_the_chosen_steps_and_at_its_end(tmp_path: Path) -> None:
    engine, services = alone_and_evaluated(tmp_path)
    loop = tiny_loop(5, evaluate_every_steps=2)
    train(engine, step_batches(0, 0, 1), state=TrainState(), loop=loop, services=services)
    rows = read_metrics(tmp_path / "metrics.jsonl", "evaluation")
    assert [row["step"] for row in rows] == [2, 4, 5]
    # A run that is finished is evaluated again: this is how one of an earlier version gets the figures of this one.
    train(engine, iter(()), state=TrainState(step=5), loop=loop, services=services)
    assert len([row for row in read_rows(tmp_path / "metrics.jsonl") if row["kind"] == "evaluation"]) == 4


def test_an_evaluation_that_sees_nothing_more_to_gain_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    saved = []
    engine, services = alone(
        tmp_path,
        evaluate=lambda state: Evaluation({"score": 0.5}, stop=state.step == 4),
        save=lambda state: not saved.append(state.step),
    )
    loop = tiny_loop(7, evaluate_every_steps=2, checkpoint_every_steps=3)
    state = train(engine, step_batches(0, 0, 1), state=TrainState(), loop=loop, services=services)
    assert (state.step, saved) == (4, [3, 4])
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl", "evaluation")] == [2, 4]


def test_evaluation_changes_nothing_that_is_trained(tmp_path: Path) -> None:
    losses = []
    for folder, made in (("with", alone_and_evaluated), ("without", alone)):
        engine, services = made(tmp_path / folder)
        loop = tiny_loop(4, evaluate_every_steps=1)
        train(engine, step_batches(0, 0, 1), state=TrainState(), loop=loop, services=services)
        losses.append([row["loss"] for row in read_metrics(tmp_path / folder / "metrics.jsonl")])
    assert losses[0] == losses[1]


def test_examples_are_counted_from_the_global_batch(tmp_path: Path) -> None:
    engine, services = alone(tmp_path)
    state = train(engine, step_batches(0, 0, 1), state=TrainState(), loop=tiny_loop(3), services=services)
    assert (state.step, state.consumed_examples) == (3, 6)


def test_a_periodic_save_that_fails_lets_training_go_on_and_the_last_one_does_not(tmp_path: Path) -> None:
    tried = []
    engine, services = alone(tmp_path, save=lambda state: bool(tried.append(state.step)))
    loop = tiny_loop(5, checkpoint_every_steps=2)
    with pytest.raises(CheckpointError, match="the last checkpoint, at step 5"):
        train(engine, step_batches(0, 0, 1), state=TrainState(), loop=loop, services=services)
    assert tried == [2, 4, 5]


def test_a_wrong_number_of_micro_batches_is_refused(tmp_path: Path) -> None:
    engine, services = alone(tmp_path)
    with pytest.raises(ValueError, match="3 micro-batches for a step, wanted 1"):
        train(engine, step_batches(0, 0, 3), state=TrainState(), loop=tiny_loop(3), services=services)


def test_the_values_of_a_step_reach_deepspeeds_own_monitors(tmp_path: Path) -> None:
    join_alone()
    config = ds_config(1) | {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "tiny"}}
    services = tiny_services(tmp_path, 0, 1)
    train(tiny_engine(config), step_batches(0, 0, 1), state=TrainState(), loop=tiny_loop(2), services=services)
    lines = (tmp_path / "tiny/train_loss.csv").read_text().splitlines()
    assert len(lines) == 3


def test_what_deepspeed_prints_of_its_memory_goes_to_the_rank_s_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    join_alone()
    deepspeed = logging.getLogger("DeepSpeed")
    level = deepspeed.level
    log = RunLog(tmp_path, Ranks(0, 0, 1), total_steps=3)
    try:
        tiny_engine(ds_config(1, precision="bf16"))
    finally:
        log.close()
        deepspeed.setLevel(level)
    assert "Max_MA" not in capsys.readouterr().out
    assert "Max_MA" in (tmp_path / "logs/rank_0.log").read_text()
