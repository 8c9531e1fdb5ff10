"""The operators of this package that a transformers layer needs, and the attention function that it calls.

Three ways to compute: torch's own attention, sequences of equal length together, inside transformers' own layers; the
Triton operators; their torch references, with the same dropout masks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bert_kernels.hf.packing import Packing, grouped_attention

ATTENTION_NAME = "bert_kernels"
"""What `config._attn_implementation` says of an unpadded model."""

SITE = "_bert_kernels_site"
"""Attribute of an attention module: the number that tells its dropout mask from those of other layers."""
SITES_OF_A_LAYER = 3

Kernels = Literal["auto", "triton", "torch"]


class Operators(NamedTuple):
    """Fused operators of one signature, Triton's or torch's; see the files of their names."""

    attention: Callable[..., Tensor]
    dropout_add_layer_norm: Callable[..., Tensor]
    bias_gelu: Callable[..., Tensor]


def operators_for(kernels: Kernels, device: torch.device) -> Operators | None:
    """Return the fused operators, None for transformers' own layers: "auto" fuses on CUDA, where it pays."""
    if kernels == "auto" and device.type != "cuda":
        return None
    return _operators(kernels == "torch")


@functools.cache
def _operators(is_reference: bool) -> Operators:
    # Imported here, so that a CPU needs no triton.
    from bert_kernels import attention, bias_gelu, layer_norm

    if is_reference:
        return Operators(
            attention.attention_reference, layer_norm.dropout_add_layer_norm_reference, bias_gelu.bias_gelu_reference
        )
    return Operators(attention.attention, layer_norm.dropout_add_layer_norm, bias_gelu.bias_gelu)


def attention_over_tokens(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    bert_kernels_packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; queries, keys and values (1, H, T, K) or, without a packing, (B, H, S, K).

    Args:
        sliding_window: as transformers hands it down, one more than the places to each side that are seen.

    Returns:
        The output (1, T, H, K) or (B, S, H, K), and no probabilities.
    """
    window = None if sliding_window is None else sliding_window - 1
    packing = bert_kernels_packing
    if packing is None:
        if attention_mask is None and window is not None:
            attention_mask = _band(query.shape[2], window, query.device)
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal=False)
    if packing.operators is None:
        return _grouped((query, key, value), packing, dropout, scaling, window), None
    qkv_T3HK = torch.stack([x[0].transpose(0, 1) for x in (query, key, value)], dim=1)
    site = getattr(module, SITE, 0)
    return packed_attention(qkv_T3HK, packing, dropout_p=dropout, site=site, scale=scaling, window=window)[None], None


def packed_attention(
    qkv_T3HK: Tensor, packing: Packing, *, dropout_p: float, site: int, scale: float | None, window: int | None = None
) -> Tensor:
    """Return the attention (T, H, K) of the packed tokens by the fused operators."""
    return packing.operators.attention(
        qkv_T3HK,
        packing.cu_seqlens,
        packing.longest,
        dropout_p=dropout_p,
        dropout_seed=packing.key() if dropout_p else None,
        site=site,
        softmax_scale=scale,
        window=window,
    )


# Lengths are Python numbers: a compiler would make a graph for every batch that it sees.
_grouped = torch.compiler.disable(
    lambda qkv, packing, dropout_p, scale, window: grouped_attention(
        qkv, packing, dropout_p=dropout_p, scale=scale, window=window
    )
)


def _band(length: int, window: int, device: torch.device) -> Tensor | None:
    if length <= window + 1:
        return None
    places = torch.arange(length, device=device)
    return (places[:, None] - places).abs() <= window


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Make the mask of a model that has this attention's name without being unpadded, as one made of its config has.

    Without a mask to begin with there is none to make: a window is seen to by the attention function itself.
    """
    return None if kwargs.get("attention_mask") is None else sdpa_mask(*args, **kwargs)


def register_attention() -> None:
    """Make the attention known to transformers."""
    AttentionInterface.register(ATTENTION_NAME, attention_over_tokens)
    AttentionMaskInterface.register(ATTENTION_NAME, _mask)
