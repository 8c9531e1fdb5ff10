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

from bert_kernels._launch import check_device, values_at_hand
from bert_kernels._operator import operator
from bert_kernels.dropout_mask import check_dropout, dropout_reference, keep_threshold
from bert_kernels.embedding_kernels import EmbeddingCall, Tables, embedding_backward, embedding_forward
from bert_kernels.layer_norm import MAX_WIDTH, layer_norm_reference


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
    if not dropout_p:
        return x_TD
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


@operator("bert_kernels::embedding")
def _embedding(
    indices: list[Tensor],
    word: Tensor,
    position: Tensor,
    type: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor]:
    tables = Tables(word, position, type)
    return embedding_forward(EmbeddingCall(Tables(*indices), tables, weight, dropout_p, seed, site), bias, eps)


@_embedding.register_fake
def _(
    indices: list[Tensor],
    word: Tensor,
    position: Tensor,
    type: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = weight.new_empty(indices[0].shape[0], dtype=torch.float32)
    return word.new_empty(indices[0].shape[0], word.shape[1]), statistics, torch.empty_like(statistics)


@operator("bert_kernels::embedding_backward")
def _embedding_backward(
    indices: list[Tensor],
    tables: list[Tensor],
    weight: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = EmbeddingCall(Tables(*indices), Tables(*tables), weight, dropout_p, seed, site)
    return embedding_backward(call, mean, rstd, dy, Tables(*wanted))


@_embedding_backward.register_fake
def _(
    indices: list[Tensor],
    tables: list[Tensor],
    weight: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    word, position, type_ = (
        table.new_empty(table.shape if is_wanted else (0,)) for table, is_wanted in zip(tables, wanted, strict=True)
    )
    return word, position, type_, weight.new_empty(2, weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    indices, word, position, type_, weight, _bias, _eps, dropout_p, seed, site = inputs
    _, mean, rstd = output
    ctx.save_for_backward(*indices, word, position, type_, weight, seed, mean, rstd)
    ctx.numbers = (dropout_p, site)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx: Any, dy: Tensor, _dmean: Tensor, _drstd: Tensor) -> tuple:
    *tensors, weight, seed, mean, rstd = ctx.saved_tensors
    dropout_p, site = ctx.numbers
    wanted = list(ctx.needs_input_grad[1:4])
    *dtables, dln = _embedding_backward(tensors[:3], tensors[3:], weight, dropout_p, seed, site, mean, rstd, dy, wanted)
    dtables = [dtable if is_wanted else None for dtable, is_wanted in zip(dtables, wanted, strict=True)]
    return [None] * 3, *dtables, *dln.unbind(0), None, None, None, None


_embedding.register_autograd(_backward, setup_context=_setup_context)


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
    """Return the embedded tokens (T, D) as embedding_reference does, by the Triton kernels.

    Args:
        input_ids_T, token_type_ids_T, position_ids_T: int64, rows of the tables. On a GPU not checked, which would take
            a wait: a token with another index becomes NaN.

    Raises:
        ValueError: an argument is outside what the kernels can do.
    """
    indices = {"input_ids_T": input_ids_T, "position_ids_T": position_ids_T, "token_type_ids_T": token_type_ids_T}
    tables = {"word_VD": word_VD, "position_SD": position_SD, "type_2D": type_2D}
    vectors = {"ln_weight_D": ln_weight_D, "ln_bias_D": ln_bias_D}
    check_device("embedding", **indices, **tables, **vectors)
    check_dropout(dropout_p, dropout_seed, word_VD.device)
    _check_tables(tables, vectors)
    _check_indices(indices, tables)
    seed = None if keep_threshold(dropout_p) == 256 else dropout_seed
    contiguous = [index.contiguous() for index in indices.values()]
    return _embedding(contiguous, *tables.values(), *vectors.values(), eps, dropout_p, seed, site)[0]


def _check_tables(tables: dict[str, Tensor], vectors: dict[str, Tensor]) -> None:
    word = tables["word_VD"]
    if word.dim() != 2 or not 1 <= word.shape[1] <= MAX_WIDTH:
        raise ValueError(
            f"embedding: word_VD must have shape (V, D) with D in [1, {MAX_WIDTH}], got {list(word.shape)}"
        )
    if word.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"embedding: word_VD must be bfloat16, float16 or float32, got {word.dtype}")
    for name, tensor in (tables | vectors).items():
        dtype = word.dtype if name in tables else vectors["ln_weight_D"].dtype
        if tensor.shape[-1:] != word.shape[1:] or tensor.dtype != dtype or not tensor.is_contiguous():
            found = f"{tensor.dtype} {list(tensor.shape)} with stride {list(tensor.stride())}"
            raise ValueError(f"embedding: {name} must be contiguous {dtype} of width {word.shape[1]}, got {found}")


def _check_indices(indices: dict[str, Tensor], tables: dict[str, Tensor]) -> None:
    num_tokens = len(indices["input_ids_T"])
    for (name, index), table in zip(indices.items(), tables.values(), strict=True):
        if index.dtype != torch.int64 or index.shape != (num_tokens,):
            found = f"{index.dtype} {list(index.shape)}"
            raise ValueError(f"embedding: {name} must be torch.int64 [{num_tokens}], got {found}")
        if num_tokens and values_at_hand(index):
            low, high = (int(bound) for bound in index.aminmax())
            if low < 0 or high >= len(table):
                raise ValueError(f"embedding: {name} must be in [0, {len(table)}), got {low} to {high}")
