"""LAMB and LANS on whole tensors: the published formulas, refusals, state."""

from __future__ import annotations

import copy

import lamb_reference as reference
import pytest
import torch
from lamb_reference import PUBLISHED, Settings, State, relative_error
from lamb_tensors import gradients, parameters
from torch import nn

from bert_ds.training.optimizers.lamb import Lamb, LambFlags, Lans
from bert_ds.training.optimizers.parameter_layout import LayoutError

SETTINGS = Settings(lr=0.05, beta1=0.9, beta2=0.98, eps=1e-6)


VARIANTS = [
    (PUBLISHED["paper"], reference.paper),
    (PUBLISHED["paper_v3"], reference.paper_v3),
    (PUBLISHED["apex"], reference.apex),
    (PUBLISHED["deepspeed"], reference.deepspeed),
    (PUBLISHED["lambc"], reference.lambc),
    (LambFlags(use_nvlamb=False, adam_w_mode=False, grad_averaging=False), reference.apex_l2),
    (LambFlags(use_nvlamb=True, weight_norm_clamp=(0.5, 2.0)), reference.clamped_norm),
]


def decay_by_rank(param: nn.Parameter) -> float:
    return 0.3 if param.dim() == 2 else 0.0


def worst_distance(optimizer_class: type[Lamb], flags: LambFlags | None, formula: reference.Formula) -> float:
    """Run ten steps beside the formula in fp64; return the worst relative error of a tensor."""
    named = parameters()
    optimizer = optimizer_class(
        named,
        lr=SETTINGS.lr,
        betas=(SETTINGS.beta1, SETTINGS.beta2),
        eps=SETTINGS.eps,
        weight_decay_of=decay_by_rank,
        flags=flags,
    )
    truth = [p.detach().double().clone() for _, p in named]
    states = [State(w) for w in truth]
    for step in range(10):
        grads = gradients(step, named)
        for (_, p), g in zip(named, grads, strict=True):
            p.grad = g
        optimizer.step()
        for i, g in enumerate(grads):
            own = SETTINGS._replace(decay=0.3 if g.dim() == 2 else 0.0)
            truth[i] = formula(truth[i], g.double(), states[i], own)
    return max(relative_error(p.detach(), w) for (_, p), w in zip(named, truth, strict=True))


@pytest.mark.parametrize(("flags", "formula"), VARIANTS, ids=lambda value: getattr(value, "__name__", ""))
def test_ten_steps_follow_the_published_formula(flags: LambFlags, formula: reference.Formula) -> None:
    assert worst_distance(Lamb, flags, formula) < 1e-6


def test_lans_follows_its_published_formula() -> None:
    assert worst_distance(Lans, None, reference.lans) < 1e-6


def test_the_variants_differ_from_each_other() -> None:
    assert worst_distance(Lamb, PUBLISHED["lambc"], reference.paper) > 1e-2
    assert worst_distance(Lamb, PUBLISHED["deepspeed"], reference.paper) > 1e-2
    assert worst_distance(Lamb, PUBLISHED["apex"], reference.paper) > 1e-2
    assert worst_distance(Lamb, PUBLISHED["paper_v3"], reference.paper) > 1e-3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_trust": 2.0, "max_trust": 1.0}, "larger than max_trust"),
        ({"max_trust": 0.0}, "> 0"),
        ({"weight_norm_clamp": (2.0, 1.0)}, "low, high"),
        ({"correct_lr": True}, "bias_correction"),
    ],
)
def test_contradicting_flags_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LambFlags(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": 0.1, "betas": (0.9, 1.0)}, "betas"),
        ({"lr": 0.1, "eps": -1e-6}, "eps"),
        ({"lr": 0.1, "weight_decay": -0.1}, "weight decay of encoder.layer.0.dense.weight"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lamb(parameters(), **wrong)


def test_parameters_without_names_are_refused() -> None:
    with pytest.raises(ValueError, match="named_parameters"):
        Lamb([p for _, p in parameters()], lr=0.1)  # type: ignore[misc]


def test_a_second_parameter_group_is_refused() -> None:
    optimizer = Lamb(parameters(), lr=0.1)
    with pytest.raises(ValueError, match="weight_decay_of"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_bf16_weights_without_fp32_masters_are_refused() -> None:
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    with pytest.raises(LayoutError, match=r"w is torch.bfloat16.*fp32 master weights"):
        Lamb([("w", param)], lr=0.1).step()


def test_sparse_gradients_are_refused() -> None:
    param = nn.Parameter(torch.ones(3, 2))
    param.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (3, 2))
    with pytest.raises(ValueError, match="sparse"):
        Lamb([("w", param)], lr=0.1).step()


def test_a_parameter_without_gradient_keeps_its_value_and_has_no_state() -> None:
    named = parameters()
    before = named[1][1].detach().clone()
    optimizer = Lamb(named, lr=0.1)
    named[0][1].grad = torch.ones_like(named[0][1])
    optimizer.step()
    assert torch.equal(named[1][1], before)
    assert named[1][1] not in optimizer.state


def test_a_frozen_parameter_is_left_out() -> None:
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = Lamb([*parameters(), ("frozen", frozen)], lr=0.1)
    assert len(optimizer.param_groups[0]["params"]) == 4


def test_a_decayed_tensor_with_zero_gradient_shrinks_by_lr() -> None:
    param = nn.Parameter(torch.full((4,), 2.0))
    param.grad = torch.zeros(4)
    Lamb([("w", param)], lr=0.1, weight_decay=0.3).step()
    assert torch.allclose(param, torch.full((4,), 1.8))


def test_the_gradient_is_not_written() -> None:
    named = parameters()
    for (_, p), g in zip(named, gradients(0, named), strict=True):
        p.grad = g
    before = [g.clone() for g in gradients(0, named)]
    Lamb(named, lr=0.1).step()
    assert all(torch.equal(p.grad, g) for (_, p), g in zip(named, before, strict=True))


def test_the_state_is_step_and_two_moments() -> None:
    named = parameters()
    optimizer = Lamb(named, lr=0.1)
    named[0][1].grad = torch.ones_like(named[0][1])
    optimizer.step()
    optimizer.step()
    (state,) = optimizer.state.values()
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    assert state["step"] == 2


def test_a_loaded_state_continues_bit_for_bit() -> None:
    first, second = parameters(), parameters()
    optimizers = [Lamb(named, lr=0.1) for named in (first, second)]
    for step in range(6):
        for (_, p), g in zip(first, gradients(step, first), strict=True):
            p.grad = g
        optimizers[0].step()
        if step == 2:
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
            for (_, target), (_, source) in zip(second, first, strict=True):
                target.data.copy_(source)
        if step > 2:
            for (_, p), g in zip(second, gradients(step, second), strict=True):
                p.grad = g
            optimizers[1].step()
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True))
