"""The learning rate, as a table of literals."""

from __future__ import annotations

from typing import Any

import pytest

from bert_ds.configuration.recipe.schedule_config import ScheduleConfig
from bert_ds.training.optimizers.lr_schedule import learning_rates

TABLE: list[tuple[dict[str, Any], list[float]]] = [
    ({"type": "constant", "warmup_steps": 0}, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ({"type": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
    ({"type": "linear", "warmup_steps": 0}, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]),
    ({"type": "linear", "warmup_fraction": 0.2}, [0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]),
    (
        {"type": "linear", "warmup_steps": 0, "min_lr_fraction": 0.5},
        [0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5],
    ),
    ({"type": "polynomial", "warmup_steps": 2}, [0.5, 1, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]),
    (
        {"type": "polynomial", "warmup_steps": 1, "power": 0.5},
        [1, 0.894427, 0.83666, 0.774597, 0.707107, 0.632456, 0.547723, 0.447214, 0.316228, 0],
    ),
    (
        {"type": "cosine", "warmup_steps": 0},
        [0.975528, 0.904508, 0.793893, 0.654508, 0.5, 0.345492, 0.206107, 0.095492, 0.024472, 0],
    ),
    ({"type": "wsd", "warmup_steps": 2, "decay_fraction": 0.4}, [0.5, 1, 1, 1, 1, 1, 0.5, 0.292893, 0.133975, 0]),
]


@pytest.mark.parametrize(("schedule", "wanted"), TABLE)
def test_the_rate_of_ten_steps(schedule: dict[str, Any], wanted: list[float]) -> None:
    config = ScheduleConfig(**schedule)
    rates = list(map(learning_rates(config, peak=2.0, total_steps=10), range(1, 11)))
    assert rates == pytest.approx([2.0 * rate for rate in wanted], abs=2e-6)


def test_a_warm_up_as_long_as_the_run_ends_at_the_peak() -> None:
    schedule = ScheduleConfig(type="linear", warmup_steps=4)
    assert learning_rates(schedule, peak=3.0, total_steps=4)(4) == 3.0


@pytest.mark.parametrize("step", [0, 11])
def test_a_step_outside_the_run_is_an_error(step: int) -> None:
    with pytest.raises(ValueError, match=rf"step {step} is outside 1\.\.10"):
        learning_rates(ScheduleConfig(warmup_steps=0), peak=1.0, total_steps=10)(step)
