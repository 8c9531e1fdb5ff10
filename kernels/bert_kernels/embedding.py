"""The embedding layer: word, position and type rows summed, LayerNorm, dropout.

    x = dropout(LayerNorm(word[input_ids] + position[position_ids] + type[token_type_ids]))     (Devlin et al. 2018)

Letters: T tokens, D hidden, V vocabulary, S positions. Tables and output bf16, fp16 or fp32; statistics in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bert_kernels.dropout_mask import dropout_reference
from bert_kernels.layer_norm import layer_norm_reference


def embedding_reference(
    input_ids_T: Tensor,
    token_type_ids_T: Tensor,
    position_ids_T: Tensor,
    word_VD: Tensor,
    position_SD: Tensor,
    type_2D: Tensor,
    ln_weight_D: Tensor,
    ln_bias_D: Tensor,
    eps: float,
    *,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Return the embedded tokens (T, D) in the tables' dtype; the dropout mask is that of rows 0 .. T - 1, head 0."""
    x_TD = _Rows.apply(word_VD, input_ids_T) + _Rows.apply(type_2D, token_type_ids_T)
    x_TD = layer_norm_reference(x_TD + _Rows.apply(position_SD, position_ids_T), ln_weight_D, ln_bias_D, eps)
    return dropout_reference(x_TD, dropout_p=dropout_p, dropout_seed=dropout_seed, site=site)


class _Rows(torch.autograd.Function):
    """F.embedding with its gradient summed in fp32: torch sums a bf16 table's in bf16 on a CPU, which loses 13 % of the
    type row of 2,000 tokens."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index_T: Tensor) -> Tensor:
        ctx.save_for_backward(index_T)
        ctx.num_rows = table.shape[0]
        return F.embedding(index_T, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_TD: Tensor) -> tuple[Tensor, None]:
        (index_T,) = ctx.saved_tensors
        wide = drows_TD.to(torch.promote_types(drows_TD.dtype, torch.float32))
        dtable = torch.ops.aten.embedding_dense_backward(wide, index_T, ctx.num_rows, -1, False)
        return dtable.to(drows_TD.dtype), None


def embedding(
    input_ids_T: Tensor,
    token_type_ids_T: Tensor,
    position_ids_T: Tensor,
    word_VD: Tensor,
    position_SD: Tensor,
    type_2D: Tensor,
    ln_weight_D: Tensor,
    ln_bias_D: Tensor,
    eps: float,
    *,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Not written yet: use embedding_reference."""
    raise NotImplementedError("embedding has no Triton kernel yet; choose the torch operators")
