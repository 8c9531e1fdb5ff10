"""What is predicted of a run's speed: counted by hand for one card, what bounds it, and what more cards change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bert_ds.configuration.deepspeed_file.ds_config import load_pair
from bert_ds.configuration.run_plan import RunPlan, make_plan
from bert_ds.configuration.run_speed import CARDS, StepTimes, message_bytes, speed_rows, step_times

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "ds_configs/recipes"


def planned(recipe: str, stage: int, world_size: int, *changes: str) -> RunPlan:
    run, ds = load_pair(RECIPES / f"{recipe}.json", ROOT / f"ds_configs/zero{stage}.json", overrides=changes)
    return make_plan(run, ds, world_size)


def test_a_step_of_bert_base_on_one_card_is_as_counted_by_hand() -> None:
    plan = planned("bert_base_phase1", 1, 1)
    (times,) = step_times(plan, CARDS["H100"])
    tokens, micro_steps = 65536 * 128, 512
    assert times.host == pytest.approx(0.0013 * 12 * micro_steps)
    assert times.attention == pytest.approx(12 * 768 * 12 * 128 * tokens / (0.23 * 989e12))
    dense = 6 * 12 * (4 * 768**2 + 2 * 768 * 3072) * tokens
    head = 6 * (768**2 + 30528 * 768) * 19.2 * 65536 + 6 * (768**2 + 2 * 768) * 65536
    assert times.products == pytest.approx((dense + head) / (0.6 * 989e12))
    traffic = 2 * 51 * 768 * 12 * tokens + 10 * plan.num_parameters * micro_steps
    assert times.memory == pytest.approx(traffic / (0.85 * 3.35e12))
    assert times.optimizer == pytest.approx(42 * plan.num_parameters / (0.85 * 3.35e12))
    assert times.messages == 0.0


@pytest.mark.parametrize(("stage", "wanted"), [(0, 8.0), (1, 6.0), (2, 4.0 * 8 + 2.0), (3, 4.0 * 8 + 4.0 * 8)])
def test_bytes_between_ranks_follow_the_stage_and_the_micro_steps(stage: int, wanted: float) -> None:
    plan = planned("bert_base_phase1", stage, 64)
    assert plan.split.accumulation == 8
    assert message_bytes(plan, 8) == pytest.approx(wanted * plan.num_parameters * 63 / 64)


def test_stages_one_to_three_share_the_optimizer_and_slow_links_are_those_between_nodes() -> None:
    one, eight, many = (step_times(planned("bert_base_phase1", 1, ranks), CARDS["H100"])[0] for ranks in (1, 8, 64))
    assert eight.optimizer == pytest.approx(one.optimizer / 8)
    assert many.messages / eight.messages == pytest.approx((63 / 64 / 50e9) / (7 / 8 / 450e9))
    assert step_times(planned("bert_base_phase1", 0, 8), CARDS["H100"])[0].optimizer == one.optimizer


def test_what_bounds_a_step_is_not_what_hides_behind_another() -> None:
    parts: dict[str, Any] = {"products": 3.0, "attention": 1.0, "memory": 1.0, "optimizer": 0.5, "messages": 0.1}
    assert StepTimes(host=4.9, **parts).bound == "matrix products"
    assert StepTimes(host=5.1, **parts).bound == "the host's launches"
    assert StepTimes(host=5.1, **parts).step == pytest.approx(5.7)
    assert StepTimes(host=0.0, **{**parts, "messages": 3.5}).bound == "messages between ranks"


def test_days_are_those_of_all_stages_of_a_recipe() -> None:
    stages = 'stages=[{"until": 0.5, "max_seq_length": 64}]'
    plan = planned("bert_base_phase1", 1, 1, stages)
    first, second = step_times(plan, CARDS["H100"])
    days = (first.step + second.step) * 3519 / 86400
    assert (
        f"; {days:,.2f} days in all"
        in dict(speed_rows(plan, "H100", CARDS["H100"], world_sizes=[1]))["predicted, 1 H100"]
    )


def test_a_number_of_cards_that_does_not_divide_the_batch_is_said_so() -> None:
    rows = dict(speed_rows(planned("bert_base_phase1", 1, 1, "training.train_batch_size=192"), "H200", CARDS["H200"]))
    assert list(rows) == [f"predicted, {number} H200" for number in (1, 8, 64, 512)]
    assert "tokens/s" in rows["predicted, 64 H200"]
    assert rows["predicted, 512 H200"] == "the global batch cannot be spread over 512 ranks"


def test_a_run_by_minutes_has_a_speed_and_no_days() -> None:
    plan = planned("embedded_default", 1, 1, "training.total_steps=null", "training.max_minutes=5")
    text = dict(speed_rows(plan, "A100", CARDS["A100"], world_sizes=[1, 7]))
    assert "tokens/s" in text["predicted, 1 A100"] and "in all" not in text["predicted, 1 A100"]
    assert text["predicted, 7 A100"] == "the global batch cannot be spread over 7 ranks"
