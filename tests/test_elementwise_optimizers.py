"""AdamW, StableAdamW and Lion on whole tensors: the published formulas and the decay of each parameter."""

from __future__ import annotations

import lamb_reference as reference
import pytest
import torch
from lamb_reference import Settings, State, relative_error
from torch import nn

from bert_ds.training.optimizers.elementwise_optimizers import AdamW, Lion, StableAdamW
from bert_ds.training.optimizers.sharded_optimizer import ShardedOptimizer

SETTINGS = Settings(lr=0.05, beta1=0.9, beta2=0.98, eps=1e-6)


def parameters() -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(3)
    return [("matrix", nn.Parameter(torch.randn(17, 5))), ("bias", nn.Parameter(torch.zeros(17)))]


def gradient(step: int, p: nn.Parameter) -> torch.Tensor:
    """Gradients that jump in size, so that StableAdamW has something to damp."""
    size = 50.0 if step % 4 == 3 else 0.1
    return size * torch.randn(p.shape, generator=torch.Generator().manual_seed(step))


def worst_distance(optimizer_class: type[ShardedOptimizer], formula: reference.Formula) -> float:
    """Run twelve steps beside the formula in fp64; return the worst relative error of a tensor."""
    named = parameters()
    eps = {} if optimizer_class is Lion else {"eps": SETTINGS.eps}
    optimizer = optimizer_class(
        named,
        lr=SETTINGS.lr,
        betas=(SETTINGS.beta1, SETTINGS.beta2),
        weight_decay_of=lambda p: 0.3 if p.dim() == 2 else 0.0,
        **eps,
    )
    truth = [p.detach().double().clone() for _, p in named]
    states = [State(w) for w in truth]
    for step in range(12):
        for i, (_, p) in enumerate(named):
            p.grad = gradient(step, p)
            own = SETTINGS._replace(decay=0.3 if p.dim() == 2 else 0.0)
            truth[i] = formula(truth[i], p.grad.double(), states[i], own)
        optimizer.step()
    return max(relative_error(p.detach(), w) for (_, p), w in zip(named, truth, strict=True))


@pytest.mark.parametrize(
    ("optimizer_class", "formula"),
    [(AdamW, reference.adamw), (StableAdamW, reference.stable_adamw), (Lion, reference.lion)],
)
def test_twelve_steps_follow_the_published_formula(
    optimizer_class: type[ShardedOptimizer], formula: reference.Formula
) -> None:
    assert worst_distance(optimizer_class, formula) < 1e-6


def test_a_weight_whose_rate_is_zero_stays_and_the_others_do_not_notice() -> None:
    alone, scaled = parameters(), parameters()
    before = scaled[0][1].detach().clone()
    for named, rates in ((alone, None), (scaled, {"matrix": 0.0, "bias": 1.0})):
        optimizer = AdamW(named, lr=0.1)
        if rates is not None:
            optimizer.declare_rates(rates.__getitem__)
        for _, p in named:
            p.grad = gradient(1, p)
        optimizer.step()
    assert torch.equal(scaled[0][1].detach(), before)
    assert torch.equal(scaled[1][1], alone[1][1])


def test_a_rate_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="learning rate factor of matrix is nan"):
        AdamW(parameters(), lr=0.1).declare_rates(lambda name: float("nan"))


def test_stable_adamw_damps_what_adamw_does_not() -> None:
    assert worst_distance(StableAdamW, reference.adamw) > 0.1


def test_adamw_is_torch_adamw() -> None:
    ours, theirs = parameters(), parameters()
    optimizers = [
        AdamW(ours, lr=0.1, eps=1e-8, weight_decay=0.3),
        torch.optim.AdamW([p for _, p in theirs], lr=0.1, eps=1e-8, weight_decay=0.3),
    ]
    for step in range(8):
        for named in (ours, theirs):
            for _, p in named:
                p.grad = gradient(step, p)
        for optimizer in optimizers:
            optimizer.step()
    assert max(relative_error(a.detach(), b.detach()) for (_, a), (_, b) in zip(ours, theirs, strict=True)) < 1e-6


def test_lion_keeps_one_moment() -> None:
    named = parameters()
    optimizer = Lion(named, lr=0.1)
    named[0][1].grad = torch.ones_like(named[0][1])
    optimizer.step()
    (state,) = optimizer.state.values()
    assert set(state) == {"step", "exp_avg"}
