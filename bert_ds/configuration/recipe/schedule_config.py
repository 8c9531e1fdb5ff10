"""Schedule section of a recipe: the learning rate over the run."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from bert_ds.configuration.reading.config_section import NonNegativeInt, PositiveFloat, Section


class ScheduleConfig(Section):
    """Learning rate over the run: warm-up, then a published decay to min_lr_fraction x lr."""

    type: Literal["constant", "linear", "polynomial", "cosine", "wsd"] = "linear"
    """wsd: warm-up, stable, then decay over the last decay_fraction."""
    warmup_steps: NonNegativeInt | None = None
    """Steps of linear warm-up from 0; give this or warmup_fraction."""
    warmup_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Share of total_steps spent in warm-up."""
    power: PositiveFloat = 1.0
    """Exponent of the polynomial decay; 0.5 in NVIDIA's LAMB recipe."""
    decay_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """wsd only: share of total_steps in the final decay."""
    min_lr_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Final learning rate as a share of the peak."""

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if (self.warmup_steps is None) == (self.warmup_fraction is None):
            raise ValueError("give exactly one of warmup_steps and warmup_fraction")
        for name, default, owners in (
            ("power", 1.0, ("polynomial",)),
            ("decay_fraction", 0.1, ("wsd",)),
            ("min_lr_fraction", 0.0, ("linear", "polynomial", "cosine", "wsd")),
        ):
            if getattr(self, name) != default and self.type not in owners:
                wanted = " or ".join(owners)
                raise ValueError(f'{name} {getattr(self, name)} is for type {wanted}, the type is "{self.type}"')
        return self

    def num_warmup_steps(self, total_steps: int) -> int:
        """Steps of warm-up in a run of total_steps."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        assert self.warmup_fraction is not None
        return math.floor(self.warmup_fraction * total_steps)
