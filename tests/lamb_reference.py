"""What the sharded optimizers are compared with: published formulas, line by line.

Nothing here knows of shards, segments or DeepSpeed. Formulas take and return whole tensors, one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from bert_ds.training.optimizers.lamb import LambFlags

PUBLISHED = {
    "apex": LambFlags(),
    "paper": LambFlags(use_nvlamb=True),
    "paper_v3": LambFlags(use_nvlamb=True, bias_correction=False),
    "deepspeed": LambFlags(use_nvlamb=True, bias_correction=False, correct_lr=True, min_trust=0.01, max_trust=10.0),
    "lambc": LambFlags(use_nvlamb=True, max_trust=1.0),
}
"""The flags of the published versions: NVIDIA's FusedLAMB with its defaults; the paper's version 1, with bias
correction, and 3, without; DeepSpeed's FusedLamb; a ratio of at most 1."""


class Settings(NamedTuple):
    """Learning rate and friends of the formulas."""

    lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-6
    decay: float = 0.0


class State:
    """Moments and step count of one tensor."""

    def __init__(self, w: Tensor) -> None:
        self.m = torch.zeros_like(w)
        self.v = torch.zeros_like(w)
        self.t = 0


Formula = Callable[[Tensor, Tensor, State, Settings], Tensor]
"""(w, g, state, settings) -> new w; the state is changed."""


def norm(x: Tensor) -> float:
    """Euclidean norm in fp64."""
    return math.sqrt(float((x.double() ** 2).sum()))


def ratio(w: Tensor, u: Tensor) -> float:
    """|w| / |u|, 1 where either is zero."""
    weight_norm, update_norm = norm(w), norm(u)
    return weight_norm / update_norm if weight_norm > 0 and update_norm > 0 else 1.0


def _moments(g: Tensor, state: State, s: Settings, *, beta3: float | None = None) -> None:
    state.t += 1
    state.m = s.beta1 * state.m + (1 - s.beta1 if beta3 is None else beta3) * g
    state.v = s.beta2 * state.v + (1 - s.beta2) * g * g


def _corrected(state: State, s: Settings) -> tuple[Tensor, Tensor]:
    return state.m / (1 - s.beta1**state.t), state.v / (1 - s.beta2**state.t)


def paper(w: Tensor, g: Tensor, state: State, s: Settings) -> Tensor:
    """LAMB, arXiv 1904.00962 version 1."""
    _moments(g, state, s)
    m_hat, v_hat = _corrected(state, s)
    u = m_hat / (v_hat.sqrt() + s.eps) + s.decay * w
    return w - s.lr * ratio(w, u) * u


def paper_v3(w: Tensor, g: Tensor, state: State, s: Settings) -> Tensor:
    """LAMB without the debiasing."""
    _moments(g, state, s)
    u = state.m / (state.v.sqrt() + s.eps) + s.decay * w
    return w - s.lr * ratio(w, u) * u


def lambc(w: Tensor, g: Tensor, state: State, s: Settings) -> Tensor:
    """LAMB with a ratio of at most 1."""
    _moments(g, state, s)
    m_hat, v_hat = _corrected(state, s)
    u = m_hat / (v_hat.sqrt() + s.eps) + s.decay * w
    return w - s.lr * min(1.0, ratio(w, u)) * u


def apex(w: Tensor, g: Tensor, state: State, s: Settings) -> Tensor:
    """csrc/multi_tensor_lamb.cu with the defaults of FusedLAMB, after its gradient pre-normalisation."""
    _moments(g, state, s)
    m_hat, v_hat = _corrected(state, s)
    u = m_hat / (v_hat.sqrt() + s.eps) + s.decay * w
    return w - s.lr * (ratio(w, u) if s.decay != 0 else 1.0) * u


def apex_l2(w: Tensor, g: Tensor, state: State, s: Settings) -> Tensor:
    """FusedLAMB with adam_w_mode=False and grad_averaging=False."""
    g = g + s.decay * w
    _moments(g, state, s, beta3=1.0)
    m_hat, v_hat = _corrected(state, s)
    u = m_hat / (v_hat.sqrt() + s.eps)
    return w - s.lr * (ratio(w, u) if s.decay != 0 else 1.0) * u


def clamped_norm(w: Tensor, g: Tensor, state: State, s: Settings) -> Tensor:
    """The paper's phi(|w|) = min(max(|w|, 0.5), 2)."""
    _moments(g, state, s)
    m_hat, v_hat = _corrected(state, s)
    u = m_hat / (v_hat.sqrt() + s.eps) + s.decay * w
    phi, update_norm = min(max(norm(w), 0.5), 2.0), norm(u)
    return w - s.lr * (phi / update_norm if update_norm > 0 else 1.0) * u


def deepspeed(w: Tensor, g: Tensor, state: State, s: Settings) -> Tensor:
    """csrc/lamb/fused_lamb_cuda_kernel.cu of DeepSpeed 0.19.8, eps outside the root."""
    _moments(g, state, s)
    u = state.m / (state.v.sqrt() + s.eps) + s.decay * w
    coefficient = 1.0
    if norm(w) != 0 and norm(u) != 0:
        coefficient = min(max(norm(w) / norm(u), 0.01), 10.0)
    step_size = s.lr * math.sqrt(1 - s.beta2**state.t) / (1 - s.beta1**state.t)
    return w - step_size * coefficient * u


def lans(w: Tensor, g: Tensor, state: State, s: Settings) -> Tensor:
    """arXiv 2006.13484, algorithm 2."""
    g = g / (norm(g) + s.eps)
    _moments(g, state, s)
    m_hat, v_hat = _corrected(state, s)
    denominator = v_hat.sqrt() + s.eps
    a = m_hat / denominator + s.decay * w
    b = g / denominator + s.decay * w
    return w - s.lr * (s.beta1 * ratio(w, a) * a + (1 - s.beta1) * ratio(w, b) * b)


def stable_adamw(w: Tensor, g: Tensor, state: State, s: Settings) -> Tensor:
    """arXiv 2304.13013, algorithm 2: AdamW whose rate is divided by the RMS of g / sqrt(v) where that exceeds 1."""
    state.t += 1
    beta1 = s.beta1 * (1 - s.beta1 ** (state.t - 1)) / (1 - s.beta1**state.t)
    beta2 = s.beta2 * (1 - s.beta2 ** (state.t - 1)) / (1 - s.beta2**state.t)
    state.m = beta1 * state.m + (1 - beta1) * g
    state.v = beta2 * state.v + (1 - beta2) * g * g
    rms = math.sqrt(float((g.double() ** 2 / state.v.double().clamp(min=s.eps**2)).mean()))
    lr = s.lr / max(1.0, rms)
    return w - lr * s.decay * w - lr * state.m / (state.v.sqrt() + s.eps)


def adamw(w: Tensor, g: Tensor, state: State, s: Settings) -> Tensor:
    """arXiv 1711.05101 with the learning rate on the decay, as torch does it."""
    _moments(g, state, s)
    m_hat, v_hat = _corrected(state, s)
    return w - s.lr * s.decay * w - s.lr * m_hat / (v_hat.sqrt() + s.eps)


def lion(w: Tensor, g: Tensor, state: State, s: Settings) -> Tensor:
    """arXiv 2302.06675, program 1."""
    state.t += 1
    update = (s.beta1 * state.m + (1 - s.beta1) * g).sign()
    state.m = s.beta2 * state.m + (1 - s.beta2) * g
    return w - s.lr * (update + s.decay * w)


def plain_norm_lamb(w: Tensor, g: Tensor, state: State, s: Settings) -> Tensor:
    """`paper` in fp32 torch throughout, as a user would write it."""
    _moments(g, state, s)
    m_hat, v_hat = _corrected(state, s)
    u = m_hat / (v_hat.sqrt() + s.eps) + s.decay * w
    weight_norm, update_norm = w.norm(), u.norm()
    one = torch.ones_like(weight_norm)
    trust = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, one)
    return w - s.lr * trust * u


class PlainLamb(torch.optim.Optimizer):
    """LAMB as found in the wild: one trust ratio per tensor that it is handed, flat shards included."""

    def __init__(
        self, params: Iterable, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            settings = Settings(group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            for param in group["params"]:
                if param.grad is not None:
                    holder = self.state[param].setdefault("state", State(param))
                    param.copy_(plain_norm_lamb(param, param.grad, holder, settings))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| in fp64; infinite where found is not finite."""
    if not found.isfinite().all():
        return math.inf
    return norm(found.double() - wanted.double()) / max(norm(wanted), 1e-30)


def worst_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest relative error of a tensor and its name."""
    assert found.keys() == wanted.keys()
    return max((relative_error(found[name], wanted[name]), name) for name in wanted)
