"""The operators of the encoder's layers at BERT's shapes: attention, LayerNorm, GELU; ours and other people's.

A case makes its inputs when it is run. A provider is a function of those inputs; one that cannot do a case (dropout,
lengths, not installed) is left out of it. U is the size of one (T, D) tensor in 2-byte numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from bench_harness import WIKIPEDIA_512, Work, importable, lengths_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bert_kernels.attention import attention, attention_reference
from bert_kernels.bias_gelu import bias_gelu
from bert_kernels.layer_norm import dropout_add_layer_norm, layer_norm

DTYPE = torch.bfloat16
EPS = 1e-12


@dataclass(frozen=True)
class Inputs:
    """Arguments of a case's providers."""

    tensors: tuple[Tensor, ...]
    """Those that get gradients."""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One operator at one shape."""

    op: str
    shape: str
    make: Callable[[], Inputs]
    providers: dict[str, Callable[[Inputs], Any]]
    """What returns the output, one tensor or several that all get a gradient."""
    forward: Work
    backward: Work
    priority: int = 1
    """Cases of a small number are timed first."""
    differentiable: bool = True


def compiled(function: Callable[..., Any], *, dry_run: bool) -> Callable[..., Any]:
    """Return torch.compile of a function; in a dry run without its slow back end."""
    return torch.compile(function, backend="eager" if dry_run else "inductor")


def random(*shape: int, device: torch.device, dtype: torch.dtype = DTYPE) -> Tensor:
    """Return normal numbers that need a gradient."""
    return torch.randn(*shape, device=device).to(dtype).requires_grad_()


def attention_cases(device: torch.device, *, dry_run: bool) -> Iterator[Case]:
    """Yield attention of 12 heads of 64 with and without dropout."""
    plain_compiled = compiled(_plain_attention, dry_run=dry_run)
    heads, head_dim = (2, 16) if dry_run else (12, 64)
    sizes = [(2, 16)] if dry_run else [(64, 128), (256, 128), (16, 512), (64, 512)]
    shapes = {f"N={n} S={s} H={heads} K={head_dim}": [s] * n for n, s in sizes}
    real = lengths_of(WIKIPEDIA_512, 2 if dry_run else 64)
    shapes[f"N={len(real)} wikipedia H={heads} K={head_dim}"] = [min(n, 20) for n in real] if dry_run else real
    for shape, lengths in shapes.items():
        for dropout_p in (0.0, 0.1):
            make = _attention_inputs(lengths, (heads, head_dim), dropout_p, device)
            providers = _attention_providers(lengths, dropout_p, plain_compiled)
            size, lse = 2.0 * sum(lengths) * heads * head_dim, 4.0 * sum(lengths) * heads
            flops = 4.0 * sum(length * length for length in lengths) * heads * head_dim
            work = Work(4 * size + lse, flops), Work(8 * size + lse, 2.5 * flops)
            yield Case("attention", f"{shape} p={dropout_p}", make, providers, *work, priority=int(max(lengths) < 512))


def _attention_inputs(
    lengths: list[int], heads_and_dim: tuple[int, int], dropout_p: float, device: torch.device
) -> Callable[[], Inputs]:
    def make() -> Inputs:
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        extra = {"cu_seqlens": bounds, "longest": max(lengths), "dropout_p": dropout_p, "num_sequences": len(lengths)}
        extra["seed"] = torch.tensor([7], device=device)
        return Inputs((random(sum(lengths), 3, *heads_and_dim, device=device),), extra)

    return make


def _attention_providers(
    lengths: list[int], dropout_p: float, plain_compiled: Callable[..., Tensor]
) -> dict[str, Callable[[Inputs], Any]]:
    providers: dict[str, Callable[[Inputs], Any]] = {
        "ours": lambda x: _packed(attention, x),
        "torch eager": lambda x: _packed(attention_reference, x),
    }
    if len(set(lengths)) == 1:
        kinds = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        kinds |= {"efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
        providers |= {f"sdpa {name}": _sdpa(kind) for name, kind in kinds.items()}
        providers["torch compile"] = lambda x: plain_compiled(
            x.tensors[0], x.extra["num_sequences"], x.extra["dropout_p"]
        )
    varlen, flash = importable("torch.nn.attention.varlen"), importable("flash_attn")
    if varlen is not None and dropout_p == 0.0:
        providers["torch varlen"] = lambda x: varlen.varlen_attn(
            *x.tensors[0].unbind(1), *[x.extra["cu_seqlens"]] * 2, *[x.extra["longest"]] * 2
        )
    if flash is not None:
        providers["flash-attn"] = lambda x: flash.flash_attn_varlen_qkvpacked_func(
            x.tensors[0], x.extra["cu_seqlens"], x.extra["longest"], dropout_p=dropout_p
        )
    return providers


def _packed(op: Callable[..., Tensor], x: Inputs) -> Tensor:
    options = {"dropout_p": x.extra["dropout_p"], "dropout_seed": x.extra["seed"]}
    return op(x.tensors[0], x.extra["cu_seqlens"], x.extra["longest"], **options)


def _heads_first(qkv_T3HK: Tensor, num_sequences: int) -> tuple[Tensor, ...]:
    """Return q, k and v (N, H, S, K) of sequences of one length."""
    return qkv_T3HK.unflatten(0, (num_sequences, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _plain_attention(qkv_T3HK: Tensor, num_sequences: int, dropout_p: float) -> Tensor:
    q, k, v = _heads_first(qkv_T3HK, num_sequences)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return F.dropout(torch.softmax(scores.float(), dim=-1).to(v.dtype), dropout_p) @ v


def _sdpa(kind: SDPBackend) -> Callable[[Inputs], Tensor]:
    def call(x: Inputs) -> Tensor:
        with sdpa_kernel(kind):
            q, k, v = _heads_first(x.tensors[0], x.extra["num_sequences"])
            return F.scaled_dot_product_attention(q, k, v, dropout_p=x.extra["dropout_p"])

    return call


def layer_norm_cases(device: torch.device, *, dry_run: bool) -> Iterator[Case]:
    """Yield plain LayerNorm, and LayerNorm(residual + dropout(x + bias))."""
    plain_compiled = compiled(_plain_layer_norm, dry_run=dry_run)
    fused_compiled = compiled(_plain_dropout_add_layer_norm, dry_run=dry_run)
    liger = importable("liger_kernel.ops.layer_norm")
    apex = importable("apex.normalization")
    for num_tokens, width in token_shapes(dry_run):
        size, shape = 2.0 * num_tokens * width, f"T={num_tokens} D={width}"

        def make(num_tokens: int = num_tokens, width: int = width) -> Inputs:
            rows = (random(num_tokens, width, device=device), random(num_tokens, width, device=device))
            vectors = (random(width, device=device) for _ in range(3))
            return Inputs((*rows, *vectors), {"seed": torch.tensor([7], device=device)})

        plain: dict[str, Callable[[Inputs], Any]] = {
            "ours": lambda x: layer_norm(x.tensors[0], *x.tensors[2:4], EPS),
            "torch eager": lambda x: _plain_layer_norm(x.tensors[0], *x.tensors[2:4]),
            "torch compile": lambda x: plain_compiled(x.tensors[0], *x.tensors[2:4]),
        }
        if liger is not None:
            plain["liger"] = lambda x: liger.LigerLayerNormFunction.apply(x.tensors[0], *x.tensors[2:4], EPS)
        if apex is not None:
            plain["apex"] = lambda x: apex.fused_layer_norm.fused_layer_norm_affine(
                x.tensors[0], *x.tensors[2:4], x.tensors[2].shape, EPS
            )
        priority = priority_of(num_tokens, width)
        yield Case("layer_norm", f"plain {shape}", make, plain, Work(2 * size, 0), Work(3 * size, 0), priority + 1)
        fused: dict[str, Callable[[Inputs], Any]] = {
            "ours": lambda x: dropout_add_layer_norm(
                *x.tensors[:4], EPS, x_bias_D=x.tensors[4], dropout_p=0.1, dropout_seed=x.extra["seed"]
            ),
            "torch eager": lambda x: _plain_dropout_add_layer_norm(*x.tensors),
            "torch compile": lambda x: fused_compiled(*x.tensors),
        }
        work = Work(3 * size, 0), Work(5 * size, 0)
        yield Case("layer_norm", f"dropout_add p=0.1 {shape}", make, fused, *work, priority)

        def make_wide(make: Callable[[], Inputs] = make) -> Inputs:
            x, *others = make().tensors
            others = [tensor.detach().float().requires_grad_() for tensor in others]
            return Inputs((x, *others), {"seed": torch.tensor([7], device=device)})

        # Residual, output and their gradients have twice the bytes, x and its gradient have not.
        work = Work(5 * size, 0), Work(8 * size, 0)
        yield Case("layer_norm", f"dropout_add autocast p=0.1 {shape}", make_wide, fused, *work, priority + 1)


def token_shapes(dry_run: bool) -> list[tuple[int, int]]:
    """Return (tokens, hidden size) of BERT-base and BERT-large."""
    if dry_run:
        return [(5, 32)]
    return [(num_tokens, width) for width in (768, 1024) for num_tokens in (2048, 8192, 32768, 65536)]


def priority_of(num_tokens: int, width: int) -> int:
    """BERT-large at the size that no cache holds comes first, then its usual size."""
    return {(32768, 1024): 0, (8192, 1024): 1}.get((num_tokens, width), 2)


def _plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def _plain_dropout_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
    return F.layer_norm(residual + F.dropout(x + x_bias.to(x.dtype), 0.1), weight.shape, weight, bias, EPS)


def bias_gelu_cases(device: torch.device, *, dry_run: bool) -> Iterator[Case]:
    """Yield gelu(x + bias) of the feed-forward layer's width, erf and tanh."""
    gelu_compiled = compiled(_plain_bias_gelu, dry_run=dry_run)
    for num_tokens, width in token_shapes(dry_run):
        for kind in ("none", "tanh"):

            def make(num_tokens: int = num_tokens, width: int = width) -> Inputs:
                return Inputs((random(num_tokens, 4 * width, device=device), random(4 * width, device=device)))

            providers: dict[str, Callable[[Inputs], Any]] = {
                "ours": lambda x, kind=kind: bias_gelu(*x.tensors, approximate=kind),
                "torch eager": lambda x, kind=kind: _plain_bias_gelu(*x.tensors, kind),
                "torch compile": lambda x, kind=kind: gelu_compiled(*x.tensors, kind),
            }
            size, shape = 8.0 * num_tokens * width, f"{kind} T={num_tokens} F={4 * width}"
            priority = priority_of(num_tokens, width) + (kind == "tanh")
            yield Case("bias_gelu", shape, make, providers, Work(2 * size, 0), Work(3 * size, 0), priority)


def _plain_bias_gelu(x: Tensor, bias: Tensor, kind: str) -> Tensor:
    return F.gelu(x + bias, approximate=kind)
