"""The small BERT that the sharded optimizers are tried on, and its training on one process with whole tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lamb_reference import Formula, Settings, State, norm
from torch import Tensor, nn


class TinyBert(nn.Module):
    """A BERT small enough for hundreds of steps: tied decoder, odd sizes, no key bias.

    A key bias has no gradient in theory; Adam would turn its rounding noise into full steps.
    """

    vocab, hidden, inner, length = 97, 24, 50, 9

    def __init__(self, *, num_layers: int = 2, with_unused: bool = False, fused_qkv: bool = False) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(self.vocab, self.hidden)
        self.position_embeddings = nn.Embedding(self.length, self.hidden)
        self.LayerNorm = nn.LayerNorm(self.hidden)
        self.layer = nn.ModuleList([_Layer(self.hidden, self.inner) for _ in range(num_layers)])
        self.transform = nn.Linear(self.hidden, self.hidden)
        self.decoder_bias = nn.Parameter(torch.zeros(self.vocab))
        if fused_qkv:
            for layer in self.layer:
                layer.fuse_qkv()
        if with_unused:
            self.unused = nn.Parameter(torch.randn(13))
            self.unused_matrix = nn.Parameter(torch.randn(6, 5))
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


def make_model(**options: Any) -> TinyBert:
    """Return the model with the same weights every time."""
    torch.manual_seed(7)
    return TinyBert(**options)


class Trajectory(NamedTuple):
    """An unsharded run: final weights by name, loss and gradient norm of each step."""

    weights: dict[str, Tensor]
    losses: list[float]
    grad_norms: list[float]


def train_unsharded(
    formula_of: Callable[[str], Formula],
    num_steps: int,
    *,
    settings: Settings,
    clip: float,
    model: TinyBert | None = None,
    num_micro_batches: int = NUM_MICRO_BATCHES,
) -> Trajectory:
    """Train the small BERT, or this one, on one process with whole tensors, each by the formula of its name."""
    model = model or make_model()
    states = {name: State(p) for name, p in model.named_parameters()}
    losses, norms = [], []
    for step in range(num_steps):
        model.zero_grad()
        total = 0.0
        for index in range(num_micro_batches):
            loss = model(*micro_batch(step, index)) / num_micro_batches
            loss.backward()
            total += float(loss.detach())
        norms.append(math.sqrt(sum(norm(p.grad) ** 2 for p in model.parameters())))
        losses.append(total)
        scale = 1 / max(1.0, (norms[-1] + 1e-6) / clip)
        with torch.no_grad():
            for name, p in model.named_parameters():
                own = settings._replace(decay=decay_of(name))
                p.copy_(formula_of(name)(p, p.grad * scale, states[name], own))
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
