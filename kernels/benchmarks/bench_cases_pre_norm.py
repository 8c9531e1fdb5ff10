"""The operators that ModernBERT and other layers which normalise first have beside BERT's; ours and other people's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from bench_cases import EPS, Case, Inputs, compiled, priority_of, random, token_shapes
from bench_harness import Work, importable
from torch import Tensor

from bert_kernels.geglu import geglu
from bert_kernels.layer_norm import dropout_add_then_norm
from bert_kernels.rotary import rotary, rotary_reference

THETA = 10_000.0


def rotary_cases(device: torch.device, *, dry_run: bool) -> Iterator[Case]:
    """Yield rotary positions of qkv with heads of 64, in sequences of 512."""
    turn_compiled = compiled(rotary_reference, dry_run=dry_run)
    for num_tokens, width in token_shapes(dry_run):
        head_dim = 16 if dry_run else 64

        def make(num_tokens: int = num_tokens, width: int = width, head_dim: int = head_dim) -> Inputs:
            qkv = random(num_tokens, 3, width // head_dim, head_dim, device=device)
            return Inputs((qkv,), {"positions": torch.arange(num_tokens, device=device) % 512})

        providers: dict[str, Callable[[Inputs], Any]] = {
            "ours": lambda x: rotary(x.tensors[0], x.extra["positions"], theta=THETA),
            "torch eager": lambda x: rotary_reference(x.tensors[0], x.extra["positions"], theta=THETA),
            "torch compile": lambda x: turn_compiled(x.tensors[0], x.extra["positions"], theta=THETA),
        }
        # Queries and keys have to move, values do not.
        work = Work(4 * 2.0 * num_tokens * width, 0)
        shape = f"T={num_tokens} H={width // head_dim} K={head_dim}"
        yield Case("rotary", shape, make, providers, work, work, priority_of(num_tokens, width))


def pre_norm_cases(device: torch.device, *, dry_run: bool) -> Iterator[Case]:
    """Yield LayerNorm(residual + x) with the sum returned and the weight alone, as between ModernBERT's blocks."""
    plain_compiled = compiled(_plain_add_then_norm, dry_run=dry_run)
    for num_tokens, width in token_shapes(dry_run):

        def make(num_tokens: int = num_tokens, width: int = width) -> Inputs:
            rows = (random(num_tokens, width, device=device) for _ in range(2))
            return Inputs((*rows, random(width, device=device)))

        providers: dict[str, Callable[[Inputs], Any]] = {
            "ours": lambda x: dropout_add_then_norm(*x.tensors, None, EPS),
            "torch eager": lambda x: _plain_add_then_norm(*x.tensors),
            "torch compile": lambda x: plain_compiled(*x.tensors),
        }
        work = Work(4 * 2.0 * num_tokens * width, 0)
        shape = f"add_then_norm T={num_tokens} D={width}"
        yield Case("layer_norm", shape, make, providers, work, work, priority_of(num_tokens, width))


def _plain_add_then_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    z = residual + x
    return F.layer_norm(z, weight.shape, weight, None, EPS), z


def geglu_cases(device: torch.device, *, dry_run: bool) -> Iterator[Case]:
    """Yield gelu(a) * b of ModernBERT-large's width, without a bias as it has none."""
    geglu_compiled = compiled(_plain_geglu, dry_run=dry_run)
    liger = importable("liger_kernel.ops.geglu")
    for num_tokens, width in [(5, 32)] if dry_run else [(8192, 2624), (32768, 2624)]:

        def make(num_tokens: int = num_tokens, width: int = width) -> Inputs:
            return Inputs((random(num_tokens, 2 * width, device=device),))

        providers: dict[str, Callable[[Inputs], Any]] = {
            "ours": lambda x: geglu(*x.tensors),
            "torch eager": lambda x: _plain_geglu(*x.tensors),
            "torch compile": lambda x: geglu_compiled(*x.tensors),
        }
        if liger is not None:
            # Liger's is the tanh form, of two tensors.
            providers["liger tanh"] = lambda x: liger.LigerGELUMulFunction.apply(*x.tensors[0].chunk(2, dim=-1))
        size = 2.0 * num_tokens * width
        yield Case("geglu", f"T={num_tokens} F={width}", make, providers, Work(3 * size, 0), Work(5 * size, 0), 2)


def _plain_geglu(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return F.gelu(a) * b
