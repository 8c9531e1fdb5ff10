"""LayerNorm over the hidden dimension, plain and fused with the bias, dropout and residual before it.

    y = (z - mean(z)) * rstd(z) * weight + bias,   rstd = 1 / sqrt(var(z) + eps)
    layer_norm:             z = x
    dropout_add_layer_norm: z = residual + dropout(x + x_bias)     (Devlin et al. 2018, post-norm)

Letters: T tokens, D hidden. Inputs and outputs bf16, fp16 or fp32; statistics in fp32. Saved for backward: x, residual,
mean and rstd; z is computed again rather than saved, which costs the same traffic as writing and reading it and keeps
its fp32 digits. With x_hat = (z - mean) * rstd and wdy = weight * dy:

    dz = rstd * (wdy - mean(wdy) - x_hat * mean(wdy * x_hat))      dresidual = dz, dx = dropout's backward of dz
    dweight = sum of dy * x_hat, dbias = sum of dy, dx_bias = sum of dx over the rows: partial sums by program, fp32
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bert_kernels._column_sums import column_sums
from bert_kernels._launch import check_device, launch, pick_tile
from bert_kernels._numerics import as_operand, cpu_bf16
from bert_kernels._tiles import LAYER_NORM
from bert_kernels.dropout_mask import check_dropout, dropout_reference, keep_hidden_tile, keep_scale, keep_threshold

# A row of this many columns still fits the registers of a program.
MAX_WIDTH = 4096


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


@triton.jit
def _load_z(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, x_bias_ptr, seed_ptr, first_row, offs, mask, offs_d, keep_scale, site,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_X_BIAS: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Return z = residual + dropout(x + x_bias) in fp32 and the keep mask, for rows from first_row on."""
    z = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_X_BIAS:
        z += tl.load(x_bias_ptr + offs_d, mask=offs_d < WIDTH, other=0.0).to(tl.float32)[None, :]
    keep = mask
    if THRESHOLD < 256:
        keep = keep_hidden_tile(tl.load(seed_ptr), first_row, site, THRESHOLD, BLOCK_M, BLOCK_D)
        z = tl.where(keep, z * keep_scale, 0.0)
    if HAS_RESIDUAL:
        z += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return z, keep


@triton.jit(do_not_specialize=["num_rows", "site"])
def _layer_norm_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, x_bias_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, seed_ptr,
    num_rows, eps, keep_scale, site,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_X_BIAS: tl.constexpr, THRESHOLD: tl.constexpr, CPU_BF16: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (offs_d < WIDTH)[None, :]
    offs = first_row * WIDTH + (tl.arange(0, BLOCK_M)[:, None] * WIDTH + offs_d[None, :])
    z, _keep = _load_z(
        x_ptr, residual_ptr, x_bias_ptr, seed_ptr, first_row, offs, mask, offs_d, keep_scale, site,
        WIDTH, BLOCK_M, BLOCK_D, HAS_RESIDUAL, HAS_X_BIAS, THRESHOLD,
    )  # fmt: skip
    # Columns past the end must not count: x_bias and dropout leave them 0, the difference from the mean would not.
    mean = tl.sum(z, 1) / WIDTH
    centred = tl.where(mask, z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    weight = tl.load(weight_ptr + offs_d, mask=offs_d < WIDTH, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_d, mask=offs_d < WIDTH, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + offs, as_operand(y, y_ptr.dtype.element_ty, CPU_BF16), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows", "site"])
def _layer_norm_bwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, x_bias_ptr, weight_ptr, dy_ptr, mean_ptr, rstd_ptr, dz_ptr, dx_ptr, partials_ptr, seed_ptr,
    num_rows, keep_scale, site,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_X_BIAS: tl.constexpr, THRESHOLD: tl.constexpr, CPU_BF16: tl.constexpr,
):  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < WIDTH
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    dx_bias = tl.zeros([BLOCK_D], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.num_programs(0)):
        first_row = tl.cast(block, tl.int64) * BLOCK_M
        rows = first_row + tl.arange(0, BLOCK_M)
        mask = (rows < num_rows)[:, None] & mask_d[None, :]
        offs = first_row * WIDTH + (tl.arange(0, BLOCK_M)[:, None] * WIDTH + offs_d[None, :])
        z, keep = _load_z(
            x_ptr, residual_ptr, x_bias_ptr, seed_ptr, first_row, offs, mask, offs_d, keep_scale, site,
            WIDTH, BLOCK_M, BLOCK_D, HAS_RESIDUAL, HAS_X_BIAS, THRESHOLD,
        )  # fmt: skip
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        # Past the end dy, so wdy too, is 0, and of rows past the end rstd: nothing of there enters a sum.
        x_hat = (z - mean[:, None]) * rstd[:, None]
        dweight += tl.sum(dy * x_hat, 0)
        dbias += tl.sum(dy, 0)
        wdy = dy * weight[None, :]
        mean_wdy = tl.sum(wdy, 1) / WIDTH
        mean_wdy_x_hat = tl.sum(wdy * x_hat, 1) / WIDTH
        dz = (wdy - mean_wdy[:, None] - x_hat * mean_wdy_x_hat[:, None]) * rstd[:, None]
        tl.store(dz_ptr + offs, as_operand(dz, dz_ptr.dtype.element_ty, CPU_BF16), mask=mask)
        if THRESHOLD < 256:
            dz = tl.where(keep, dz * keep_scale, 0.0)
            tl.store(dx_ptr + offs, as_operand(dz, dz_ptr.dtype.element_ty, CPU_BF16), mask=mask)
        if HAS_X_BIAS:
            dx_bias += tl.sum(dz, 0)
    partials_ptr += tl.program_id(0).to(tl.int64) * ((2 + HAS_X_BIAS) * WIDTH)
    tl.store(partials_ptr + offs_d, dweight, mask=mask_d)
    tl.store(partials_ptr + WIDTH + offs_d, dbias, mask=mask_d)
    if HAS_X_BIAS:
        tl.store(partials_ptr + 2 * WIDTH + offs_d, dx_bias, mask=mask_d)


@dataclass(frozen=True)
class LayerNormCall:
    """What forward and backward of one call share."""

    x_TD: Tensor
    residual_TD: Tensor | None
    weight_D: Tensor
    x_bias_D: Tensor | None
    dropout_p: float
    dropout_seed: Tensor | None
    site: int

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that both kernels take; pointers that are not read are x's."""
        x = self.x_TD
        return {
            "x_ptr": x,
            "residual_ptr": x if self.residual_TD is None else self.residual_TD,
            "x_bias_ptr": x if self.x_bias_D is None else self.x_bias_D,
            "weight_ptr": self.weight_D,
            "seed_ptr": x if self.dropout_seed is None else self.dropout_seed,
            "num_rows": x.shape[0],
            "keep_scale": keep_scale(self.dropout_p),
            "site": self.site,
            "WIDTH": x.shape[1],
            "BLOCK_D": max(8, triton.next_power_of_2(x.shape[1])),
            "HAS_RESIDUAL": self.residual_TD is not None,
            "HAS_X_BIAS": self.x_bias_D is not None,
            "THRESHOLD": keep_threshold(self.dropout_p),
            "CPU_BF16": cpu_bf16(x.dtype),
        }


def layer_norm_forward(call: LayerNormCall, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (T, D), mean (T) and rstd (T)."""
    x = call.x_TD
    y = torch.empty_like(x)
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    arguments = call.arguments()
    tile = pick_tile(LAYER_NORM, x.device, arguments["BLOCK_D"])
    own: dict[str, Any] = {
        "bias_ptr": bias_D,
        "y_ptr": y,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "eps": eps,
        "BLOCK_M": tile.block_m,
    }
    launch(_layer_norm_fwd_kernel, (triton.cdiv(x.shape[0], tile.block_m),), tile, arguments | own)
    return y, mean, rstd


def layer_norm_backward(call: LayerNormCall, mean: Tensor, rstd: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return dz (T, D), dx (T, D; empty where it equals dz), and dweight, dbias (, dx_bias) as rows of one tensor."""
    x = call.x_TD
    dz = torch.empty_like(x)
    dx = torch.empty_like(x) if keep_threshold(call.dropout_p) < 256 else x.new_empty(0)
    arguments = call.arguments()
    tile = pick_tile(LAYER_NORM, x.device, arguments["BLOCK_D"])
    programs = min(tile.block_n, triton.cdiv(x.shape[0], tile.block_m))
    num_sums = 2 if call.x_bias_D is None else 3
    partials = torch.empty(programs, num_sums, x.shape[1], dtype=torch.float32, device=x.device)
    own: dict[str, Any] = {"dy_ptr": dy.contiguous(), "mean_ptr": mean, "rstd_ptr": rstd, "dz_ptr": dz, "dx_ptr": dx}
    own |= {"partials_ptr": partials, "BLOCK_M": tile.block_m}
    launch(_layer_norm_bwd_kernel, (programs,), tile, arguments | own)
    return dz, dx, column_sums(partials, call.weight_D.dtype)


@torch.library.custom_op("bert_kernels::layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return layer_norm_forward(LayerNormCall(x, residual, weight, x_bias, dropout_p, seed, site), bias, eps)


@_layer_norm.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[0], dtype=torch.float32)
    return torch.empty_like(x), statistics, torch.empty_like(statistics)


@torch.library.custom_op("bert_kernels::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    x_bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return layer_norm_backward(LayerNormCall(x, residual, weight, x_bias, dropout_p, seed, site), mean, rstd, dy)


@_layer_norm_backward.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    x_bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x) if keep_threshold(dropout_p) < 256 else x.new_empty(0)
    return torch.empty_like(x), dx, weight.new_empty(2 if x_bias is None else 3, x.shape[1])


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, _bias, x_bias, _eps, dropout_p, seed, site = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, residual, weight, x_bias, seed, mean, rstd)
    ctx.numbers = (dropout_p, site)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx: Any, dy: Tensor, _dmean: Tensor, _drstd: Tensor) -> tuple:
    x, residual, weight, x_bias, seed, mean, rstd = ctx.saved_tensors
    dropout_p, site = ctx.numbers
    dz, dx, sums = _layer_norm_backward(x, residual, weight, x_bias, dropout_p, seed, site, mean, rstd, dy)
    dx = dx if keep_threshold(dropout_p) < 256 else dz
    dweight, dbias, *dx_bias = sums.unbind(0)
    dresidual = None if residual is None else dz
    return dx, dresidual, dweight, dbias, dx_bias[0] if dx_bias else None, None, None, None, None


_layer_norm.register_autograd(_backward, setup_context=_setup_context)


def layer_norm(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """Return LayerNorm of each row of x_TD as layer_norm_reference does, by the Triton kernels.

    Raises:
        ValueError: an argument is outside what the kernels can do.
    """
    check_device("layer_norm", x_TD=x_TD, weight_D=weight_D, bias_D=bias_D)
    _check_shapes("layer_norm", x_TD, {}, {"weight_D": weight_D, "bias_D": bias_D})
    return _layer_norm(x_TD.contiguous(), None, weight_D, bias_D, None, eps, 0.0, None, 0)[0]


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
    """Return LayerNorm(residual_TD + dropout(x_TD + x_bias_D)) by the Triton kernels; mask as in the reference.

    Raises:
        ValueError: an argument is outside what the kernels can do.
    """
    op = "dropout_add_layer_norm"
    vectors = {"weight_D": weight_D, "bias_D": bias_D} | ({} if x_bias_D is None else {"x_bias_D": x_bias_D})
    check_device(op, x_TD=x_TD, residual_TD=residual_TD, **vectors)
    check_dropout(dropout_p, dropout_seed, x_TD.device)
    _check_shapes(op, x_TD, {"residual_TD": residual_TD}, vectors)
    seed = None if keep_threshold(dropout_p) == 256 else dropout_seed
    x_TD, residual_TD = x_TD.contiguous(), residual_TD.contiguous()
    return _layer_norm(x_TD, residual_TD, weight_D, bias_D, x_bias_D, eps, dropout_p, seed, site)[0]


def _check_shapes(op: str, x_TD: Tensor, rows: dict[str, Tensor], vectors: dict[str, Tensor]) -> None:
    if x_TD.dim() != 2 or not 1 <= x_TD.shape[1] <= MAX_WIDTH:
        raise ValueError(f"{op}: x_TD must have shape (T, D) with D in [1, {MAX_WIDTH}], got {list(x_TD.shape)}")
    if x_TD.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{op}: x_TD must be bfloat16, float16 or float32, got {x_TD.dtype}")
    for name, tensor in rows.items():
        if tensor.shape != x_TD.shape or tensor.dtype != x_TD.dtype:
            wanted, found = (f"{t.dtype} {list(t.shape)}" for t in (x_TD, tensor))
            raise ValueError(f"{op}: {name} must be {wanted} as x_TD, got {found}")
    dtype = vectors["weight_D"].dtype
    for name, tensor in vectors.items():
        if tensor.shape != x_TD.shape[1:] or tensor.dtype != dtype or not tensor.is_contiguous():
            found = f"{tensor.dtype} {list(tensor.shape)} with stride {list(tensor.stride())}"
            raise ValueError(f"{op}: {name} must be contiguous {dtype} [{x_TD.shape[1]}], got {found}")
