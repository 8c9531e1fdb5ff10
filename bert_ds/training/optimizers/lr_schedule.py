"""The learning rate of every optimizer step, as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from bert_ds.configuration.recipe.schedule_config import ScheduleConfig


def learning_rates(schedule: ScheduleConfig, *, peak: float, total_steps: int) -> Callable[[int], float]:
    """Return the learning rate of optimizer steps, a function of the step, counted from 1 to total_steps.

    Warm-up is linear and reaches the peak at its last step. After it, with t the step, W the warm-up, T the total and
    p = (t - W) / (T - W) the share of the way from the peak to the end:

    - constant: the peak.
    - linear: 1 - p (Hugging Face's and most fine-tuning).
    - polynomial: (1 - t / T) ** power, measured from step 0 as Google's BERT (power 1) and NVIDIA's LAMB (power 0.5)
      do; it therefore drops from 1 to (1 - W / T) ** power when the warm-up ends.
    - cosine: (1 + cos(pi p)) / 2.
    - wsd: 1 until the last decay_fraction of T, then 1 - sqrt(its progress) (Haegele et al. 2024, ModernBERT).

    The result runs from the peak down to min_lr_fraction x peak, reached at the last step.
    """
    warmup = schedule.num_warmup_steps(total_steps)

    def learning_rate(step: int) -> float:
        if not 1 <= step <= total_steps:
            raise ValueError(f"step {step} is outside 1..{total_steps}")
        if step <= warmup:
            return peak * step / warmup
        height = _height(step, warmup, schedule=schedule, total_steps=total_steps)
        return peak * (schedule.min_lr_fraction + (1.0 - schedule.min_lr_fraction) * height)

    return learning_rate


def _height(step: int, warmup: int, *, schedule: ScheduleConfig, total_steps: int) -> float:
    """Return the part of the way above the final rate, from 1 down to 0."""
    progress = (step - warmup) / (total_steps - warmup)
    match schedule.type:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "polynomial":
            return (1.0 - step / total_steps) ** schedule.power
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "wsd":
            decay_steps = max(1, math.floor(schedule.decay_fraction * total_steps))
            decayed = (step - (total_steps - decay_steps)) / decay_steps
            return 1.0 - math.sqrt(max(0.0, decayed))
