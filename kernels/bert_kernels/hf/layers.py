"""A layer of BERT's shape over packed tokens, by the fused operators. Letters as in `packing`; F intermediate size.

A weight is read directly only where its module is plain: no adapter in its place, no hook on it, as ZeRO-3, offloading
and probes set them. Every other part of the layer is called as transformers made it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_kernels.hf.class_swap import state_of
from bert_kernels.hf.operators import SITE, packed_attention
from bert_kernels.hf.packing import PACKING, Packing

# transformers' names of GELU to the operator's; every other activation is called.
_GELUS = {"gelu": "none", "gelu_python": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


def fused_layer(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a layer whose parts are named as in BertLayer."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        packing = kwargs.get(PACKING)
        if state_of(self) is None or packing is None or packing.operators is None:
            return original(self, hidden_states, *args, **kwargs)
        x_TD = hidden_states[0]
        site = getattr(self.attention.self, SITE)
        context_TD = _attention(self.attention.self, x_TD, packing)
        x_TD = _add_and_norm(self.attention.output, context_TD, x_TD, packing=packing, site=site + 1)
        inner_TF = _activate(self.intermediate, x_TD, self.attention.self.config.hidden_act, packing)
        return _add_and_norm(self.output, inner_TF, x_TD, packing=packing, site=site + 2)[None]

    return forward


def is_plain(module: nn.Module) -> bool:
    """Return whether the module does what its class does, and nobody watches it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    is_torchs = type(module) in (nn.Linear, nn.LayerNorm, nn.Dropout)
    return is_torchs and not any(hooks) and "forward" not in module.__dict__


def _attention(part: Any, x_TD: Tensor, packing: Packing) -> Tensor:
    heads = (len(x_TD), part.num_attention_heads, part.attention_head_size)
    projections = (part.query, part.key, part.value)
    if all(is_plain(each) and each.bias is not None for each in projections):
        weight = torch.cat([each.weight for each in projections])
        bias = torch.cat([each.bias for each in projections])
        qkv_T3HK = F.linear(x_TD, weight, bias).view(len(x_TD), 3, *heads[1:])
    else:
        qkv_T3HK = torch.stack([each(x_TD).view(heads) for each in projections], dim=1)
    p = part.dropout.p if part.training else 0.0
    return packed_attention(qkv_T3HK, packing, dropout_p=p, site=getattr(part, SITE), scale=part.scaling).flatten(1)


def _add_and_norm(part: Any, x: Tensor, residual_TD: Tensor, *, packing: Packing, site: int) -> Tensor:
    norm, p = part.LayerNorm, part.dropout.p if part.dropout.training else 0.0
    if not all(is_plain(each) for each in (part.dense, part.dropout, norm)) or part.dense.bias is None:
        return part(x, residual_TD)
    return packing.operators.dropout_add_layer_norm(
        # Under autocast the product is 16 bits wide and the residual fp32: transformers adds and normalises in fp32.
        F.linear(x, part.dense.weight).to(residual_TD.dtype),
        residual_TD,
        norm.weight,
        norm.bias,
        norm.eps,
        x_bias_D=part.dense.bias,
        dropout_p=p,
        dropout_seed=packing.key() if p else None,
        site=site,
    )


def _activate(part: Any, x_TD: Tensor, activation: Any, packing: Packing) -> Tensor:
    approximate = _GELUS.get(activation) if isinstance(activation, str) else None
    if approximate is None or not is_plain(part.dense) or part.dense.bias is None:
        return part(x_TD)
    return packing.operators.bias_gelu(F.linear(x_TD, part.dense.weight), part.dense.bias, approximate=approximate)
