"""LayerNorm over the hidden dimension, plain and fused with the bias, dropout and residual before it.

    y = (z - mean(z)) * rstd(z) * weight + bias,   rstd = 1 / sqrt(var(z) + eps)
    layer_norm:             z = x
    dropout_add_layer_norm: z = residual + dropout(x + x_bias)     (Devlin et al. 2018, post-norm)

Letters: T tokens, D hidden. Inputs and outputs bf16, fp16 or fp32; statistics in fp32.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bert_kernels.dropout_mask import dropout_reference


def layer_norm_reference(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """Return LayerNorm of each row of x_TD (T, D), in x_TD's dtype with fp32 statistics."""
    return F.layer_norm(x_TD, weight_D.shape, weight_D.to(x_TD.dtype), bias_D.to(x_TD.dtype), eps)


def dropout_add_layer_norm_reference(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    *,
    x_bias_D: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Return LayerNorm(residual_TD + dropout(x_TD + x_bias_D)) of shape (T, D), in x_TD's dtype.

    The mask is that of `dropout_mask` for rows 0 .. T - 1, head 0.
    """
    x_TD = x_TD if x_bias_D is None else x_TD + x_bias_D
    z_TD = dropout_reference(x_TD, dropout_p=dropout_p, dropout_seed=dropout_seed, site=site, residual=residual_TD)
    return layer_norm_reference(z_TD, weight_D, bias_D, eps)


def layer_norm(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """Not written yet: use layer_norm_reference."""
    raise NotImplementedError("layer_norm has no Triton kernel yet; choose the torch operators")


def dropout_add_layer_norm(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    *,
    x_bias_D: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Not written yet: use dropout_add_layer_norm_reference."""
    raise NotImplementedError("dropout_add_layer_norm has no Triton kernel yet; choose the torch operators")
