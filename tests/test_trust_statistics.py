"""Trust ratios and update norms of the last step, by tensor and by kind of layer."""

from __future__ import annotations

import math

import torch
from lamb_reference import PUBLISHED
from lamb_tensors import gradients, parameters
from torch import nn

from bert_ds.training.optimizers.lamb import Lamb
from bert_ds.training.optimizers.trust_statistics import layer_kind, summarise


def test_trust_statistics_name_every_tensor() -> None:
    named = parameters()
    optimizer = Lamb(named, lr=0.1, weight_decay=0.0, flags=PUBLISHED["paper"])
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
    optimizer = Lamb(named, lr=0.1, weight_decay=0.0, flags=PUBLISHED["paper"])
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
