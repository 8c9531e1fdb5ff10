"""Which parameters are decayed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bert_ds.training.optimizers.param_groups import decay_groups, decay_per_tensor, without_decay

NAMES = ["a.weight", "a.bias", "a.LayerNorm.weight", "a.LayerNorm.bias", "cls.bias"]


def parameters() -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.zeros(3))) for name in NAMES]


def test_biases_and_layer_norms_are_not_decayed() -> None:
    assert without_decay(NAMES) == {"a.bias", "a.LayerNorm.weight", "a.LayerNorm.bias", "cls.bias"}


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'\*layernorm\.weight'; the model has 5 parameters, for example a\.weight"):
        without_decay(NAMES, ["*.bias", "*layernorm.weight"])


def test_the_groups_keep_the_order_of_the_model_and_hold_every_parameter_once() -> None:
    named = parameters()
    decayed, exempt = decay_groups(named, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(named[0][1])]
    assert [id(p) for p in exempt["params"]] == [id(p) for _, p in named[1:]]
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)


def test_one_dimensional_weights_are_decayed_because_only_names_count() -> None:
    named = parameters()
    assert decay_groups(named, 0.1)[0]["params"][0].ndim == 1


def test_frozen_parameters_are_left_out() -> None:
    named = parameters()
    named[1][1].requires_grad_(False)
    assert sum(len(group["params"]) for group in decay_groups(named, 0.1)) == 4


def test_the_decay_of_each_tensor_follows_the_same_patterns() -> None:
    named = parameters()
    decay_of = decay_per_tensor(named, 0.1)
    assert [decay_of(parameter) for _, parameter in named] == [0.1, 0.0, 0.0, 0.0, 0.0]


def test_the_decay_of_a_foreign_tensor_is_an_error() -> None:
    with pytest.raises(KeyError):
        decay_per_tensor(parameters(), 0.1)(nn.Parameter(torch.zeros(3)))
