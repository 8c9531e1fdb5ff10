"""Four named tensors of a model that has two layers, and gradients for them."""

from __future__ import annotations

import torch
from torch import nn


def parameters() -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(3)
    return [
        ("encoder.layer.0.dense.weight", nn.Parameter(torch.randn(17, 5))),
        ("encoder.layer.1.dense.weight", nn.Parameter(3 * torch.randn(17, 5))),
        ("encoder.layer.1.dense.bias", nn.Parameter(torch.zeros(17))),
        ("scale", nn.Parameter(torch.tensor([0.01]))),
    ]


def gradients(step: int, params: list[tuple[str, nn.Parameter]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for _, p in params]
