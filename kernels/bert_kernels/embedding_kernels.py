"""The Triton kernels of the embedding layer and their launches; formulas and letters are in `embedding`.

Forward gathers three rows per token, normalises their fp32 sum and drops. Saved for backward: mean and rstd; the sum is
gathered again, which costs what reading a saved one would.

Backward takes dropout and LayerNorm back per token (dz, in the tables' dtype), and then adds dz up by table row. That
sum is deterministic: tokens are sorted by row (stable), each chunk of the sorted tokens is added up by a program as a
product with the 0/1 matrix of equal rows, and a row that several chunks share is added up from their fp32 partial sums,
in order, by the chunk where it starts. A frequent row (a segment, [MASK]) is so spread over many programs, no atomics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_kernels._column_sums import column_sums
from bert_kernels._launch import cdiv, launch, next_power_of_2, pick_tile
from bert_kernels._numerics import as_operand, cpu_bf16, load_operand
from bert_kernels._tiles import LAYER_NORM, SEGMENT_SUM
from bert_kernels.dropout_mask import keep_hidden_tile, keep_scale, keep_threshold


@triton.jit
def _gather(table_ptr, index_ptr, num_rows, rows, num_tokens, offs_d, mask, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the table rows of tokens in fp32; NaN for an index outside the table."""
    index = tl.load(index_ptr + rows, mask=rows < num_tokens, other=0)
    inside = ((index >= 0) & (index < num_rows))[:, None]
    x = tl.load(table_ptr + index[:, None] * WIDTH + offs_d[None, :], mask=mask & inside, other=0.0).to(tl.float32)
    return tl.where(inside, x, float("nan"))


@triton.jit
def _gather_sum(  # type: ignore[no-untyped-def]
    word_ptr, position_ptr, type_ptr, words_ptr, positions_ptr, types_ptr, num_words, num_positions, num_types,
    rows, num_tokens, offs_d, mask, WIDTH: tl.constexpr,
):  # fmt: skip
    z = _gather(word_ptr, words_ptr, num_words, rows, num_tokens, offs_d, mask, WIDTH)
    z += _gather(position_ptr, positions_ptr, num_positions, rows, num_tokens, offs_d, mask, WIDTH)
    z += _gather(type_ptr, types_ptr, num_types, rows, num_tokens, offs_d, mask, WIDTH)
    return z


@triton.jit(do_not_specialize=["num_tokens", "num_words", "num_positions", "num_types", "site"])
def _embedding_fwd_kernel(  # type: ignore[no-untyped-def]
    word_ptr, position_ptr, type_ptr, words_ptr, positions_ptr, types_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr,
    rstd_ptr, seed_ptr, num_tokens, num_words, num_positions, num_types, eps, keep_scale, site,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, THRESHOLD: tl.constexpr, CPU_BF16: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (rows < num_tokens)[:, None] & (offs_d < WIDTH)[None, :]
    z = _gather_sum(
        word_ptr, position_ptr, type_ptr, words_ptr, positions_ptr, types_ptr, num_words, num_positions, num_types,
        rows, num_tokens, offs_d, mask, WIDTH,
    )  # fmt: skip
    mean = tl.sum(z, 1) / WIDTH
    # Columns past the end must not count.
    centred = tl.where(mask, z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    weight = tl.load(weight_ptr + offs_d, mask=offs_d < WIDTH, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_d, mask=offs_d < WIDTH, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    if THRESHOLD < 256:
        keep = keep_hidden_tile(tl.load(seed_ptr), first_row, site, THRESHOLD, BLOCK_M, BLOCK_D)
        y = tl.where(keep, y * keep_scale, 0.0)
    offs = first_row * WIDTH + (tl.arange(0, BLOCK_M)[:, None] * WIDTH + offs_d[None, :])
    tl.store(y_ptr + offs, as_operand(y, y_ptr.dtype.element_ty, CPU_BF16), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < num_tokens)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_tokens)


@triton.jit(do_not_specialize=["num_tokens", "num_words", "num_positions", "num_types", "site"])
def _embedding_bwd_kernel(  # type: ignore[no-untyped-def]
    word_ptr, position_ptr, type_ptr, words_ptr, positions_ptr, types_ptr, weight_ptr, dy_ptr, mean_ptr, rstd_ptr,
    dz_ptr, partials_ptr, seed_ptr, num_tokens, num_words, num_positions, num_types, keep_scale, site,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, THRESHOLD: tl.constexpr, CPU_BF16: tl.constexpr,
):  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < WIDTH
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_M), tl.num_programs(0)):
        first_row = tl.cast(block, tl.int64) * BLOCK_M
        rows = first_row + tl.arange(0, BLOCK_M)
        mask = (rows < num_tokens)[:, None] & mask_d[None, :]
        offs = first_row * WIDTH + (tl.arange(0, BLOCK_M)[:, None] * WIDTH + offs_d[None, :])
        z = _gather_sum(
            word_ptr, position_ptr, type_ptr, words_ptr, positions_ptr, types_ptr, num_words, num_positions, num_types,
            rows, num_tokens, offs_d, mask, WIDTH,
        )  # fmt: skip
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if THRESHOLD < 256:
            keep = keep_hidden_tile(tl.load(seed_ptr), first_row, site, THRESHOLD, BLOCK_M, BLOCK_D)
            dy = tl.where(keep, dy * keep_scale, 0.0)
        mean = tl.load(mean_ptr + rows, mask=rows < num_tokens, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_tokens, other=0.0)
        x_hat = tl.where(mask, (z - mean[:, None]) * rstd[:, None], 0.0)
        dweight += tl.sum(dy * x_hat, 0)
        dbias += tl.sum(dy, 0)
        wdy = dy * weight[None, :]
        mean_wdy = tl.sum(wdy, 1) / WIDTH
        mean_wdy_x_hat = tl.sum(wdy * x_hat, 1) / WIDTH
        dz = (wdy - mean_wdy[:, None] - x_hat * mean_wdy_x_hat[:, None]) * rstd[:, None]
        tl.store(dz_ptr + offs, as_operand(dz, dz_ptr.dtype.element_ty, CPU_BF16), mask=mask)
    partials_ptr += tl.program_id(0).to(tl.int64) * (2 * WIDTH)
    tl.store(partials_ptr + offs_d, dweight, mask=mask_d)
    tl.store(partials_ptr + WIDTH + offs_d, dbias, mask=mask_d)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _segment_sum_kernel(  # type: ignore[no-untyped-def]
    dz_ptr, sorted_ptr, order_ptr, dtable_ptr, partials_ptr, num_tokens, num_rows, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CPU_BF16: tl.constexpr,
):  # fmt: skip
    """Add up a chunk of sorted tokens; rows that other chunks share go to partials (chunk, first or last row, D)."""
    chunk = tl.program_id(0)
    offs_m = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < num_tokens
    row = tl.load(sorted_ptr + offs_m, mask=mask_m, other=-1)
    before = tl.load(sorted_ptr + offs_m - 1, mask=(offs_m > 0) & mask_m, other=-2)
    token = tl.load(order_ptr + offs_m, mask=mask_m, other=0)
    mask = mask_m[:, None] & (offs_n < width)[None, :]
    dz = load_operand(dz_ptr + token[:, None] * width + offs_n[None, :], mask, CPU_BF16)
    same = (row[:, None] == row[None, :]).to(dz.dtype)
    sums = tl.dot(same, dz, input_precision="ieee")
    # What comes from the chunk before and what goes on in the next one is shared; a row is written by its first token.
    end = tl.minimum(chunk * BLOCK_M + BLOCK_M, num_tokens)
    comes = row == tl.load(sorted_ptr + chunk * BLOCK_M - 1, mask=chunk > 0, other=-2)
    goes = row == tl.load(sorted_ptr + end, mask=end < num_tokens, other=-2)
    starts = (row >= 0) & (row < num_rows) & ((row != before) | (offs_m == chunk * BLOCK_M))
    out = as_operand(sums, dtable_ptr.dtype.element_ty, CPU_BF16)
    dtable_ptrs = dtable_ptr + row.to(tl.int64)[:, None] * width + offs_n[None, :]
    tl.store(dtable_ptrs, out, mask=mask & (starts & ((comes | goes) == 0))[:, None])
    partials_ptrs = (
        partials_ptr + chunk.to(tl.int64) * (2 * width) + tl.where(comes, 0, width)[:, None] + offs_n[None, :]
    )
    tl.store(partials_ptrs, sums, mask=mask & (starts & (comes | goes))[:, None])


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_chunks"])
def _shared_rows_kernel(  # type: ignore[no-untyped-def]
    sorted_ptr, dtable_ptr, partials_ptr, num_tokens, num_rows, num_chunks, width,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CPU_BF16: tl.constexpr,
):  # fmt: skip
    """Add up the partial sums of the row that starts in this chunk and goes on in the next ones, where there is one."""
    chunk = tl.program_id(0)
    last_token = chunk * CHUNK + CHUNK - 1
    row = tl.load(sorted_ptr + last_token, mask=last_token < num_tokens, other=-1)
    row_after = tl.load(sorted_ptr + last_token + 1, mask=last_token + 1 < num_tokens, other=-2)
    row_before = tl.load(sorted_ptr + chunk * CHUNK - 1, mask=chunk > 0, other=-2)
    if (row == row_after) & (row != row_before) & (row >= 0) & (row < num_rows):
        offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < width
        acc = tl.load(partials_ptr + chunk.to(tl.int64) * (2 * width) + width + offs_n, mask=mask_n, other=0.0)
        block = chunk + 1
        going = row == row_after
        while going:
            chunks = block + tl.arange(0, BLOCK_M)
            first_rows = tl.load(sorted_ptr + chunks * CHUNK, mask=chunks < num_chunks, other=-1)
            mask = (first_rows == row)[:, None] & mask_n[None, :]
            offs = chunks.to(tl.int64)[:, None] * (2 * width) + offs_n[None, :]
            acc += tl.sum(tl.load(partials_ptr + offs, mask=mask, other=0.0), 0)
            block += BLOCK_M
            going = tl.sum((first_rows == row).to(tl.int32)) == BLOCK_M
        out = as_operand(acc, dtable_ptr.dtype.element_ty, CPU_BF16)
        tl.store(dtable_ptr + row.to(tl.int64) * width + offs_n, out, mask=mask_n)


class Tables(NamedTuple):
    """The three tables (rows, D), or something for each of them."""

    word: Any
    position: Any
    type: Any


@dataclass(frozen=True)
class EmbeddingCall:
    """What forward and backward of one call share."""

    indices: Tables
    """int64 (T) each."""
    tables: Tables
    weight_D: Tensor
    dropout_p: float
    dropout_seed: Tensor | None
    site: int

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that both kernels take."""
        word = self.tables.word
        return {
            "word_ptr": word,
            "position_ptr": self.tables.position,
            "type_ptr": self.tables.type,
            "words_ptr": self.indices.word,
            "positions_ptr": self.indices.position,
            "types_ptr": self.indices.type,
            "weight_ptr": self.weight_D,
            # Not read without dropout, but a pointer all the same.
            "seed_ptr": self.indices.word if self.dropout_seed is None else self.dropout_seed,
            "num_tokens": len(self.indices.word),
            "num_words": len(word),
            "num_positions": len(self.tables.position),
            "num_types": len(self.tables.type),
            "keep_scale": keep_scale(self.dropout_p),
            "site": self.site,
            "WIDTH": word.shape[1],
            "BLOCK_D": max(8, next_power_of_2(word.shape[1])),
            "THRESHOLD": keep_threshold(self.dropout_p),
            "CPU_BF16": cpu_bf16(word.dtype),
        }


def embedding_forward(call: EmbeddingCall, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (T, D), mean (T) and rstd (T)."""
    word, num_tokens = call.tables.word, len(call.indices.word)
    y = torch.empty(num_tokens, word.shape[1], dtype=word.dtype, device=word.device)
    mean, rstd = (torch.empty(num_tokens, dtype=torch.float32, device=word.device) for _ in range(2))
    arguments = call.arguments()
    # Left to itself the assembler of Triton 3.7 spills for sm_80, to stay at 64 registers.
    tile = replace(pick_tile(LAYER_NORM, word.device, arguments["BLOCK_D"]), max_registers=128)
    own = {"bias_ptr": bias_D, "y_ptr": y, "mean_ptr": mean, "rstd_ptr": rstd, "eps": eps, "BLOCK_M": tile.block_m}
    launch(_embedding_fwd_kernel, (cdiv(num_tokens, tile.block_m),), tile, arguments | own)
    return y, mean, rstd


def embedding_backward(
    call: EmbeddingCall, mean: Tensor, rstd: Tensor, dy: Tensor, wanted: Tables
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the tables ((0,) where not wanted), and dweight and dbias as rows of one tensor."""
    word, num_tokens = call.tables.word, len(call.indices.word)
    arguments = call.arguments()
    tile = pick_tile(LAYER_NORM, word.device, arguments["BLOCK_D"])
    programs = min(tile.block_n, cdiv(num_tokens, tile.block_m))
    dz = torch.empty(num_tokens, word.shape[1], dtype=word.dtype, device=word.device)
    partials = torch.empty(programs, 2, word.shape[1], dtype=torch.float32, device=word.device)
    own = {"dy_ptr": dy.contiguous(), "mean_ptr": mean, "rstd_ptr": rstd, "dz_ptr": dz, "partials_ptr": partials}
    launch(_embedding_bwd_kernel, (programs,), tile, arguments | own | {"BLOCK_M": tile.block_m})
    word_grad, position_grad, type_grad = (
        table_gradient(dz, index, len(table)) if is_wanted else dz.new_empty(0)
        for index, table, is_wanted in zip(call.indices, call.tables, wanted, strict=True)
    )
    return word_grad, position_grad, type_grad, column_sums(partials, call.weight_D.dtype)


def table_gradient(dz_TD: Tensor, index_T: Tensor, num_rows: int) -> Tensor:
    """Return the sum of the rows of dz_TD by index (num_rows, D), summed in fp32 and rounded once."""
    num_tokens, width = dz_TD.shape
    dtable = torch.zeros(num_rows, width, dtype=dz_TD.dtype, device=dz_TD.device)
    # Radix sort takes a pass per 8 bits of the key.
    keys, order = torch.sort(index_T.to(torch.int16 if num_rows < 1 << 15 else torch.int32), stable=True)
    keys = keys.to(torch.int32)
    tile = SEGMENT_SUM[dz_TD.element_size()]
    num_chunks = cdiv(num_tokens, tile.block_m)
    partials = torch.empty(num_chunks, 2, width, dtype=torch.float32, device=dz_TD.device)
    shared = {
        "sorted_ptr": keys,
        "dtable_ptr": dtable,
        "partials_ptr": partials,
        "num_tokens": num_tokens,
        "num_rows": num_rows,
        "width": width,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "CPU_BF16": cpu_bf16(dz_TD.dtype),
    }
    grid = (num_chunks, cdiv(width, tile.block_n))
    launch(_segment_sum_kernel, grid, tile, shared | {"dz_ptr": dz_TD, "order_ptr": order})
    launch(_shared_rows_kernel, grid, tile, shared | {"num_chunks": num_chunks, "CHUNK": tile.block_m})
    return dtable
