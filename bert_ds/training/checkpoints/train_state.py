"""What the training loop knows of its own progress, and what it is asked to do."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from bert_ds.configuration.recipe.schedule_config import ScheduleConfig


@dataclass
class TrainState:
    """Progress of a run; with weights and optimizer it is all that a checkpoint holds."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    consumed_examples: int = 0
    """Examples seen over all ranks."""
    attempt: int = 1
    """How many times the run has been started."""
    skipped_steps: int = 0
    """Steps whose gradients were not finite."""
    bad_streak: int = 0
    """Skipped steps since the last good one."""
    passed_over: int = 0
    """Batches that were left behind by going back to a checkpoint: step n trains on batch n + passed_over."""
    rollbacks: int = 0
    """How many times the run has gone back to a checkpoint because of bad steps."""
    recent_losses: list[float] = field(default_factory=list)
    """Of the last applied steps, the newest last; what a spike is measured against."""

    def advance(self, applied: bool, *, examples: int) -> None:
        """Count one optimizer step over `examples` examples, applied or skipped."""
        self.step += 1
        self.consumed_examples += examples
        self.bad_streak = 0 if applied else self.bad_streak + 1
        self.skipped_steps += not applied

    def go_back(self, saved: TrainState) -> None:
        """Continue from a checkpoint of this run, on the batches that come after those seen so far."""
        self.passed_over += self.step - saved.step
        self.rollbacks += 1
        self.step, self.recent_losses, self.bad_streak = saved.step, saved.recent_losses, 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """Return the state stored by `to_dict`.

        Raises:
            ValueError: a field is missing, unknown or not a non-negative whole number (a list of numbers for losses).
        """
        fields = set(cls.__dataclass_fields__)
        younger: dict[str, Any] = {"passed_over": 0, "rollbacks": 0, "recent_losses": []}
        values = younger | values  # a checkpoint from before these fields has none of them
        if set(values) != fields:
            raise ValueError(f"training state has the fields {sorted(values)}, wanted {sorted(fields)}")
        losses = values["recent_losses"]
        if type(losses) is not list or not all(type(loss) is float and math.isfinite(loss) for loss in losses):
            raise ValueError(f"training state field recent_losses is {losses!r}, wanted a list of finite numbers")
        for name, value in values.items():
            if name == "recent_losses":
                continue
            if type(value) is not int or value < 0:
                raise ValueError(f"training state field {name} is {value!r}, wanted a non-negative whole number")
        return cls(**values)


@dataclass(frozen=True)
class LoopSettings:
    """What the loop is asked to do."""

    total_steps: int
    """Steps of the whole run; the schedule ends here."""
    seed: int
    peak_lr: float
    schedule: ScheduleConfig
    log_every_steps: int = 10
    evaluate_every_steps: int | None = None
    """None evaluates at the end only."""
    checkpoint_every_steps: int | None = None
    """None saves at the end only."""
    max_steps: int | None = None
    """Stop, as if asked to, once this many steps have been taken in all."""
    max_bad_steps: int = 10
    """Consecutive skipped steps after which the run goes back to its newest checkpoint, or has diverged."""
    max_rollbacks: int = 0
    """How many times the run may go back."""
    spike_sigmas: float | None = None
    """A step whose loss is so many standard deviations above those before is skipped; None skips none."""
    spike_window: int = 128
    """Steps that a loss is compared with."""
    draws: bool = True
    """Whether the model has dropout or replaces tokens: without it no micro-batch is given a seed."""
    stage_starts: tuple[int, ...] = ()
    """Places in the order of the data, from 0, from which on losses are not compared with those before."""

    @property
    def last_step(self) -> int:
        """Step at which this launch ends."""
        return self.total_steps if self.max_steps is None else min(self.total_steps, self.max_steps)
