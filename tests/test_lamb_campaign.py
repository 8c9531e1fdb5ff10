"""The full matrix of the sharded optimizers: `pytest -m campaign tests/test_lamb_campaign.py`, 15 core minutes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lamb_checkpoints import load_universal, run_same_world_size, save_for_universal
from lamb_reference import paper, train_unsharded, worst_error
from lamb_runs import CLIP, SETTINGS, Case, run_cases
from ranks_harness import run_ranks
from test_lamb_zero import FP16, GRAD_ACCUM_FP32, SHADOWS

pytestmark = pytest.mark.campaign

Saved = partial(Case, num_micro_batches=4)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_twenty_steps_are_those_of_whole_tensors_at_every_stage(world_size: int) -> None:
    unsharded = train_unsharded(paper, 20, settings=SETTINGS, clip=CLIP)
    reports = run_ranks(run_cases, world_size, [Case(stage) for stage in (0, 1, 2, 3)], timeout_s=900)[0]
    errors = [worst_error(report.weights, unsharded.weights)[0] for report in reports]
    assert max(errors) <= 1e-6, errors


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_masters_follow_the_formula_under_every_option(world_size: int) -> None:
    micro_batches = 2 * world_size
    cases = [replace(case, num_micro_batches=micro_batches) for case in SHADOWS]
    # hpZ wants partitions that divide the world.
    cases = [case for case in cases if world_size == 4 or "zero_hpz_partition_size" not in case.zero]
    cases += [Case(s, "fp16", "shadowed", num_steps=9, num_micro_batches=micro_batches, top=FP16) for s in (1, 2, 3)]
    reports = run_ranks(run_cases, world_size, cases, timeout_s=900)
    for index, case in enumerate(cases):
        assert max(report[index].shadow_error for report in reports) <= 5e-7, case.label
        assert reports[0][index].model_error <= (5e-7 if case.precision == "fp32" else 1e-4), case.label


SAVED = [
    *[Saved(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")],
    Saved(1, "bf16", top=GRAD_ACCUM_FP32),
    Saved(2, zero={"round_robin_gradients": True}),
    Saved(2, "bf16", zero={"offload_optimizer": {"device": "cpu"}}),
    Saved(3, "bf16", zero={"sub_group_size": 500}),
    *[Saved(3, optimizer=name) for name in ("lans", "stable_adamw", "adamw", "lion")],
]


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_checkpoint_resumes_bit_for_bit(world_size: int, tmp_path: Path) -> None:
    per_rank = run_ranks(run_same_world_size, world_size, SAVED, str(tmp_path), timeout_s=900)
    for found in per_rank:
        assert [all(one) for one in found] == [True] * len(SAVED), [case.label for case in SAVED]


UNIVERSAL = [Saved(1), Saved(2), Saved(3), Saved(1, "bf16", top=GRAD_ACCUM_FP32), Saved(3, optimizer="adamw")]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_a_universal_checkpoint_continues_at_another_world_size(before: int, after: int, tmp_path: Path) -> None:
    saved = run_ranks(save_for_universal, before, UNIVERSAL, str(tmp_path), timeout_s=600)[0]
    for index in range(len(UNIVERSAL)):
        convert(tmp_path / str(index))
    cases = [replace(case, top={**case.top, "checkpoint": {"load_universal": True}}) for case in UNIVERSAL]
    loaded = run_ranks(load_universal, after, cases, str(tmp_path), timeout_s=600)[0]
    for case, (weights, later), (found, found_later, steps) in zip(UNIVERSAL, saved, loaded, strict=True):
        assert worst(found, weights) == 0.0, case.label
        assert worst(found_later, later) <= (1e-6 if case.precision == "fp32" else 2e-2), case.label
        assert steps == {6}, case.label


def convert(folder: Path) -> None:
    """Run DeepSpeed's converter on the checkpoint `saved`."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(folder / "saved"), "--output_folder", str(folder / "universal")]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def worst(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Worst relative error of a tensor."""
    tensors = [{name: torch.from_numpy(array) for name, array in one.items()} for one in (found, wanted)]
    return worst_error(tensors[0], tensors[1])[0]
