"""What happens when the place of a tensor is unknown: LayoutError on every rank, nothing changed, nobody hangs."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lamb_optimizers import whole_model_value
from lamb_runs import Case, build, quiet_deepspeed, train
from ranks_harness import run_ranks
from torch import nn

from bert_ds.training.optimizers.lamb import Lamb
from bert_ds.training.optimizers.parameter_layout import LayoutError


def _roll_shard(engine: Any, model: nn.Module) -> None:
    flat = engine.optimizer.single_partition_of_fp32_groups[0].data
    flat.copy_(flat.roll(1))


def _swap_parts(engine: Any, model: nn.Module) -> None:
    engine.optimizer.fp16_groups[0].reverse()


def _change_weights(engine: Any, model: nn.Module) -> None:
    for param in model.parameters():
        param.data.add_(1)


def _foreign_wrapper(engine: Any, model: nn.Module) -> None:
    """One flat copy of all parameters, and not a word about it."""
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).requires_grad_()
    flat.grad = torch.ones_like(flat)
    engine.optimizer.param_groups[0]["params"] = [flat]


def _tensor_parallel(engine: Any, model: nn.Module) -> None:
    model.layer[0].dense.weight.tensor_model_parallel = True


def _swapping(engine: Any, model: nn.Module) -> None:
    engine.optimizer.swap_optimizer = True


def _zenflow(engine: Any, model: nn.Module) -> None:
    class ZenFlow:
        zenflow = True

    for param in model.parameters():
        param._z3_optimizer = ZenFlow()


def _bigger_shard(engine: Any, model: nn.Module) -> None:
    flat = engine.optimizer.single_partition_of_fp32_groups[0]
    flat.data = torch.cat([flat.data, torch.zeros(1000)])


SCENARIOS: dict[str, tuple[int, bool, Callable[[Any, nn.Module], None], str]] = {
    "zero2_rolled": (2, True, _roll_shard, "does not hold the values of"),
    "zero3_permuted": (3, False, _swap_parts, "does not hold the values of"),
    "zero1_changed_weights": (1, False, _change_weights, "refreshing the fp32 copies"),
    "zero2_tensor_parallel": (2, False, _tensor_parallel, "tensor-parallel shard"),
    "zero3_nvme": (3, False, _swapping, "NVMe"),
    "zero3_zenflow": (3, False, _zenflow, "ZenFlow"),
    "zero1_bigger_shard": (1, True, _bigger_shard, "the shards of all ranks have"),
    "zero0_foreign_wrapper": (0, False, _foreign_wrapper, "unknown optimizer wrapper"),
}
"""Name -> stage, damage rank 1 only, the damage, what the damaged rank says."""


def run_scenarios(rank: int, world_size: int) -> dict[str, tuple[str, bool]]:
    """Worker: damage one thing after the other and step; return the error and whether the masters are as before."""
    quiet_deepspeed()
    found = {}
    for name, (stage, one_rank_only, damage, _) in SCENARIOS.items():
        engine, optimizer, model = build(Case(stage, num_micro_batches=2), world_size)
        if rank == 1 or not one_rank_only:
            damage(engine, model)
        before = [tensor.clone() for tensor in masters_of(engine, model, stage)]
        error = "nothing"
        try:
            if name == "zero0_foreign_wrapper":
                optimizer.step()
            else:
                step_without_training(engine, optimizer, stage)
        except LayoutError as caught:
            error = str(caught)
        after = masters_of(engine, model, stage)
        found[name] = (error, all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
        del engine, optimizer, model
        gc.collect()
    return found


def masters_of(engine: Any, model: nn.Module, stage: int) -> list[torch.Tensor]:
    if stage == 0:
        return [p.detach() for p in model.parameters()]
    name = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
    return [tensor.detach() for tensor in getattr(engine.optimizer, name)]


def step_without_training(engine: Any, optimizer: Any, stage: int) -> None:
    """Call the optimizer as DeepSpeed's wrapper does, without a forward that the damage could break."""
    for flat in _with_grad(engine, stage):
        optimizer.param_groups[0]["params"] = [flat]
        optimizer.step()


def _with_grad(engine: Any, stage: int) -> list[torch.Tensor]:
    name = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
    flats = getattr(engine.optimizer, name)
    for flat in flats:
        flat.grad = torch.ones_like(flat)
    return flats


@pytest.fixture(scope="module")
def scenario_errors() -> list[dict[str, tuple[str, bool]]]:
    return run_ranks(run_scenarios, 2, timeout_s=240)


@pytest.mark.parametrize("name", SCENARIOS)
def test_an_unknown_layout_is_an_error_that_says_what_was_looked_for(scenario_errors: list, name: str) -> None:
    assert re.search(SCENARIOS[name][3], scenario_errors[1][name][0])


@pytest.mark.parametrize("name", SCENARIOS)
def test_an_unknown_layout_on_one_rank_is_an_error_on_the_other(scenario_errors: list, name: str) -> None:
    error = scenario_errors[0][name][0]
    assert error != "nothing"
    if SCENARIOS[name][1]:
        assert "another rank" in error


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_rank_changes_a_weight_when_the_layout_is_unknown(scenario_errors: list, name: str) -> None:
    assert all(errors[name][1] for errors in scenario_errors)


def run_refused_configurations(rank: int, world_size: int) -> dict[str, str]:
    """Worker: configurations that cannot be right, refused while the engine is built or at the first step."""
    quiet_deepspeed()
    cases = {
        "fp16_stage0": Case(0, "fp16", num_micro_batches=1),
        "bf16_masters": Case(
            2,
            "bf16",
            num_micro_batches=1,
            top={"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
        ),
    }
    found = {}
    for name, case in cases.items():
        try:
            engine, _, _ = build(case, world_size)
            train(engine, 0, 1)
            found[name] = "nothing"
        except LayoutError as caught:
            found[name] = str(caught)
    return found


def run_initialisation(rank: int, world_size: int) -> tuple[bool, int]:
    """Worker: bf16 without ZeRO; return whether initialize left the weights alone, and t after one real step."""
    import deepspeed
    from lamb_bert import make_model
    from lamb_runs import ds_config

    quiet_deepspeed()
    case = Case(0, "bf16", num_micro_batches=1)
    model = make_model().bfloat16()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Lamb(model.named_parameters(), lr=1e-2, weight_decay=0.1)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=ds_config(case, world_size), dist_init_required=False
    )
    same = all(torch.equal(whole_model_value(p), before[name]) for name, p in model.named_parameters())
    train(engine, 0, 1)
    return same, {state["step"] for state in optimizer.state.values()}.pop()


def run_one_rank(rank: int, world_size: int) -> tuple[dict[str, str], tuple[bool, int]]:
    """Worker: both of the above in one process."""
    return run_refused_configurations(rank, world_size), run_initialisation(rank, world_size)


@pytest.fixture(scope="module")
def one_rank() -> tuple[dict[str, str], tuple[bool, int]]:
    return run_ranks(run_one_rank, 1)[0]


def test_fp16_without_zero_is_refused(one_rank: Any) -> None:
    assert "loss scale" in one_rank[0]["fp16_stage0"]


def test_bf16_master_weights_are_refused(one_rank: Any) -> None:
    assert "needs fp32 master weights" in one_rank[0]["bf16_masters"]


def test_bf16_without_zero_keeps_its_weights_while_the_engine_is_built(one_rank: Any) -> None:
    assert one_rank[1][0]


def test_bf16_without_zero_counts_its_first_real_step_as_step_one(one_rank: Any) -> None:
    assert one_rank[1][1] == 1
