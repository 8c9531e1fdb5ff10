"""A DeepSpeed that has renamed or reshaped a name by which shards are understood: LayoutError, never a wrong step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lamb_runs import Case, build, quiet_deepspeed
from ranks_harness import run_ranks
from test_parameter_layout import masters_of, step_without_training
from torch import nn

from bert_ds.training.deepspeed_names import PARAMETER_ZERO3, PART_ZERO3, ZERO3, deepspeed_version
from bert_ds.training.optimizers.parameter_layout import LayoutError

NAMES = [
    (1, "parameter", "_dp_group"),
    *((3, "parameter", name) for name in PARAMETER_ZERO3 if name not in ("ds_id", "ds_shape")),
    *((3, "part", name) for name in PART_ZERO3),
    *((3, "optimizer", name) for name in ZERO3 if name != "swap_optimizer"),
]
"""Every name by which a layout is found: a stage where it is read, what has it, the name."""
GONE, SEVEN = "gone", "seven"
CHANGES = [(*one, value, where) for one in NAMES for value in (GONE, SEVEN) for where in ("once", "everywhere")]
"""On rank 1 and the first parameter, or everywhere: the name is gone, or is the number 7."""


class Changed:
    """A ZeRO-3 optimizer one of whose names is gone or is something else."""

    def __init__(self, optimizer: Any, name: str, value: str) -> None:
        self._optimizer, self._name, self._value = optimizer, name, value

    def __getattr__(self, name: str) -> Any:
        if name != self._name:
            return getattr(self._optimizer, name)
        if self._value == GONE:
            raise AttributeError(name)
        return 7


@contextmanager
def changed(engine: Any, model: nn.Module, change: tuple[int, str, str, str, str], rank: int) -> Iterator[None]:
    """Make a change and undo it."""
    _, kind, name, value, where = change
    parameters = list(model.parameters()) if where == "everywhere" else [next(model.parameters())]
    if kind == "optimizer":
        parameters, name, kind = list(model.parameters()), "_z3_optimizer", "parameter"
        new: Any = Changed(engine.optimizer, change[2], value)
    else:
        new = None if value == GONE else 7
    holders = [parameter.ds_tensor if kind == "part" else parameter for parameter in parameters]
    before = [getattr(holder, name) for holder in holders]
    if where == "everywhere" or rank == 1:
        for holder in holders:
            delattr(holder, name)
            if new is not None:
                setattr(holder, name, new)
    yield
    for holder, old in zip(holders, before, strict=True):
        setattr(holder, name, old)


def step_changed(rank: int, world_size: int) -> dict[Any, tuple[str, bool]]:
    """Worker: one engine per stage; step with each change, then without any.

    Returns:
        Change, or stage, -> the error and whether all masters are as they were.
    """
    quiet_deepspeed()
    found: dict[Any, tuple[str, bool]] = {}
    for stage in (1, 3):
        engine, optimizer, model = build(Case(stage, num_micro_batches=2), world_size)
        before = [tensor.clone() for tensor in masters_of(engine, model, stage)]
        for change in [one for one in CHANGES if one[0] == stage]:
            error = "nothing"
            with changed(engine, model, change, rank):
                try:
                    step_without_training(engine, optimizer, stage)
                except LayoutError as caught:
                    error = str(caught)
            found[change] = (error, all(map(torch.equal, before, masters_of(engine, model, stage))))
        step_without_training(engine, optimizer, stage)
        found[stage] = ("nothing", all(map(torch.equal, before, masters_of(engine, model, stage))))
    return found


def label(change: Any) -> str:
    """Short name of a change for test ids."""
    return "-".join(map(str, change[1:]))


@pytest.fixture(scope="module")
def answers() -> list[dict[Any, tuple[str, bool]]]:
    return run_ranks(step_changed, 2, timeout_s=300)


@pytest.mark.parametrize("change", [one for one in CHANGES if one[3] == GONE], ids=label)
def test_a_name_that_is_gone_is_named_with_the_release(change: Any, answers: Any) -> None:
    message = answers[1][change][0]
    assert change[2] in message and f"DeepSpeed {deepspeed_version()}" in message


@pytest.mark.parametrize("change", [one for one in CHANGES if one[3] == SEVEN], ids=label)
def test_a_name_that_is_something_else_is_an_error_that_says_what_was_expected(change: Any, answers: Any) -> None:
    assert re.search("could not be read|another process group|do not make|were expected|has no", answers[1][change][0])


@pytest.mark.parametrize("change", CHANGES, ids=label)
def test_every_rank_raises_and_no_weight_has_changed(change: Any, answers: Any) -> None:
    assert all(answer[change][0] != "nothing" and answer[change][1] for answer in answers)
    if change[4] == "once":
        assert "another rank" in answers[0][change][0]


@pytest.mark.parametrize("stage", [1, 3])
def test_without_any_change_the_same_engine_steps(stage: int, answers: Any) -> None:
    assert all(answer[stage] == ("nothing", False) for answer in answers)
