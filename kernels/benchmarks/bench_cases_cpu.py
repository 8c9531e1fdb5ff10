"""What is worth timing on a CPU: the torch references, which training without a GPU runs on, beside plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from bench_cases import EPS, Case, Inputs, random
from bench_cases_ends import PADDED_VOCAB_SIZE, VOCAB_SIZE, lamb_cases
from bench_cases_pre_norm import THETA
from bench_harness import WIKIPEDIA_128, Work, lengths_of
from torch import Tensor

from bert_kernels.attention import attention_reference
from bert_kernels.bias_gelu import bias_gelu_reference
from bert_kernels.embedding import embedding_reference
from bert_kernels.geglu import geglu_reference
from bert_kernels.layer_norm import dropout_add_layer_norm_reference
from bert_kernels.mlm_cross_entropy import mlm_cross_entropy_reference
from bert_kernels.rotary import rotary_reference

_WIDTH, _ROWS = 768, 2048
_SIZE = 2.0 * _ROWS * _WIDTH


def _attention(device: torch.device, *, dry_run: bool) -> Iterator[Case]:
    lengths = [9, 5] if dry_run else lengths_of(WIKIPEDIA_128, 16)
    heads, head_dim, longest = (2, 16, 9) if dry_run else (12, 64, max(lengths))
    inside = torch.arange(longest) < torch.tensor(lengths)[:, None]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)

    def padded(x: Inputs) -> Tensor:
        qkv = x.tensors[0].new_zeros(len(lengths), longest, 3, heads, head_dim)
        qkv = qkv.masked_scatter(inside[:, :, None, None, None], x.tensors[0])
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=inside[:, None, None]).transpose(1, 2)[inside]

    providers: dict[str, Callable[[Inputs], Any]] = {
        "ours": lambda x: attention_reference(x.tensors[0], bounds, longest),
        "torch padded sdpa": padded,
    }
    size, flops = 2.0 * sum(lengths) * heads * head_dim, 4.0 * sum(n * n for n in lengths) * heads * head_dim
    shape = f"N={len(lengths)} wikipedia H={heads} K={head_dim}"
    make = lambda: Inputs((random(sum(lengths), 3, heads, head_dim, device=device),))  # noqa: E731
    yield Case("attention", shape, make, providers, Work(4 * size, flops), Work(8 * size, 2.5 * flops))


def _rotary(device: torch.device, *, dry_run: bool) -> Iterator[Case]:
    positions = torch.arange(_ROWS) % 512
    make = lambda: Inputs((random(_ROWS, 3, _WIDTH // 64, 64, device=device),))  # noqa: E731
    providers = {"ours": lambda x: rotary_reference(*x.tensors, positions, theta=THETA)}
    shape = f"T={_ROWS} H={_WIDTH // 64} K=64"
    yield Case("rotary", shape, make, providers, Work(4 * _SIZE, 0), Work(4 * _SIZE, 0))


def _layer_norm(device: torch.device, *, dry_run: bool) -> Iterator[Case]:
    seed = torch.tensor([7])
    providers: dict[str, Callable[[Inputs], Any]] = {
        "ours": lambda x: dropout_add_layer_norm_reference(
            *x.tensors[:4], EPS, x_bias_D=x.tensors[4], dropout_p=0.1, dropout_seed=seed
        ),
        "torch eager": lambda x: F.layer_norm(
            x.tensors[1] + F.dropout(x.tensors[0] + x.tensors[4], 0.1), (_WIDTH,), *x.tensors[2:4], EPS
        ),
    }

    def make() -> Inputs:
        rows = (random(_ROWS, _WIDTH, device=device) for _ in range(2))
        return Inputs((*rows, *(random(_WIDTH, device=device) for _ in range(3))))

    shape = f"dropout_add p=0.1 T={_ROWS} D={_WIDTH}"
    yield Case("layer_norm", shape, make, providers, Work(3 * _SIZE, 0), Work(5 * _SIZE, 0))


def _bias_gelu(device: torch.device, *, dry_run: bool) -> Iterator[Case]:
    make = lambda: Inputs((random(_ROWS, 4 * _WIDTH, device=device), random(4 * _WIDTH, device=device)))  # noqa: E731
    providers = {"ours": lambda x: bias_gelu_reference(*x.tensors)}
    yield Case("bias_gelu", f"T={_ROWS} F={4 * _WIDTH}", make, providers, Work(8 * _SIZE, 0), Work(12 * _SIZE, 0))


def _geglu(device: torch.device, *, dry_run: bool) -> Iterator[Case]:
    make = lambda: Inputs((random(_ROWS, 4 * _WIDTH, device=device),))  # noqa: E731
    providers = {"ours": lambda x: geglu_reference(*x.tensors)}
    yield Case("geglu", f"T={_ROWS} F={2 * _WIDTH}", make, providers, Work(6 * _SIZE, 0), Work(10 * _SIZE, 0))


def _mlm_cross_entropy(device: torch.device, *, dry_run: bool) -> Iterator[Case]:
    num_rows, vocab_size, padded = (5, 50, 56) if dry_run else (307, VOCAB_SIZE, PADDED_VOCAB_SIZE)

    def make() -> Inputs:
        tensors = (random(num_rows, _WIDTH, device=device), random(padded, _WIDTH, device=device))
        labels = torch.randint(vocab_size, (num_rows,))
        return Inputs((*tensors, random(padded, device=device)), {"labels": labels})

    providers: dict[str, Callable[[Inputs], Any]] = {
        "ours": lambda x: mlm_cross_entropy_reference(*x.tensors, x.extra["labels"], vocab_size=vocab_size)[0],
        "torch eager": lambda x: F.cross_entropy(F.linear(*x.tensors).float(), x.extra["labels"], reduction="sum"),
    }
    size, table = float(num_rows * padded * _WIDTH), 2.0 * (num_rows + padded) * _WIDTH
    work = Work(table, 2 * size), Work(2 * table, 4 * size)
    yield Case("mlm_cross_entropy", f"P={num_rows} V={padded} D={_WIDTH}", make, providers, *work)


def _embedding(device: torch.device, *, dry_run: bool) -> Iterator[Case]:
    num_words, positions = (50, torch.arange(_ROWS) % 16) if dry_run else (PADDED_VOCAB_SIZE, torch.arange(_ROWS) % 512)

    def make() -> Inputs:
        tables = (random(rows, _WIDTH, device=device) for rows in (num_words, 512, 2))
        words = torch.randint(num_words, (_ROWS,))
        return Inputs((*tables, *(random(_WIDTH, device=device) for _ in range(2))), {"words": words})

    def plain(x: Inputs) -> Tensor:
        word, position, type_, *affine = x.tensors
        rows = F.embedding(x.extra["words"], word) + F.embedding(positions, position) + type_[0]
        return F.layer_norm(rows, (_WIDTH,), *affine, EPS)

    providers: dict[str, Callable[[Inputs], Any]] = {
        "ours": lambda x: embedding_reference(x.extra["words"], positions * 0, positions, *x.tensors, EPS),
        "torch eager": plain,
    }
    yield Case("embedding", f"T={_ROWS} D={_WIDTH}", make, providers, Work(2 * _SIZE, 0), Work(3 * _SIZE, 0))


def _lamb(device: torch.device, *, dry_run: bool) -> Iterator[Case]:
    for case in lamb_cases(device, dry_run=dry_run):
        if "BERT-large" not in case.shape:
            yield Case(
                "lamb", case.shape, case.make, {"ours": case.providers["torch eager"]}, case.forward, case.backward,
                differentiable=False,
            )  # fmt: skip


CPU_OPS = {
    "attention": (_attention,),
    "rotary": (_rotary,),
    "layer_norm": (_layer_norm,),
    "bias_gelu": (_bias_gelu,),
    "geglu": (_geglu,),
    "mlm_cross_entropy": (_mlm_cross_entropy,),
    "embedding": (_embedding,),
    "lamb": (_lamb,),
}
