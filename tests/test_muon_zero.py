"""Muon under DeepSpeed ZeRO 0-3 has the bits of Muon on whole tensors, orthogonalises once and sends little.

Two comparisons, as for LAMB: the gradients that the optimizer was really given, put together by DeepSpeed's own order
and fed to a second Muon on whole tensors (no bit may differ), and trajectories in fp32 against the formula in fp64.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lamb_bert import Trajectory, fuse_qkv, make_model, train_unsharded
from lamb_checkpoints import load_universal, run_same_world_size, save_for_universal
from lamb_optimizers import CLIP
from lamb_reference import relative_error
from lamb_runs import Case, Report, run_cases
from muon_optimizers import MUON_SETTINGS, muon, muon_formula_of
from ranks_harness import run_ranks
from test_lamb_campaign import convert
from test_lamb_zero import GRAD_ACCUM_FP32

STAGES = (0, 1, 2, 3)
MATRIX_BAR, TENSOR_BAR = 3e-6, 1e-5
MICRO_BATCHES = 6
Long = partial(Case, optimizer="muon", num_steps=8, num_micro_batches=MICRO_BATCHES, fused_qkv=True)
Shadow = partial(Case, optimizer="watched_muon", num_steps=2, num_micro_batches=MICRO_BATCHES, fused_qkv=True)
Counted = partial(Case, optimizer="counting_muon", num_steps=1, num_micro_batches=6, fused_qkv=True)
CPU = {"device": "cpu"}

TRAJECTORIES = [Long(stage) for stage in STAGES]
WRONG = [Long(2, optimizer="muon_without_parts"), Long(1, optimizer="muon_without_scale")]
SHADOWS = [
    *[Shadow(stage, with_unused=True, scaled_rates=stage in (0, 3)) for stage in STAGES],
    *[Shadow(stage, "bf16", optimizer="bf16_muon") for stage in STAGES],
    Shadow(1, "bf16", top=GRAD_ACCUM_FP32),
    Shadow(2, "bf16", zero={"offload_optimizer": CPU}, with_unused=True),
    Shadow(2, zero={"round_robin_gradients": True}),
    Shadow(2, poison_padding=True),
    Shadow(3, poison_padding=True),
    Shadow(3, "bf16", zero={"sub_group_size": 1}, with_unused=True),
    Shadow(3, zero={"sub_group_size": 1500}),
    Shadow(3, zero_init=True, fused_qkv=False),
    Shadow(3, "bf16", zero={"offload_optimizer": CPU, "offload_param": CPU}),
]
ON_THREE = [SHADOWS[0], *SHADOWS[5:8]]
"""Stage 0 in fp32, the others in bf16."""
COUNTED = [Counted(stage) for stage in STAGES]
NUM_MATRICES, NUM_ELEMENTS = 12, 2 * (4 * 24 * 24 + 2 * 24 * 50)


def run(cases: list[Case], world_size: int) -> dict[str, list[Report]]:
    """Label -> the reports of all ranks."""
    per_rank = run_ranks(run_cases, world_size, cases, timeout_s=1500)
    return {case.label: [reports[i] for reports in per_rank] for i, case in enumerate(cases)}


@pytest.fixture(scope="module")
def unsharded() -> Trajectory:
    settings: dict[str, Any] = {"settings": MUON_SETTINGS, "clip": CLIP, "num_micro_batches": MICRO_BATCHES}
    return train_unsharded(muon_formula_of, 8, model=make_model().double(), **settings)


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, list[Report]]:
    return run([*TRAJECTORIES, *WRONG, *SHADOWS, *COUNTED], 2)


@pytest.fixture(scope="module")
def three_ranks() -> dict[str, list[Report]]:
    return run([Long(1), *ON_THREE, *COUNTED], 3)


def worst(report: Report, unsharded: Trajectory) -> tuple[float, float]:
    """Worst error of a matrix, and of any tensor."""
    wanted, found = fuse_qkv(unsharded.weights), report.weights
    errors = {name: relative_error(found[name], wanted[name]) for name in wanted}
    return max(error for name, error in errors.items() if muon_formula_of(name) is muon), max(errors.values())


@pytest.mark.parametrize("case", TRAJECTORIES, ids=lambda case: case.label)
def test_eight_steps_on_two_ranks_are_those_of_fp64_on_whole_tensors(
    case: Case, two_ranks: Any, unsharded: Trajectory
) -> None:
    of_matrices, of_all = worst(two_ranks[case.label][0], unsharded)
    assert of_matrices <= MATRIX_BAR
    assert of_all <= TENSOR_BAR


def test_so_are_they_on_three_ranks(three_ranks: Any, unsharded: Trajectory) -> None:
    of_matrices, of_all = worst(three_ranks[Long(1).label][0], unsharded)
    assert of_matrices <= MATRIX_BAR
    assert of_all <= TENSOR_BAR


def test_clipping_fires_in_these_runs(two_ranks: Any) -> None:
    assert two_ranks[Long(2).label][0].grad_norms[0] > 2 * CLIP


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.label)
def test_the_comparison_catches_a_wrong_muon(case: Case, two_ranks: Any, unsharded: Trajectory) -> None:
    assert worst(two_ranks[case.label][0], unsharded)[0] > 100 * MATRIX_BAR


@pytest.mark.parametrize("case", SHADOWS, ids=lambda case: case.label)
def test_no_bit_differs_from_muon_on_whole_tensors_with_the_same_gradients(case: Case, two_ranks: Any) -> None:
    assert [report.num_different for report in two_ranks[case.label]] == [0, 0]
    assert all(report.padding_is_nan for report in two_ranks[case.label])


@pytest.mark.parametrize("case", ON_THREE, ids=lambda case: case.label)
def test_nor_on_three_ranks(case: Case, three_ranks: Any) -> None:
    assert [report.num_different for report in three_ranks[case.label]] == [0, 0, 0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_matrix_straddles_the_ranks(stage: int, two_ranks: Any) -> None:
    first, second = two_ranks[Long(stage).label]
    assert {
        name for name in set(first.straddling) & set(second.straddling) if "qkv.weight" in name or "output.w" in name
    }


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.label)
@pytest.mark.parametrize("world_size", [2, 3])
def test_each_matrix_is_orthogonalised_once_in_the_world(
    world_size: int, case: Case, two_ranks: Any, three_ranks: Any
) -> None:
    reports = (two_ranks if world_size == 2 else three_ranks)[case.label]
    assert sum(report.num_orthogonalised for report in reports) == NUM_MATRICES
    assert max(report.num_orthogonalised for report in reports) < NUM_MATRICES


@pytest.mark.parametrize("case", COUNTED[1:], ids=lambda case: case.label)
@pytest.mark.parametrize("world_size", [2, 3])
def test_two_messages_send_at_most_two_thirds_of_what_a_gather_of_all_would(
    world_size: int, case: Case, two_ranks: Any, three_ranks: Any
) -> None:
    reports = (two_ranks if world_size == 2 else three_ranks)[case.label]
    assert all(len(report.messages) == 2 for report in reports)
    mean = sum(sum(report.messages) for report in reports) / world_size
    assert 0 < mean <= 2 * NUM_ELEMENTS * (world_size - 1) / world_size**2


def test_without_zero_one_message_hands_the_results_round(two_ranks: Any) -> None:
    assert [report.messages for report in two_ranks[COUNTED[0].label]] == [[NUM_ELEMENTS // 2]] * 2


@pytest.mark.parametrize("case", TRAJECTORIES, ids=lambda case: case.label)
def test_the_state_has_the_names_that_universal_checkpoints_know(case: Case, two_ranks: Any) -> None:
    assert two_ranks[case.label][0].state_keys == {"step", "exp_avg", "exp_avg_sq"}


Saved = partial(Case, optimizer="muon", num_micro_batches=6, fused_qkv=True)
RESUMED = [Saved(0, "bf16"), Saved(1), Saved(2, "bf16", top=GRAD_ACCUM_FP32), Saved(3, zero={"sub_group_size": 2000})]


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    for found in run_ranks(run_same_world_size, 2, RESUMED, str(tmp_path), timeout_s=300):
        assert [all(one) for one in found] == [True] * len(RESUMED), [case.label for case in RESUMED]


@pytest.mark.campaign
def test_a_universal_checkpoint_of_two_ranks_continues_on_one_and_on_three(tmp_path: Path) -> None:
    cases = [Saved(1), Saved(3)]
    saved = run_ranks(save_for_universal, 2, cases, str(tmp_path), timeout_s=300)[0]
    for index in range(len(cases)):
        convert(tmp_path / str(index))
    universal = [replace(case, top={"checkpoint": {"load_universal": True}}) for case in cases]
    for world_size in (1, 3):
        folder = tmp_path / f"on_{world_size}"
        shutil.copytree(tmp_path, folder, ignore=shutil.ignore_patterns("on_*"))
        loaded = run_ranks(load_universal, world_size, universal, str(folder), timeout_s=300)[0]
        for (weights, later), (found, found_later, steps) in zip(saved, loaded, strict=True):
            assert steps == {6}
            for name in weights:
                assert (found[name] == weights[name]).all()
                of_later = (torch.from_numpy(one[name]) for one in (found_later, later))
                assert relative_error(*of_later) <= 2e-6, name
