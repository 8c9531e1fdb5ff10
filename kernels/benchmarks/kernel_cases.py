"""One call of every operator at BERT's shapes: what is compiled ahead of time, and what tiles are tuned on.

A case makes its tensors on the default device. There a GPU gets random numbers; for the compiler alone none are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bert_kernels.attention_kernels import AttentionCall, attention_backward, attention_forward
from bert_kernels.bias_gelu import bias_gelu_backward, bias_gelu_forward
from bert_kernels.embedding_kernels import EmbeddingCall, Tables, embedding_backward, embedding_forward
from bert_kernels.flat_shard import FlatShard, LambScalars, Segment, SegmentTable
from bert_kernels.geglu import geglu_backward, geglu_forward
from bert_kernels.lamb_kernels import hyper_of_step, lamb_apply_triton, lamb_moments_triton
from bert_kernels.layer_norm_kernels import LayerNormCall, layer_norm_backward, layer_norm_forward
from bert_kernels.mlm_cross_entropy_kernels import replace_by_gradient
from bert_kernels.rotary import rotary_turn

NUM_TOKENS = 8192


@dataclass(frozen=True)
class Case:
    """One call of an operator at one of BERT's shapes, forward and backward."""

    name: str
    run: Callable[[], None]
    multiplies: bool
    """Whether tensor-core instructions must be there."""


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor on the default device, random where it is not the CPU's."""
    is_cpu = torch.get_default_device().type == "cpu"
    return torch.empty(shape, dtype=dtype) if is_cpu else torch.randn(shape).to(dtype)


def attention_case(head_dim: int, max_seqlen: int, dropout_p: float, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Return attention of packed qkv with 12 heads."""

    def run() -> None:
        qkv = numbers(NUM_TOKENS, 3, 12, head_dim, dtype=dtype)
        cu_seqlens, seed = (
            torch.arange(0, NUM_TOKENS + 1, max_seqlen, dtype=torch.int32),
            torch.zeros(1, dtype=torch.int64),
        )
        call = AttentionCall(qkv, cu_seqlens, max_seqlen, dropout_p, seed, 0, 0.125, -1)
        out, lse = attention_forward(call)
        attention_backward(call, out, lse, out)

    name = f"attention d={head_dim} s={max_seqlen} p={dropout_p} {str(dtype).removeprefix('torch.')}"
    return Case(name, run, multiplies=dtype != torch.float32)


def layer_norm_case(width: int, dropout_p: float | None, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Return dropout_add_layer_norm with a bias, or plain layer_norm where dropout_p is None."""

    def run() -> None:
        x, vector = numbers(NUM_TOKENS, width, dtype=dtype), numbers(width, dtype=dtype)
        residual, x_bias = (None, None) if dropout_p is None else (x, vector)
        call = LayerNormCall(x, residual, vector, x_bias, dropout_p or 0.0, torch.zeros(1, dtype=torch.int64), 0)
        y, _, mean, rstd = layer_norm_forward(call, vector, 1e-12)
        layer_norm_backward(call, (mean, rstd), y, has_bias=True)

    op = "layer_norm" if dropout_p is None else f"dropout_add_layer_norm p={dropout_p}"
    return Case(f"{op} d={width} {str(dtype).removeprefix('torch.')}", run, multiplies=False)


def autocast_norm_case(width: int, dropout_p: float) -> Case:
    """Return dropout_add_layer_norm of x in bf16, everything else in fp32."""

    def run() -> None:
        x, residual, vector = (
            numbers(NUM_TOKENS, width, dtype=torch.bfloat16),
            numbers(NUM_TOKENS, width),
            numbers(width),
        )
        call = LayerNormCall(x, residual, vector, vector, dropout_p, torch.zeros(1, dtype=torch.int64), 0)
        y, _, mean, rstd = layer_norm_forward(call, vector, 1e-12)
        layer_norm_backward(call, (mean, rstd), y, has_bias=True)

    return Case(f"dropout_add_layer_norm autocast p={dropout_p} d={width}", run, multiplies=False)


def pre_norm_case(width: int, dropout_p: float, *, has_biases: bool) -> Case:
    """Return dropout_add_then_norm in bf16, with both biases or, as in ModernBERT, with the weight alone."""

    def run() -> None:
        x, weight = (numbers(*shape, dtype=torch.bfloat16) for shape in ((NUM_TOKENS, width), (width,)))
        bias = weight if has_biases else None
        call = LayerNormCall(x, x, weight, bias, dropout_p, torch.zeros(1, dtype=torch.int64), 0)
        y, z, mean, rstd = layer_norm_forward(call, bias, 1e-5, returns_sum=True)
        of_sum = replace(call, x_TD=z, residual_TD=None)
        layer_norm_backward(of_sum, (mean, rstd), y, y, has_bias=has_biases)

    kind = "" if has_biases else "weight only "
    return Case(f"dropout_add_then_norm p={dropout_p} d={width} {kind}bfloat16", run, multiplies=False)


def rotary_case(head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Return the turn of packed qkv with 12 heads; turning back is the same kernel with one sign changed."""

    def run() -> None:
        qkv, positions = numbers(NUM_TOKENS, 3, 12, head_dim, dtype=dtype), torch.arange(NUM_TOKENS)
        rotary_turn(qkv, positions, 1e4, inverse=False)

    return Case(f"rotary d={head_dim} {str(dtype).removeprefix('torch.')}", run, multiplies=False)


def bias_gelu_case(width: int, approximate: str, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Return bias_gelu."""

    def run() -> None:
        x, bias = numbers(NUM_TOKENS, width, dtype=dtype), numbers(width, dtype=dtype)
        bias_gelu_backward(x, bias, bias_gelu_forward(x, bias, approximate), approximate)

    return Case(f"bias_gelu {approximate} f={width} {str(dtype).removeprefix('torch.')}", run, multiplies=False)


def geglu_case(width: int, approximate: str, dtype: torch.dtype = torch.bfloat16, *, has_bias: bool = False) -> Case:
    """Return geglu of 2 * width columns."""

    def run() -> None:
        x = numbers(NUM_TOKENS, 2 * width, dtype=dtype)
        bias = numbers(2 * width, dtype=dtype) if has_bias else None
        geglu_backward(x, bias, geglu_forward(x, bias, approximate), approximate)

    name = f"geglu {approximate} f={width} {'bias ' if has_bias else ''}{str(dtype).removeprefix('torch.')}"
    return Case(name, run, multiplies=False)


def mlm_cross_entropy_case(num_columns: int, dtype: torch.dtype = torch.bfloat16, *, num_rows: int = 1228) -> Case:
    """Return the loss of rows with their gradient, by default those masked of 8192 tokens."""

    def run() -> None:
        logits, labels = numbers(num_rows, num_columns, dtype=dtype), torch.zeros(num_rows, dtype=torch.int64)
        replace_by_gradient(logits, labels, num_columns - 6, gradient=True)

    return Case(f"mlm_cross_entropy v={num_columns} {str(dtype).removeprefix('torch.')}", run, multiplies=False)


def embedding_case(width: int, dropout_p: float, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Return the embedding and the gradient of the word table."""

    def run() -> None:
        index, seed = torch.zeros(NUM_TOKENS, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        tables = Tables(*(numbers(rows, width, dtype=dtype) for rows in (30528, 512, 2)))
        vector = numbers(width, dtype=dtype)
        call = EmbeddingCall(Tables(index, index, index), tables, vector, dropout_p, seed, 0)
        y, mean, rstd = embedding_forward(call, vector, 1e-12)
        embedding_backward(call, mean, rstd, y, Tables(True, False, False))

    return Case(f"embedding d={width} p={dropout_p} {str(dtype).removeprefix('torch.')}", run, multiplies=False)


def lamb_case(grad_dtype: torch.dtype) -> Case:
    """Return a step over one tensor of a million elements, with a bf16 copy."""

    def run() -> None:
        table = SegmentTable((Segment(0, 1 << 20, 0, 0.01),), 1 << 20, 1)
        param, grad = numbers(1 << 20), numbers(1 << 20, dtype=grad_dtype)
        shard = FlatShard(param, grad, param.square(), param.square(), table)
        scalars = LambScalars(0.9, 0.999, 0.1, 1e-6, 0.1, 0.001, True)
        hyper = hyper_of_step(scalars, 0.001, device=param.device)
        lamb_moments_triton(shard, hyper, sums_R2=torch.zeros(1, 2, dtype=torch.float64))
        lamb_apply_triton(shard, hyper, ratios_R=torch.ones(1), copy_E=param.bfloat16())

    return Case(f"lamb {str(grad_dtype).removeprefix('torch.')} gradients", run, multiplies=False)


def cases() -> list[Case]:
    """Return what the table holds."""
    lengths = (64, 128, 512)
    attention = [attention_case(64, length, p) for length in lengths for p in (0.0, 0.1)]
    attention += [attention_case(d, length, 0.1) for d in (32, 128) for length in lengths]
    attention += [attention_case(64, 512, 0.1, torch.float16), attention_case(64, 512, 0.1, torch.float32)]
    layer_norm = [layer_norm_case(width, p) for width in (768, 1024) for p in (None, 0.0, 0.1)]
    layer_norm += [layer_norm_case(width, 0.1) for width in (256, 512, 2048, 4096)]
    layer_norm += [autocast_norm_case(width, p) for width, p in ((768, 0.0), (768, 0.1), (1024, 0.1), (4096, 0.1))]
    layer_norm += [pre_norm_case(width, 0.0, has_biases=False) for width in (768, 1024)]
    layer_norm.append(pre_norm_case(1024, 0.1, has_biases=True))
    rotary = [rotary_case(64), rotary_case(128), rotary_case(64, torch.float32)]
    bias_gelu = [bias_gelu_case(width, kind) for width in (3072, 4096) for kind in ("none", "tanh")]
    bias_gelu.append(bias_gelu_case(4096, "none", torch.float32))
    geglu = [geglu_case(2624, kind, has_bias=has_bias) for kind in ("none", "tanh") for has_bias in (False, True)]
    geglu.append(geglu_case(2624, "none", torch.float32, has_bias=True))
    mlm = [mlm_cross_entropy_case(width) for width in (4096, 30528, 119552)]
    mlm.append(mlm_cross_entropy_case(30528, torch.float32))
    embedding = [embedding_case(width, p) for width in (768, 1024) for p in (0.0, 0.1)]
    embedding.append(embedding_case(1024, 0.1, torch.float32))
    lamb = [lamb_case(torch.bfloat16), lamb_case(torch.float32)]
    return attention + rotary + layer_norm + bias_gelu + geglu + mlm + embedding + lamb
