"""The kernels of LayerNorm, forward and backward, and how they are launched; the operators are in `layer_norm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_kernels._column_sums import column_sums
from bert_kernels._launch import cdiv, launch, next_power_of_2, pick_tile
from bert_kernels._numerics import as_operand, cpu_bf16
from bert_kernels._tiles import LAYER_NORM
from bert_kernels.dropout_mask import keep_hidden_tile, keep_scale, keep_threshold


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
    x_ptr, residual_ptr, x_bias_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr, seed_ptr,
    num_rows, eps, keep_scale, site,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_X_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr, THRESHOLD: tl.constexpr, RETURNS_SUM: tl.constexpr,
    CPU_BF16_Y: tl.constexpr,
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
    if RETURNS_SUM:
        # What is normalised is the sum as it is stored: backward and the next layer read that one.
        rounded = as_operand(z, sum_ptr.dtype.element_ty, CPU_BF16_Y)
        tl.store(sum_ptr + offs, rounded, mask=mask)
        z = rounded.to(tl.float32)
    # Columns past the end must not count: x_bias and dropout leave them 0, the difference from the mean would not.
    mean = tl.sum(z, 1) / WIDTH
    centred = tl.where(mask, z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    weight = tl.load(weight_ptr + offs_d, mask=offs_d < WIDTH, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_d, mask=offs_d < WIDTH, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs, as_operand(y, y_ptr.dtype.element_ty, CPU_BF16_Y), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows", "site"])
def _layer_norm_bwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, x_bias_ptr, weight_ptr, dy_ptr, dsum_ptr, mean_ptr, rstd_ptr, dz_ptr, dx_ptr, partials_ptr,
    seed_ptr, num_rows, keep_scale, site,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_X_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr, THRESHOLD: tl.constexpr, RETURNS_SUM: tl.constexpr,
    STORES_DX: tl.constexpr, CPU_BF16_X: tl.constexpr, CPU_BF16_Y: tl.constexpr,
):  # fmt: skip
    # A returned sum is read as it is, and the mask is drawn where dx needs it.
    ADDS_X_BIAS: tl.constexpr = HAS_X_BIAS and not RETURNS_SUM
    DROPS_X: tl.constexpr = 256 if RETURNS_SUM else THRESHOLD
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
            WIDTH, BLOCK_M, BLOCK_D, HAS_RESIDUAL, ADDS_X_BIAS, DROPS_X,
        )  # fmt: skip
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        # Past the end dy, so wdy too, is 0, and of rows past the end rstd: nothing of there enters a sum.
        x_hat = (z - mean[:, None]) * rstd[:, None]
        dweight += tl.sum(dy * x_hat, 0)
        if HAS_BIAS:
            dbias += tl.sum(dy, 0)
        wdy = dy * weight[None, :]
        mean_wdy = tl.sum(wdy, 1) / WIDTH
        mean_wdy_x_hat = tl.sum(wdy * x_hat, 1) / WIDTH
        dz = (wdy - mean_wdy[:, None] - x_hat * mean_wdy_x_hat[:, None]) * rstd[:, None]
        if RETURNS_SUM:
            dz += tl.load(dsum_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dz_ptr + offs, as_operand(dz, dz_ptr.dtype.element_ty, CPU_BF16_Y), mask=mask)
        if THRESHOLD < 256:
            if RETURNS_SUM:
                keep = keep_hidden_tile(tl.load(seed_ptr), first_row, site, THRESHOLD, BLOCK_M, BLOCK_D)
            dz = tl.where(keep, dz * keep_scale, 0.0)
        if STORES_DX:
            tl.store(dx_ptr + offs, as_operand(dz, dx_ptr.dtype.element_ty, CPU_BF16_X), mask=mask)
        if HAS_X_BIAS:
            dx_bias += tl.sum(dz, 0)
    partials_ptr += tl.program_id(0).to(tl.int64) * ((1 + HAS_BIAS + HAS_X_BIAS) * WIDTH)
    tl.store(partials_ptr + offs_d, dweight, mask=mask_d)
    if HAS_BIAS:
        tl.store(partials_ptr + WIDTH + offs_d, dbias, mask=mask_d)
    if HAS_X_BIAS:
        tl.store(partials_ptr + (1 + HAS_BIAS) * WIDTH + offs_d, dx_bias, mask=mask_d)


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

    @property
    def stream_TD(self) -> Tensor:
        """What y and the gradient of z look like: the residual, or x without one."""
        return self.x_TD if self.residual_TD is None else self.residual_TD

    @property
    def stores_dx(self) -> bool:
        """Whether the gradient of x is another tensor than that of z."""
        return keep_threshold(self.dropout_p) < 256 or self.x_TD.dtype != self.stream_TD.dtype

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that both kernels take; pointers that are not read are x's."""
        x = self.x_TD
        return {
            "x_ptr": x,
            "residual_ptr": self.stream_TD,
            "x_bias_ptr": x if self.x_bias_D is None else self.x_bias_D,
            "weight_ptr": self.weight_D,
            "seed_ptr": x if self.dropout_seed is None else self.dropout_seed,
            "num_rows": x.shape[0],
            "keep_scale": keep_scale(self.dropout_p),
            "site": self.site,
            "WIDTH": x.shape[1],
            "BLOCK_D": max(8, next_power_of_2(x.shape[1])),
            "HAS_RESIDUAL": self.residual_TD is not None,
            "HAS_X_BIAS": self.x_bias_D is not None,
            "THRESHOLD": keep_threshold(self.dropout_p),
            "CPU_BF16_Y": cpu_bf16(self.stream_TD.dtype),
        }


def layer_norm_forward(
    call: LayerNormCall, bias_D: Tensor | None, eps: float, *, returns_sum: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y (T, D), z as it is normalised (T, D; (0,) unless it is asked for), mean (T) and rstd (T)."""
    x = call.x_TD
    y = torch.empty_like(call.stream_TD)
    z = torch.empty_like(y) if returns_sum else y.new_empty(0)
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    arguments = call.arguments()
    tile = pick_tile(LAYER_NORM, x.device, arguments["BLOCK_D"])
    own: dict[str, Any] = {
        "bias_ptr": x if bias_D is None else bias_D,
        "y_ptr": y,
        "sum_ptr": z,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "eps": eps,
        "BLOCK_M": tile.block_m,
        "HAS_BIAS": bias_D is not None,
        "RETURNS_SUM": returns_sum,
    }
    launch(_layer_norm_fwd_kernel, (cdiv(x.shape[0], tile.block_m),), tile, arguments | own)
    return y, z, mean, rstd


def layer_norm_backward(
    call: LayerNormCall, statistics: tuple[Tensor, Tensor], dy: Tensor, dsum: Tensor | None = None, *, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dz (T, D), dx (T, D; empty where it equals dz), and dweight(, dbias)(, dx_bias) as rows of one tensor.

    Args:
        call: where dsum is given, its x_TD is z and it has no residual.
        statistics: mean (T) and rstd (T).
        dy: gradient of the normalised rows (T, D).
        dsum: gradient of z where forward returned it (T, D).
        has_bias: whether forward had a bias after the weight.
    """
    x = call.x_TD
    dz = torch.empty_like(call.stream_TD)
    dx = torch.empty_like(x) if call.stores_dx else x.new_empty(0)
    arguments = call.arguments()
    tile = pick_tile(LAYER_NORM, x.device, arguments["BLOCK_D"])
    programs = min(tile.block_n, cdiv(x.shape[0], tile.block_m))
    num_sums = 1 + has_bias + (call.x_bias_D is not None)
    partials = torch.empty(programs, num_sums, x.shape[1], dtype=torch.float32, device=x.device)
    own: dict[str, Any] = {
        "dy_ptr": dy.contiguous(),
        "dsum_ptr": x if dsum is None else dsum.contiguous(),
        "mean_ptr": statistics[0],
        "rstd_ptr": statistics[1],
        "dz_ptr": dz,
        "dx_ptr": dx,
        "partials_ptr": partials,
        "BLOCK_M": tile.block_m,
        "HAS_BIAS": has_bias,
        "RETURNS_SUM": dsum is not None,
        "STORES_DX": call.stores_dx,
        "CPU_BF16_X": cpu_bf16(x.dtype),
    }
    launch(_layer_norm_bwd_kernel, (programs,), tile, arguments | own)
    return dz, dx, column_sums(partials, call.weight_D.dtype)
