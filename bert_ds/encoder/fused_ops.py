"""The table of fused operations, and the model's only door to `bert_kernels`.

Each operation exists twice with one signature: `<op>_reference` in plain torch and `<op>` in Triton. The run's
`kernels` setting chooses; the weights, and so the checkpoints, do not depend on the choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from bert_kernels import attention, bias_gelu, dropout_mask, embedding, geglu, layer_norm, mlm_cross_entropy, rotary

_REFERENCES: dict[str, Callable[..., Any]] = {
    "attention": attention.attention_reference,
    "rotary": rotary.rotary_reference,
    "layer_norm": layer_norm.layer_norm_reference,
    "dropout_add_layer_norm": layer_norm.dropout_add_layer_norm_reference,
    "dropout_add_then_norm": layer_norm.dropout_add_then_norm_reference,
    "bias_gelu": bias_gelu.bias_gelu_reference,
    "geglu": geglu.geglu_reference,
    "mlm_cross_entropy": mlm_cross_entropy.mlm_cross_entropy_reference,
    "embedding": embedding.embedding_reference,
    "dropout": dropout_mask.dropout_reference,
}
_TRITON: dict[str, Callable[..., Any]] = {
    "attention": attention.attention,
    "rotary": rotary.rotary,
    "layer_norm": layer_norm.layer_norm,
    "dropout_add_layer_norm": layer_norm.dropout_add_layer_norm,
    "dropout_add_then_norm": layer_norm.dropout_add_then_norm,
    "bias_gelu": bias_gelu.bias_gelu,
    "geglu": geglu.geglu,
    "mlm_cross_entropy": mlm_cross_entropy.mlm_cross_entropy,
    "embedding": embedding.embedding,
    "dropout": dropout_mask.dropout_reference,
}


@dataclass(frozen=True)
class FusedOps:
    """One callable per operation; signatures, shapes and dtypes are those of `bert_kernels`."""

    attention: Callable[..., Tensor]
    rotary: Callable[..., Tensor]
    layer_norm: Callable[..., Tensor]
    dropout_add_layer_norm: Callable[..., Tensor]
    dropout_add_then_norm: Callable[..., tuple[Tensor, Tensor]]
    """The same with the sum, for layers that normalise first: (normalised, sum)."""
    bias_gelu: Callable[..., Tensor]
    geglu: Callable[..., Tensor]
    mlm_cross_entropy: Callable[..., tuple[Tensor, Tensor]]
    embedding: Callable[..., Tensor]
    dropout: Callable[..., Tensor]
    """For the input of a head, a row per sequence: too little work for a kernel of its own."""


def fused_ops(kernels: str) -> FusedOps:
    """Return the operations that a run's `training.kernels` asks for.

    Args:
        kernels: "torch" for the plain references; "triton" for the kernels, on a CPU only with TRITON_INTERPRET=1;
            "auto" for the kernels on CUDA tensors and the references elsewhere.

    Raises:
        ValueError: another word.
    """
    names = [field.name for field in fields(FusedOps)]
    if kernels == "torch":
        return FusedOps(**{name: _REFERENCES[name] for name in names})
    if kernels == "triton":
        return FusedOps(**{name: _TRITON[name] for name in names})
    if kernels == "auto":
        return FusedOps(**{name: _by_device(name) for name in names})
    raise ValueError(f'kernels is "{kernels}", wanted "auto", "triton" or "torch"')


def kernels_for(kernels: str, *, on_cuda: bool) -> str:
    """Return `training.kernels` for a launch whose tensors all lie on its device: "auto" need not look at each."""
    return {True: "triton", False: "torch"}[on_cuda] if kernels == "auto" else kernels


def uniform_draws(seed: Tensor, counters: tuple[Tensor, Tensor], *, site: int) -> Tensor:
    """Return a number in (0, 1) for each pair of counters, a Philox function of it as dropout masks are; fp32.

    Args:
        seed: int64 [1].
        counters: int64 of one shape, in [0, 2^32); as dropout has them the second is the row of a token.
        site: of no dropout.
    """
    first, second = counters
    zeros = torch.zeros_like(first)
    words = dropout_mask.philox_words((first.clone(), second.clone(), zeros, zeros + site), seed)
    # 23 bits and a half are exact in fp32, and never 0 or 1.
    return ((words[0] >> 9).float() + 0.5) * 2.0**-23


def _by_device(name: str) -> Callable[..., Any]:
    """Return the operation that looks where its first tensor lies."""
    triton, reference = _TRITON[name], _REFERENCES[name]

    def call(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (triton if first.is_cuda else reference)(first, *args, **kwargs)

    return call
