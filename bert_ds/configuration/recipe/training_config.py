"""What a recipe says of the training itself: steps, what is left out of them, evaluation, checkpoints, bad steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from bert_ds.configuration.reading.config_section import (
    DropoutProbability,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from bert_ds.configuration.recipe.precision import PrecisionSetting


class TrainingConfig(Section):
    """Steps, global batch and precision."""

    total_steps: PositiveInt | None = None
    """Optimizer steps of the whole run; give this or max_minutes."""
    max_minutes: Annotated[float, Field(gt=0.0, le=10_000_000.0)] | None = None
    """Wall time of training and evaluation; the launch times a few steps and writes the total_steps that fit."""
    train_batch_size: Annotated[int, Field(ge=1, le=2**24)]
    """Examples per optimizer step over all ranks: micro-batch x accumulation x ranks."""
    precision: PrecisionSetting = "auto"
    """Dtype of weights and activations; optimizer state is always fp32. auto: bf16 on CUDA and where it is faster."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Global gradient norm is clipped to this; 0 switches clipping off."""
    layer_drop: DropoutProbability = 0.0
    """LayerDrop: in each step every layer is left out with this probability, for the whole global batch."""
    stochastic_depth: DropoutProbability = 0.0
    """Probability that a block of the last layer adds nothing to a sequence; in layer l of L it is l / L of that."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """auto: the Triton kernels on CUDA, torch elsewhere."""
    log_every_steps: PositiveInt = 10
    """Steps between two lines of the log and rows of metrics.jsonl."""
    compile: bool = False
    """Compile the layers (torch.compile) around the Triton kernels; on GPUs, at ZeRO stage 0, 1 or 2."""
    few_shapes: bool = False
    """Fill micro-batches up to a few sizes, by at most 1 part in 16, with tokens that no loss sees."""
    num_workers: Annotated[int, Field(ge=0, le=1000)] = 1
    """Loader processes per rank; 0 loads in the training process."""

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if (self.total_steps is None) == (self.max_minutes is None):
            raise ValueError(f"give exactly one of total_steps and max_minutes, found {self._lengths()}")
        return self

    @property
    def left_out(self) -> dict[str, float]:
        """What a step leaves out of the layers, by setting."""
        return {"layer_drop": self.layer_drop, "stochastic_depth": self.stochastic_depth}

    @property
    def steps(self) -> int:
        """The total_steps of a run that is being trained; it is our own mistake if nobody has decided them yet."""
        if self.total_steps is None:
            raise AssertionError("training.max_minutes has not been turned into steps: the launch has to do it first")
        return self.total_steps

    def _lengths(self) -> str:
        if self.total_steps is None:
            return "neither"
        return f"total_steps {self.total_steps} and max_minutes {self.max_minutes:g}"


class EvaluationConfig(Section):
    """Loss and accuracy on held-out documents, with masks that never change."""

    every_steps: PositiveInt | None = None
    """Steps between evaluations; null evaluates at the end only."""
    num_examples: PositiveInt = 512
    """Validation examples per evaluation (fewer if the split holds fewer)."""
    batch_size: PositiveInt = 32
    """Examples per forward pass and rank."""


class CheckpointConfig(Section):
    """When training state is saved and how much of it is kept."""

    every_steps: PositiveInt | None = None
    """Steps between checkpoints; null saves at the end only."""
    keep_last: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints that are kept."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints at multiples of this are kept for good."""
    asynchronous: bool = False
    """Copy the state into host memory and write it behind the training; the copy takes as much room as a checkpoint."""


class RecoveryConfig(Section):
    """What is done about losses and gradients that spike or are not finite."""

    spike_sigmas: PositiveFloat | None = 6.0
    """After warm-up, a step whose loss is so many standard deviations above the mean is skipped; null: none is."""
    spike_window: Annotated[int, Field(ge=8, le=10_000)] = 128
    """Applied steps that mean and deviation are taken over."""
    max_bad_steps: PositiveInt = 10
    """Consecutive skipped steps after which the run goes back to its newest checkpoint and passes over the batches."""
    max_rollbacks: NonNegativeInt = 2
    """How many times the run goes back before it ends with exit code 5."""
