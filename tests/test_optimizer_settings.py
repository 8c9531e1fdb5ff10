"""Each setting of an optimizer reaches its steps: another value gives other weights.

That a recipe's optimizer is the one that steps, whole runs say (`test_recipe_settings`), of every type in one.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from tiny_training import TinyModel

from bert_ds.configuration.recipe.optimizer_config import OptimizerConfig
from bert_ds.training.optimizers.factory import make_optimizer
from bert_ds.training.optimizers.param_groups import TensorFacts

MOMENTS = {"lr": 4e-3, "betas": [0.8, 0.9], "eps": 1e-2, "weight_decay": 0.5}
"""Another value of what every optimizer has."""
TRUST = {"min_trust": 0.9, "max_trust": 1e-3, "weight_norm_clamp": [0.0, 0.1]}
MUON = {"adamw_lr": 1e-3, "momentum": 0.5, "nesterov": False, "ns_coefficients": [2.0, -1.5, 0.5], "ns_steps": 2}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "lans": {**MOMENTS, **TRUST},
    "stableadamw": MOMENTS,
    "lion": {name: value for name, value in MOMENTS.items() if name != "eps"},
    "muon": {**MOMENTS, **MUON},
}
CHANGES = {f"optimizer:{kind}.{name}": value for kind, values in OPTIMIZERS.items() for name, value in values.items()}


def stepped(kind: str, **changes: Any) -> torch.Tensor:
    """The weights of a small model after three steps with random gradients."""
    config: Any = TypeAdapter(OptimizerConfig).validate_json(json.dumps({"type": kind, "lr": 5e-3, **changes}))
    model, generator = TinyModel(), torch.Generator().manual_seed(2)
    optimizer = make_optimizer(config, model.named_parameters(), facts=TensorFacts(matrices=("dense.weight",)))
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("path", CHANGES)
def test_another_value_of_an_optimizer_s_setting_gives_other_weights(path: str) -> None:
    kind, _, name = path.removeprefix("optimizer:").partition(".")
    assert not torch.equal(stepped(kind), stepped(kind, **{name: CHANGES[path]}))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_same_settings_give_the_same_weights(kind: str) -> None:
    assert torch.equal(stepped(kind), stepped(kind))
