"""Muon as the tests hand it to DeepSpeed: watched, counted or wrong on purpose; and its formula on whole tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from lamb_bert import decay_of
from lamb_optimizers import PARTS, Watched, make_optimizer, rate_of, whole_model_value
from lamb_reference import Formula, Settings, State, adamw, norm
from torch import Tensor, nn

from bert_ds.training.optimizers.muon import JORDAN, Muon
from bert_ds.training.optimizers.sharded_optimizer import GroupStep

MUON_SETTINGS = Settings(lr=2e-3, beta1=0.9, beta2=0.99, eps=1e-6)
MOMENTUM = 0.95
MATRICES = (
    *("*query.weight", "*key.weight", "*value.weight", "*qkv.weight", "*dense.weight"),
    *("*intermediate.weight", "*output.weight", "*unused_matrix"),
)


def muon_formula_of(name: str) -> Formula:
    """Return the formula of a tensor of the small BERT."""
    return muon if any(fnmatchcase(name, pattern) for pattern in MATRICES) else adamw


def muon(w: Tensor, g: Tensor, state: State, s: Settings) -> Tensor:
    """Jordan et al. 2024 with the scale of arXiv 2502.16982, as a textbook has it, in the dtype of w."""
    state.m = MOMENTUM * state.m + (1 - MOMENTUM) * g
    update = newton_schulz(MOMENTUM * state.m + (1 - MOMENTUM) * g)
    return w - s.lr * s.decay * w - s.lr * 0.2 * math.sqrt(max(w.shape)) * update


def newton_schulz(x: Tensor) -> Tensor:
    """Five steps of the published quintic."""
    x = x / (norm(x) + 1e-7)
    a, b, c = JORDAN
    for _ in range(5):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


class WatchedMuon(Watched, Muon):
    """Also steps a second Muon on whole tensors, put together by DeepSpeed's own order, and counts what differs."""

    def watch(self, named_parameters: Sequence[tuple[str, nn.Parameter]], dtype: torch.dtype) -> None:
        self.params = dict(named_parameters)
        trained = [(name, p) for name, p in named_parameters if p.requires_grad]
        self.twins = {name: nn.Parameter(whole_model_value(p).to(dtype).float()) for name, p in trained}
        self.twin = make_muon(Muon, list(self.twins.items()))
        self.twin.ns_dtype = self.ns_dtype
        declare(self.twin, fused_qkv=any("qkv" in name for name in self.params), scaled_rates=self.scaled_rates)
        self.num_different = 0

    def _compare(self, group: GroupStep, gradients: dict[str, Tensor], masters: dict[str, Tensor]) -> None:
        for name, twin in self.twins.items():
            twin.grad = gradients[name].view(twin.shape) if name in gradients else None
        self.twin.step()
        for name in gradients:
            self.num_different += int((masters[name].view(-1) != self.twins[name].detach().view(-1)).sum())


class InBf16(WatchedMuon):
    """Products and messages in bf16, as on a GPU."""

    ns_dtype = torch.bfloat16


class CountingMuon(Muon):
    """Counts what one step sends to other ranks, and what is orthogonalised here."""

    def _update(self, groups: Sequence[GroupStep]) -> None:
        self.messages, self.num_orthogonalised = [], 0
        genuine = dist.all_to_all_single, dist.all_gather

        def to_all(output: Tensor, input: Tensor, received: list[int], sent: list[int], group: Any) -> Any:
            self.messages.append(sum(sent) - sent[dist.get_rank(group)])
            return genuine[0](output, input, received, sent, group=group)

        def gathered(outputs: list[Tensor], input: Tensor, group: Any) -> Any:
            if input.is_floating_point():  # the lengths of the pieces travel once per layout
                self.messages.append(input.numel() * (dist.get_world_size(group) - 1))
            return genuine[1](outputs, input, group=group)

        dist.all_to_all_single, dist.all_gather = to_all, gathered
        try:
            super()._update(groups)
        finally:
            dist.all_to_all_single, dist.all_gather = genuine

    def _orthogonalise(self, update_MN: Tensor) -> Tensor:
        self.num_orthogonalised += 1
        return super()._orthogonalise(update_MN)


class WithoutParts(Muon):
    """Takes query, key and value for one matrix."""

    def declare_parts(self, equal_parts: Any) -> None:
        super().declare_parts({})


class OneRate(Muon):
    """Forgets that a matrix is scaled by its size."""

    def _orthogonalise(self, update_MN: Tensor) -> Tensor:
        return super()._orthogonalise(update_MN) / math.sqrt(max(update_MN.shape))


class PlainMuon(torch.optim.Optimizer):
    """Muon as found in the wild: what has two dimensions is a matrix, whatever DeepSpeed has made of the tensors."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": MUON_SETTINGS.lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            settings = MUON_SETTINGS._replace(lr=group["lr"], decay=group["weight_decay"])
            for param in group["params"]:
                if param.grad is not None:
                    holder = self.state[param].setdefault("state", State(param))
                    formula = muon if param.ndim == 2 else adamw
                    param.copy_(formula(param, param.grad, holder, settings))


OPTIMIZERS: dict[str, type[Muon]] = {
    "muon": Muon,
    "watched_muon": WatchedMuon,
    "bf16_muon": InBf16,
    "counting_muon": CountingMuon,
    "muon_without_parts": WithoutParts,
    "muon_without_scale": OneRate,
}


def make_muon(kind: type[Muon], named: list[tuple[str, nn.Parameter]]) -> Muon:
    """Return a Muon over the small BERT."""
    decays = {p: decay_of(name) for name, p in named}
    s = MUON_SETTINGS
    betas = (s.beta1, s.beta2)
    return kind(
        named, matrices=MATRICES, lr=s.lr, momentum=MOMENTUM, betas=betas, eps=s.eps, weight_decay_of=decays.__getitem__
    )


def declare(optimizer: Muon, *, fused_qkv: bool, scaled_rates: bool) -> None:
    """Declare parts and rates."""
    if fused_qkv:
        optimizer.declare_parts(PARTS)
    if scaled_rates:
        optimizer.declare_rates(rate_of)


def make_any_optimizer(kind: str, model: nn.Module, *, fused_qkv: bool, scaled_rates: bool) -> torch.optim.Optimizer:
    """Return a Muon of OPTIMIZERS, or whatever `lamb_optimizers` knows."""
    if kind == "plain_muon":
        named = list(model.named_parameters())
        ways = [[p for name, p in named if p.requires_grad and decay_of(name) == decay] for decay in (0.1, 0.0)]
        return PlainMuon([{"params": ps, "weight_decay": d} for ps, d in zip(ways, (0.1, 0.0), strict=True)])
    if kind not in OPTIMIZERS:
        return make_optimizer(kind, model, fused_qkv=fused_qkv, scaled_rates=scaled_rates)
    optimizer = make_muon(OPTIMIZERS[kind], list(model.named_parameters()))
    declare(optimizer, fused_qkv=fused_qkv, scaled_rates=scaled_rates)
    if isinstance(optimizer, WatchedMuon):
        optimizer.scaled_rates = scaled_rates
    return optimizer
