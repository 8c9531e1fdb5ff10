"""The precision of a run: what a file says, and what can be said of it before the launch has decided.

"auto" stands in files only. Who plans asks `planned`, who trains asks `decided`; neither returns "auto", and what needs
a precision takes a `Precision`, so that the type checker refuses a setting that nobody has asked about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, Self, TypeVar

Precision = Literal["fp32", "bf16", "fp16"]
"""What weights and activations are computed in."""

PrecisionSetting = Literal["auto", "fp32", "bf16", "fp16"]
"""What a recipe or a task says; auto: the launch decides between fp32 and bf16."""


class _Section(Protocol):
    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self: ...


class _TrainingSection(_Section, Protocol):
    @property
    def precision(self) -> PrecisionSetting: ...


class _File(_Section, Protocol):
    @property
    def training(self) -> _TrainingSection: ...


Trained = TypeVar("Trained", bound=_File)
"""A recipe or a task."""


def decided(setting: PrecisionSetting) -> Precision:
    """Return the precision of a run that is being trained; it is our own mistake if nobody has decided it yet."""
    if setting == "auto":
        raise AssertionError('training.precision is still "auto": the launch has to decide it first')
    return setting


def planned(setting: PrecisionSetting) -> Precision:
    """Return the precision that sizes are estimated for: fp32 where the launch decides."""
    return "fp32" if setting == "auto" else setting


def computed_in(run: _File, *, where_auto: Precision) -> Precision:
    """Return what a recipe or a task computes in on a machine for which "auto" is known to mean `where_auto`."""
    return where_auto if run.training.precision == "auto" else run.training.precision


def planned_on_gpus(run: Trained) -> Trained:
    """Return the recipe as GPUs will train it, bf16 where the launch decides; the same where it does not."""
    return with_precision(run, "bf16") if run.training.precision == "auto" else run


def precision_text(setting: PrecisionSetting) -> str:
    """Return the setting as a table shows it."""
    return "precision decided at the launch (planned for fp32)" if setting == "auto" else setting


def with_precision(run: Trained, precision: Precision) -> Trained:
    """Return the recipe or the task that computes in this precision and is the same in all else."""
    return run.model_copy(update={"training": run.training.model_copy(update={"precision": precision})})
