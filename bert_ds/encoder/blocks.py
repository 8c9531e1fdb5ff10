"""What the layers of several families consist of. Letters as in `families/bert.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bert_ds.encoder.fused_ops import FusedOps


class Dropout(NamedTuple):
    """A place that drops: how much, and the integer that tells its masks from those of other places."""

    probability: float
    site: int


class AddNorm(nn.Module):
    """What a block of a pre-norm network begins with: the last block's output is dropped and added, then normalised."""

    def __init__(self, hidden_size: int, *, eps: float, dropout: Dropout, ops: FusedOps, has_bias: bool = True) -> None:
        super().__init__()
        self.ops, self.eps, self.dropout = ops, eps, dropout
        self.layer_norm_weight = nn.Parameter(torch.empty(hidden_size))
        self.layer_norm_bias = nn.Parameter(torch.empty(hidden_size)) if has_bias else None

    def forward(self, x_TD: Tensor | None, residual_TD: Tensor, dropout_seed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return LayerNorm(sum) and the sum residual_TD + dropout(x_TD); nothing is added where x_TD is None."""
        if x_TD is None:
            normed_TD = self.ops.layer_norm(residual_TD, self.layer_norm_weight, self.layer_norm_bias, self.eps)
            return normed_TD, residual_TD
        return self.ops.dropout_add_then_norm(
            x_TD,
            residual_TD,
            self.layer_norm_weight,
            self.layer_norm_bias,
            self.eps,
            dropout_p=self.dropout.probability if self.training else 0.0,
            dropout_seed=dropout_seed,
            site=self.dropout.site,
        )


def through_layers(layers: Iterable[nn.Module], carried: Any, *others: Any, recompute: bool) -> Any:
    """Return what comes out of the last layer.

    Args:
        layers: each turns what is carried into the like of it.
        carried: a tensor, or a tuple of tensors, that the first layer gets.
        others: the further arguments of every layer.
        recompute: keep only what is carried between layers and compute the rest again in the backward pass.
    """
    for layer in layers:
        arguments = carried if isinstance(carried, tuple) else (carried,)
        if recompute:
            carried = checkpoint(layer, *arguments, *others, use_reentrant=False, preserve_rng_state=False)
        else:
            carried = layer(*arguments, *others)
    return carried


def first_rows(hidden_TD: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the first token of every sequence, [N, D]; the row of an empty one is another's and has no meaning."""
    return hidden_TD.index_select(0, cu_seqlens[:-1].clamp(max=hidden_TD.shape[0] - 1))


def mean_rows(hidden_TD: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the mean over the tokens of each sequence, fp32 [N, D]."""
    lengths_N = cu_seqlens.diff()
    sequence_T = torch.repeat_interleave(
        torch.arange(len(lengths_N), device=hidden_TD.device), lengths_N, output_size=len(hidden_TD)
    )
    sums_ND = hidden_TD.new_zeros(len(lengths_N), hidden_TD.shape[1], dtype=torch.float32)
    return sums_ND.index_add(0, sequence_T, hidden_TD.float()) / lengths_N[:, None]


def require_seed(module: nn.Module, dropout_seed: Tensor | None, *, drops: bool) -> None:
    """Raise ValueError where a network in training mode that drops has no seed."""
    if module.training and drops and dropout_seed is None:
        raise ValueError("dropout_seed is None, but the model is in training mode and its config has dropout")


def refuse_partitioned(module: nn.Module) -> None:
    """Raise ValueError where the parameters are partitioned already (`deepspeed.zero.Init`): nothing can be filled."""
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        raise ValueError("the model is built under deepspeed.zero.Init; wanted a whole model, partitioned afterwards")
