"""What LAMB and Muon take for a weight of its own and for a matrix in every family, before training and with a head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_cases import EVERY_FAMILY
from torch import nn

from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.recipe.optimizer_config import LambConfig, MuonConfig
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.tuning.task_folder import make_task_model
from bert_ds.encoder.families.table import weight_patterns
from bert_ds.encoder.pretraining_model import PretrainingModel
from bert_ds.training.optimizers.factory import make_optimizer
from bert_ds.training.optimizers.lamb import Lamb
from bert_ds.training.optimizers.muon import JORDAN
from bert_ds.training.optimizers.newton_schulz import orthogonalise
from bert_ds.training.optimizers.param_groups import TensorFacts

LR, ADAMW_LR = 0.02, 0.005
MODELS = pytest.mark.parametrize("kind", ["pre-training", "classification"])


def model_of(kind: str, config: EncoderConfig) -> nn.Module:
    if kind == "pre-training":
        return PretrainingModel(config, kernels="torch", has_pair_head=False)
    return make_task_model(KINDS[kind], config, {"label": ("a", "b", "c")}, kernels="torch")


def stepped(kind: str, config: EncoderConfig, settings: Any) -> tuple[nn.Module, dict[str, torch.Tensor], Any]:
    """A model after one step with random gradients, what its weights were before, and the optimizer."""
    model, generator = model_of(kind, config), torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(settings, model.named_parameters(), facts=TensorFacts(*weight_patterns(config)))
    optimizer.step()
    return model, before, optimizer


def num_parts(name: str, config: EncoderConfig) -> int:
    """Query, key and value, and the halves of a gated layer, lie in one tensor."""
    if "qkv" in name:
        return 3
    return 2 if "intermediate" in name and config.family == "modernbert" else 1


@EVERY_FAMILY
@MODELS
def test_lamb_moves_every_weight_by_the_rate_times_its_norm(kind: str, config: EncoderConfig) -> None:
    model, before, optimizer = stepped(kind, config, LambConfig(lr=LR, weight_decay=0.2))
    assert isinstance(optimizer, Lamb)
    assert len(optimizer.trust_statistics()) == sum(num_parts(name, config) for name in before)
    for name, parameter in model.named_parameters():
        number = num_parts(name, config)
        if parameter.dim() > 1:
            for old, new in zip(before[name].chunk(number), parameter.detach().chunk(number), strict=True):
                assert float((new - old).norm() / old.norm()) == pytest.approx(LR, rel=1e-3), name


@EVERY_FAMILY
@MODELS
def test_muon_makes_the_matrices_of_layers_orthogonal_each_by_itself_and_nothing_else(
    kind: str, config: EncoderConfig
) -> None:
    settings = MuonConfig(lr=LR, adamw_lr=ADAMW_LR, weight_decay=0.0, eps=1e-12)
    model, before, _ = stepped(kind, config, settings)
    shapes = []
    for name, parameter in model.named_parameters():
        moved = before[name] - parameter.detach()
        assert parameter.grad is not None
        if "layer." in name and parameter.dim() > 1:
            number = num_parts(name, config)
            for gradient, part in zip(parameter.grad.chunk(number), moved.chunk(number), strict=True):
                wanted = orthogonalise(gradient, polynomials=[JORDAN] * 5).flatten()
                assert torch.cosine_similarity(part.flatten(), wanted, dim=0) > 0.9999, name
                shapes.append(tuple(part.shape))
        else:  # the first step of AdamW is the sign of the gradient
            assert torch.allclose(moved, ADAMW_LR * parameter.grad.sign(), rtol=1e-3, atol=1e-6), name
    assert sorted(shapes) == sorted(config.own_matrices())
