"""What the sharded optimizers are compared with: published formulas line by line, a small BERT, and unsharded training.

Nothing here knows of shards, segments or DeepSpeed. Formulas take and return whole tensors, one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class TinyBert(nn.Module):
    """A BERT small enough for hundreds of steps: tied decoder, odd sizes, no key bias.

    A key bias has no gradient in theory; Adam would turn its rounding noise into full steps.
    """

    vocab, hidden, inner, length, layers = 97, 24, 50, 9, 2

    def __init__(self, *, with_unused: bool = False, fused_qkv: bool = False) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(self.vocab, self.hidden)
        self.position_embeddings = nn.Embedding(self.length, self.hidden)
        self.LayerNorm = nn.LayerNorm(self.hidden)
        self.layer = nn.ModuleList([_Layer(self.hidden, self.inner) for _ in range(self.layers)])
        self.transform = nn.Linear(self.hidden, self.hidden)
        self.decoder_bias = nn.Parameter(torch.zeros(self.vocab))
        if fused_qkv:
            for layer in self.layer:
                layer.fuse_qkv()
        if with_unused:
            self.unused = nn.Parameter(torch.randn(13))
            self.frozen = nn.Parameter(torch.randn(self.hidden), requires_grad=False)
        self.register_tied()

    def register_tied(self) -> None:
        """Tell ZeRO-3 that the word embedding is also read here, in the parent's forward."""
        import deepspeed

        deepspeed.zero.register_external_parameter(self, self.word_embeddings.weight)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.LayerNorm(self.word_embeddings(tokens) + self.position_embeddings(positions))
        if hasattr(self, "frozen"):
            x = x + self.frozen
        for layer in self.layer:
            x = layer(x)
        x = F.gelu(self.transform(x))
        logits = F.linear(x, self.word_embeddings.weight, self.decoder_bias)
        return F.cross_entropy(logits.float().view(-1, self.vocab), labels.view(-1))


class _Layer(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden, bias=False)
        self.dense, self.intermediate, self.output = (
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, inner),
            nn.Linear(inner, hidden),
        )
        self.attention_LayerNorm, self.output_LayerNorm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def fuse_qkv(self) -> None:
        """Hold the three weights in one tensor, and the two biases in another."""
        weights = [getattr(self, name).weight.detach() for name in ("query", "key", "value")]
        biases = [getattr(self, name).bias.detach() for name in ("query", "value")]
        del self.query, self.key, self.value
        self.qkv = nn.Linear(weights[0].shape[1], 3 * weights[0].shape[0], bias=False)
        self.qkv.weight, self.qv_bias = nn.Parameter(torch.cat(weights)), nn.Parameter(torch.cat(biases))

    def project(self, x: Tensor) -> Iterable[Tensor]:
        """Return query, key and value."""
        if not hasattr(self, "qkv"):
            return self.query(x), self.key(x), self.value(x)
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        query_bias, value_bias = self.qv_bias.chunk(2)
        return query + query_bias, key, value + value_bias

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x)
        scores = query @ key.transpose(1, 2) / math.sqrt(x.shape[-1])
        x = self.attention_LayerNorm(x + self.dense(scores.softmax(-1) @ value))
        return self.output_LayerNorm(x + self.output(F.gelu(self.intermediate(x))))


NUM_MICRO_BATCHES = 12
"""Per step, over all ranks: divisible by 1, 2, 3 and 4."""


def micro_batch(step: int, index: int) -> tuple[Tensor, Tensor]:
    """Return tokens and labels [2, 9] of one of the micro-batches of a step."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    tokens = torch.randint(TinyBert.vocab, (2, TinyBert.length), generator=generator)
    labels = torch.randint(TinyBert.vocab, (2, TinyBert.length), generator=generator)
    return tokens, labels


def decay_of(name: str) -> float:
    """Weight decay of a parameter by name: none for biases and LayerNorm."""
    return 0.0 if "bias" in name or "LayerNorm" in name else 0.1


def make_model(**options: bool) -> TinyBert:
    """Return the model with the same weights every time."""
    torch.manual_seed(7)
    return TinyBert(**options)


class Trajectory(NamedTuple):
    """An unsharded run: final weights by name, loss and gradient norm of each step."""

    weights: dict[str, Tensor]
    losses: list[float]
    grad_norms: list[float]


def train_unsharded(
    formula: Formula, num_steps: int, *, settings: Settings, clip: float, dtype: torch.dtype = torch.float32
) -> Trajectory:
    """Train the small BERT on one process with whole tensors, one formula per tensor."""
    model = make_model().to(dtype)
    states = {name: State(p) for name, p in model.named_parameters()}
    losses, norms = [], []
    for step in range(num_steps):
        model.zero_grad()
        total = 0.0
        for index in range(NUM_MICRO_BATCHES):
            loss = model(*micro_batch(step, index)) / NUM_MICRO_BATCHES
            loss.backward()
            total += float(loss.detach())
        norms.append(math.sqrt(sum(norm(p.grad) ** 2 for p in model.parameters())))
        losses.append(total)
        scale = 1 / max(1.0, (norms[-1] + 1e-6) / clip)
        with torch.no_grad():
            for name, p in model.named_parameters():
                own = settings._replace(decay=decay_of(name))
                p.copy_(formula(p, p.grad * scale, states[name], own))
    return Trajectory({name: p.detach().clone() for name, p in model.named_parameters()}, losses, norms)


def fuse_qkv(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the small BERT as the fused one would hold them."""
    fused = dict(weights)
    for name in weights:
        if name.endswith("query.weight"):
            layer = name.removesuffix("query.weight")
            fused[f"{layer}qkv.weight"] = torch.cat(
                [fused.pop(f"{layer}{n}.weight") for n in ("query", "key", "value")]
            )
            fused[f"{layer}qv_bias"] = torch.cat([fused.pop(f"{layer}{n}.bias") for n in ("query", "value")])
    return fused


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| in fp64; infinite where found is not finite."""
    if not found.isfinite().all():
        return math.inf
    return norm(found.double() - wanted.double()) / max(norm(wanted), 1e-30)


def worst_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest relative error of a tensor and its name."""
    assert found.keys() == wanted.keys()
    return max((relative_error(found[name], wanted[name]), name) for name in wanted)
