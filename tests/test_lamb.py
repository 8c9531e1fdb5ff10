"""LAMB and LANS on whole tensors: the published formulas, refusals, statistics, precision of the norms."""

from __future__ import annotations

import copy
import math

import lamb_reference as reference
import pytest
import torch
from lamb_reference import Settings, State, relative_error
from torch import nn

from bert_ds.training.elementwise_optimizers import StableAdamW
from bert_ds.training.lamb import Lamb, LambFlags, Lans, lamb_preset
from bert_ds.training.lamb_layout import LayoutError
from bert_ds.training.trust_statistics import layer_kind, summarise
from bert_kernels.lamb import FlatShard, LambScalars, Segment, SegmentTable, lamb_apply, lamb_moments, squared_norm

SETTINGS = Settings(lr=0.05, beta1=0.9, beta2=0.98, eps=1e-6)
VARIANTS = [
    (lamb_preset("paper"), reference.paper),
    (lamb_preset("paper_v3"), reference.paper_v3),
    (lamb_preset("apex"), reference.apex),
    (lamb_preset("nvlamb"), reference.paper),
    (lamb_preset("deepspeed"), reference.deepspeed),
    (lamb_preset("lambc"), reference.lambc),
    (LambFlags(use_nvlamb=False, adam_w_mode=False, grad_averaging=False), reference.apex_l2),
    (LambFlags(use_nvlamb=True, weight_norm_clamp=(0.5, 2.0)), reference.clamped_norm),
]


def parameters() -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(3)
    return [
        ("encoder.layer.0.dense.weight", nn.Parameter(torch.randn(17, 5))),
        ("encoder.layer.1.dense.weight", nn.Parameter(3 * torch.randn(17, 5))),
        ("encoder.layer.1.dense.bias", nn.Parameter(torch.zeros(17))),
        ("scale", nn.Parameter(torch.tensor([0.01]))),
    ]


def decay_by_rank(param: nn.Parameter) -> float:
    return 0.3 if param.dim() == 2 else 0.0


def gradients(step: int, params: list[tuple[str, nn.Parameter]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for _, p in params]


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
    assert worst_distance(Lamb, lamb_preset("lambc"), reference.paper) > 1e-2
    assert worst_distance(Lamb, lamb_preset("deepspeed"), reference.paper) > 1e-2
    assert worst_distance(Lamb, lamb_preset("apex"), reference.paper) > 1e-2
    assert worst_distance(Lamb, lamb_preset("paper_v3"), reference.paper) > 1e-3


def test_max_grad_norm_is_refused_in_favour_of_gradient_clipping() -> None:
    with pytest.raises(ValueError, match="gradient_clipping"):
        LambFlags(max_grad_norm=1.0)  # type: ignore[arg-type]


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


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'papr' is unknown; there are apex, paper"):
        lamb_preset("papr")


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


def test_trust_statistics_name_every_tensor() -> None:
    named = parameters()
    optimizer = Lamb(named, lr=0.1, weight_decay=0.0, flags=lamb_preset("paper"))
    norms = {name: float(p.detach().norm()) for name, p in named}
    for (_, p), g in zip(named, gradients(0, named), strict=True):
        p.grad = g
    optimizer.step()
    found = optimizer.trust_statistics()
    assert list(found) == [name for name, _ in named]
    assert found["encoder.layer.1.dense.bias"].trust_ratio == 1.0
    assert math.isclose(found["scale"].weight_norm, norms["scale"], rel_tol=1e-6)
    # The first update of Adam is the sign of the gradient.
    assert math.isclose(found["encoder.layer.0.dense.weight"].update_norm, math.sqrt(85), rel_tol=1e-4)
    ratio = norms["encoder.layer.0.dense.weight"] / math.sqrt(85)
    assert math.isclose(found["encoder.layer.0.dense.weight"].trust_ratio, ratio, rel_tol=1e-4)


def test_trust_statistics_leave_out_what_had_no_gradient() -> None:
    named = parameters()
    optimizer = Lamb(named, lr=0.1)
    named[2][1].grad = torch.ones_like(named[2][1])
    optimizer.step()
    assert list(optimizer.trust_statistics()) == ["encoder.layer.1.dense.bias"]


def test_trust_statistics_are_summed_up_by_kind_of_layer() -> None:
    named = parameters()
    optimizer = Lamb(named, lr=0.1, weight_decay=0.0, flags=lamb_preset("paper"))
    for (_, p), g in zip(named, gradients(0, named), strict=True):
        p.grad = g
    optimizer.step()
    statistics = optimizer.trust_statistics()
    ratios = [statistics[f"encoder.layer.{i}.dense.weight"].trust_ratio for i in (0, 1)]
    spread = summarise(statistics)["encoder.layer.dense.weight"]["trust_ratio"]
    assert (spread.min, spread.max) == (min(ratios), max(ratios))
    assert math.isclose(spread.median, sum(ratios) / 2)


def test_the_kind_of_a_layer_is_its_name_without_numbers() -> None:
    assert layer_kind("bert.encoder.layer.11.output.LayerNorm.bias") == "bert.encoder.layer.output.LayerNorm.bias"


def test_the_norm_of_16_million_elements_is_exact_to_1e_7() -> None:
    torch.manual_seed(0)
    param = nn.Parameter(0.02 * torch.randn(16_000_000))
    truth = math.sqrt(sum(float((part.double() ** 2).sum()) for part in param.detach().split(100_000)))
    param.grad = torch.ones_like(param)
    optimizer = Lamb([("w", param)], lr=0.0)
    optimizer.step()
    assert abs(optimizer.trust_statistics()["w"].weight_norm / truth - 1) <= 1e-7


def test_a_square_sum_does_not_depend_on_how_a_tensor_is_cut() -> None:
    torch.manual_seed(0)
    x = torch.randn(300_001)
    parts = sum(float(squared_norm(part)) for part in x.split(12_345))
    assert abs(parts / float(squared_norm(x)) - 1) < 1e-12


SCALARS = LambScalars(0.9, 0.99, 0.1, 1e-6, 0.1, 0.01, True)


def shard(num_elements: int, segments: tuple[Segment, ...]) -> FlatShard:
    table = SegmentTable(segments, num_elements, num_rows=2)
    return FlatShard(*(torch.full((num_elements,), math.nan) for _ in range(4)), table)


def test_padding_is_neither_read_nor_written() -> None:
    flat = shard(11, (Segment(1, 3, 0, 0.1), Segment(6, 4, 1, 0.0)))
    for buffer in flat[:4]:
        buffer[1:4], buffer[6:10] = 1.0, 2.0
    sums = torch.zeros(2, 2, dtype=torch.float64)
    lamb_moments(flat, SCALARS, sums_R2=sums)
    lamb_apply(flat, SCALARS, ratios_R=torch.ones(2), lr=0.1)
    assert sums[:, 0].tolist() == [3.0, 16.0]
    is_padding = torch.tensor([True, False, False, False, True, True, False, False, False, False, True])
    assert all(torch.equal(buffer.isnan(), is_padding) for buffer in flat[:4])


def test_a_buffer_that_does_not_fit_the_segment_table_is_refused() -> None:
    flat = shard(11, (Segment(1, 3, 0, 0.1),))._replace(grad_E=torch.zeros(10))
    with pytest.raises(ValueError, match=r"grad has shape \(10,\), the segment table is for \(11,\)"):
        lamb_moments(flat, SCALARS, sums_R2=torch.zeros(2, 2, dtype=torch.float64))


def test_a_buffer_of_another_dtype_is_refused() -> None:
    flat = shard(4, (Segment(0, 4, 0, 0.1),))._replace(grad_E=torch.zeros(4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"grad is torch.bfloat16"):
        lamb_moments(flat, SCALARS, sums_R2=torch.zeros(2, 2, dtype=torch.float64))


def test_the_parts_of_a_tensor_are_stepped_like_tensors_of_their_own() -> None:
    torch.manual_seed(5)
    pieces = [torch.randn(4, 3) * scale for scale in (0.1, 1.0, 10.0)]
    grads = [torch.randn(4, 3) * scale for scale in (3.0, 1.0, 0.2)]
    separate = [(name, nn.Parameter(piece.clone())) for name, piece in zip("qkv", pieces, strict=True)]
    together = nn.Parameter(torch.cat(pieces))
    for optimizer_class in (Lamb, Lans, StableAdamW):
        apart, joined = optimizer_class(separate, lr=0.1), optimizer_class([("a.qkv_weight", together)], lr=0.1)
        joined.declare_parts({"*qkv_weight": ("query", "key", "value")})
        for _ in range(3):
            for (_, parameter), grad in zip(separate, grads, strict=True):
                parameter.grad = grad
            together.grad = torch.cat(grads)
            apart.step()
            joined.step()
        assert torch.equal(together, torch.cat([parameter for _, parameter in separate]))


def test_a_part_of_a_tensor_has_its_own_trust_statistics() -> None:
    param = nn.Parameter(torch.tensor([1.0, 1.0, 5.0, 5.0]))
    optimizer = Lamb([("layer.3.qkv_weight", param)], lr=0.0)
    optimizer.declare_parts({"*qkv_weight": ("query", "key")})
    param.grad = torch.ones(4)
    optimizer.step()
    found = optimizer.trust_statistics()
    assert {name: round(one.weight_norm**2, 4) for name, one in found.items()} == {
        "layer.3.qkv_weight.query": 2.0,
        "layer.3.qkv_weight.key": 50.0,
    }
    assert list(summarise(found)) == ["layer.qkv_weight.query", "layer.qkv_weight.key"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"*typo": ("a", "b")}, "no parameter matches the part pattern '\\*typo'"),
        ({"scale": ("a", "b")}, "scale has 1 elements, not 2 equal parts"),
        ({"scale": ("a",), "sc*": ("a",)}, "scale matches the part patterns"),
    ],
)
def test_parts_that_a_model_does_not_have_are_refused(parts: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lamb(parameters(), lr=0.1).declare_parts(parts)
