"""The embedding layer: word, position and type rows summed, LayerNorm, dropout.

    x = dropout(LayerNorm(word[input_ids] + position[position_ids] + type[token_type_ids]))     (Devlin et al. 2018)

Letters: T tokens, D hidden, V vocabulary, S positions. Tables and output bf16, fp16 or fp32; statistics in fp32.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

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
    x_TD = F.embedding(input_ids_T, word_VD) + F.embedding(token_type_ids_T, type_2D)
    x_TD = layer_norm_reference(x_TD + F.embedding(position_ids_T, position_SD), ln_weight_D, ln_bias_D, eps)
    return dropout_reference(x_TD, dropout_p=dropout_p, dropout_seed=dropout_seed, site=site)


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
