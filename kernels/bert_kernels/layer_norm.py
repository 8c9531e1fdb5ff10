"""LayerNorm over the hidden dimension, plain and fused with the bias, dropout and residual before it.

    y = (z - mean(z)) * rstd(z) * weight + bias,   rstd = 1 / sqrt(var(z) + eps)
    layer_norm:             z = x
    dropout_add_layer_norm: z = residual + dropout(x + x_bias)     (Devlin et al. 2018, post-norm)
    dropout_add_then_norm:  the same, and z is returned too, for the next residual     (pre-norm)

Letters: T tokens, D hidden. Inputs and outputs bf16, fp16 or fp32; statistics in fp32. Under autocast a linear layer
gives x in 16 bits, while the residual stream and what LayerNorm gives stay fp32: dropout_add_layer_norm takes that too.
Saved for backward: mean, rstd and what z is made of. That is x and residual where z is not returned: computing it again
costs the same traffic as writing and reading it and keeps its fp32 digits. A returned z is rounded to its dtype before
it is normalised, as the next layer reads it, and is all that backward needs. With x_hat = (z - mean) * rstd and
wdy = weight * dy:

    dz = rstd * (wdy - mean(wdy) - x_hat * mean(wdy * x_hat)) + the gradient of a returned z
    dresidual = dz, dx = dropout's backward of dz
    dweight = sum of dy * x_hat, dbias = sum of dy, dx_bias = sum of dx over the rows: partial sums by program, fp32
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_kernels._launch import check_device
from bert_kernels._operator import operator
from bert_kernels.dropout_mask import check_dropout, dropout_reference, keep_threshold
from bert_kernels.layer_norm_kernels import LayerNormCall, layer_norm_backward, layer_norm_forward

# A row of this many columns still fits the registers of a program.
MAX_WIDTH = 4096


def layer_norm_reference(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    """Return LayerNorm of each row of x_TD (T, D), in x_TD's dtype with fp32 statistics."""
    bias_D = None if bias_D is None else bias_D.to(x_TD.dtype)
    return F.layer_norm(x_TD, weight_D.shape, weight_D.to(x_TD.dtype), bias_D, eps)


def dropout_add_layer_norm_reference(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
    *,
    x_bias_D: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Return LayerNorm(residual_TD + dropout(x_TD + x_bias_D)) of shape (T, D), in residual_TD's dtype.

    That is x_TD's or fp32. The mask is that of `dropout_mask` for rows 0 .. T - 1, head 0.
    """
    options: dict[str, Any] = {"dropout_p": dropout_p, "dropout_seed": dropout_seed, "site": site}
    return dropout_add_then_norm_reference(x_TD, residual_TD, weight_D, bias_D, eps, x_bias_D=x_bias_D, **options)[0]


def dropout_add_then_norm_reference(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
    *,
    x_bias_D: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return LayerNorm of z and z = residual_TD + dropout(x_TD + x_bias_D), both (T, D) in x_TD's dtype.

    The mask is that of `dropout_mask` for rows 0 .. T - 1, head 0.
    """
    x_TD = (x_TD if x_bias_D is None else x_TD + x_bias_D.to(x_TD.dtype)).to(residual_TD.dtype)
    if dropout_p:
        z_TD = dropout_reference(x_TD, dropout_p=dropout_p, dropout_seed=dropout_seed, site=site, residual=residual_TD)
    else:
        z_TD = residual_TD + x_TD
    return layer_norm_reference(z_TD, weight_D, bias_D, eps), z_TD


@operator("bert_kernels::layer_norm")
def _layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    x_bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    returns_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = LayerNormCall(x, residual, weight, x_bias, dropout_p, seed, site)
    return layer_norm_forward(call, bias, eps, returns_sum=returns_sum)


@_layer_norm.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    x_bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    returns_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = LayerNormCall(x, residual, weight, x_bias, dropout_p, seed, site)
    y, statistics = torch.empty_like(call.stream_TD), x.new_empty(x.shape[0], dtype=torch.float32)
    z = torch.empty_like(y) if returns_sum else y.new_empty(0)
    return y, z, statistics, torch.empty_like(statistics)


@operator("bert_kernels::layer_norm_backward")
def _layer_norm_backward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    has_bias: bool,
    x_bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    dsum: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    call = LayerNormCall(x, residual, weight, x_bias, dropout_p, seed, site)
    return layer_norm_backward(call, (mean, rstd), dy, dsum, has_bias=has_bias)


@_layer_norm_backward.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    has_bias: bool,
    x_bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    dsum: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    call = LayerNormCall(x, residual, weight, x_bias, dropout_p, seed, site)
    dx = torch.empty_like(x) if call.stores_dx else x.new_empty(0)
    return torch.empty_like(call.stream_TD), dx, weight.new_empty(1 + has_bias + (x_bias is not None), x.shape[1])


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, x_bias, _eps, dropout_p, seed, site, returns_sum = inputs
    _, z, mean, rstd = output
    ctx.has_residual = residual is not None
    made_of = (z, None) if returns_sum else (x, residual)
    ctx.save_for_backward(*made_of, weight, x_bias, seed, mean, rstd)
    ctx.numbers = (bias is not None, dropout_p, site, returns_sum)
    ctx.mark_non_differentiable(mean, rstd, *(() if returns_sum else (z,)))


def _backward(ctx: Any, dy: Tensor, dsum: Tensor, _dmean: Tensor, _drstd: Tensor) -> tuple:
    x, residual, weight, x_bias, seed, mean, rstd = ctx.saved_tensors
    has_bias, dropout_p, site, returns_sum = ctx.numbers
    call = LayerNormCall(x, residual, weight, x_bias, dropout_p, seed, site)
    dz, dx, sums = _layer_norm_backward(
        x, residual, weight, has_bias, x_bias, dropout_p, seed, site, mean, rstd, dy, dsum if returns_sum else None
    )
    dx = dx if call.stores_dx else dz
    dweight, *rest = sums.unbind(0)
    dbias = rest.pop(0) if has_bias else None
    dx_bias = rest.pop(0) if rest else None
    dresidual = dz if ctx.has_residual else None
    return dx, dresidual, dweight, dbias, dx_bias, None, None, None, None, None


_layer_norm.register_autograd(_backward, setup_context=_setup_context)


def layer_norm(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    """Return LayerNorm of each row of x_TD as layer_norm_reference does, by the Triton kernels.

    Raises:
        ValueError: an argument is outside what the kernels can do.
    """
    _check_rows("layer_norm", x_TD, None, {"weight_D": weight_D, "bias_D": bias_D})
    return _layer_norm(x_TD.contiguous(), None, weight_D, bias_D, None, eps, 0.0, None, 0, False)[0]


def dropout_add_layer_norm(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
    *,
    x_bias_D: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Return what dropout_add_layer_norm_reference does, of the same mask and dtypes, by the Triton kernels.

    Raises:
        ValueError: an argument is outside what the kernels can do.
    """
    vectors = {"weight_D": weight_D, "bias_D": bias_D, "x_bias_D": x_bias_D}
    check_dropout(dropout_p, dropout_seed, x_TD.device)
    _check_rows("dropout_add_layer_norm", x_TD, residual_TD, vectors, may_widen=True)
    seed = None if keep_threshold(dropout_p) == 256 else dropout_seed
    x_TD, residual_TD = x_TD.contiguous(), residual_TD.contiguous()
    return _layer_norm(x_TD, residual_TD, weight_D, bias_D, x_bias_D, eps, dropout_p, seed, site, False)[0]


def dropout_add_then_norm(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
    *,
    x_bias_D: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return LayerNorm of z, and z, as dropout_add_then_norm_reference does, by the Triton kernels.

    Raises:
        ValueError: an argument is outside what the kernels can do.
    """
    vectors = {"weight_D": weight_D, "bias_D": bias_D, "x_bias_D": x_bias_D}
    check_dropout(dropout_p, dropout_seed, x_TD.device)
    _check_rows("dropout_add_then_norm", x_TD, residual_TD, vectors)
    seed = None if keep_threshold(dropout_p) == 256 else dropout_seed
    x_TD, residual_TD = x_TD.contiguous(), residual_TD.contiguous()
    y, z, _, _ = _layer_norm(x_TD, residual_TD, weight_D, bias_D, x_bias_D, eps, dropout_p, seed, site, True)
    return y, z


def _check_rows(
    op: str, x_TD: Tensor, residual_TD: Tensor | None, vectors: dict[str, Tensor | None], *, may_widen: bool = False
) -> None:
    check_device(op, x_TD=x_TD, residual_TD=residual_TD, **vectors)
    if x_TD.dim() != 2 or not 1 <= x_TD.shape[1] <= MAX_WIDTH:
        raise ValueError(f"{op}: x_TD must have shape (T, D) with D in [1, {MAX_WIDTH}], got {list(x_TD.shape)}")
    if x_TD.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{op}: x_TD must be bfloat16, float16 or float32, got {x_TD.dtype}")
    if residual_TD is not None:
        dtypes = (x_TD.dtype, torch.float32) if may_widen else (x_TD.dtype,)
        if residual_TD.shape != x_TD.shape or residual_TD.dtype not in dtypes:
            wanted, found = (f"{t.dtype} {list(t.shape)}" for t in (x_TD, residual_TD))
            or_wider = ", or the same in torch.float32" if dtypes[-1] != x_TD.dtype else ""
            raise ValueError(f"{op}: residual_TD must be {wanted} as x_TD{or_wider}, got {found}")
    given = {name: tensor for name, tensor in vectors.items() if tensor is not None}
    dtype = given["weight_D"].dtype
    for name, tensor in given.items():
        if tensor.shape != x_TD.shape[1:] or tensor.dtype != dtype or not tensor.is_contiguous():
            found = f"{tensor.dtype} {list(tensor.shape)} with stride {list(tensor.stride())}"
            raise ValueError(f"{op}: {name} must be contiguous {dtype} [{x_TD.shape[1]}], got {found}")
