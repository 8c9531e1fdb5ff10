"""The operators of the two ends of the model and of the optimizer: masked-LM loss, embedding, LAMB."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from bench_cases import DTYPE, EPS, Case, Inputs, compiled, random
from bench_harness import Work, importable
from torch import Tensor

from bert_kernels.embedding import embedding
from bert_kernels.flat_shard import FlatShard, LambScalars, Segment, SegmentTable
from bert_kernels.lamb import lamb_apply_reference, lamb_moments_reference
from bert_kernels.lamb_kernels import hyper_of_step, lamb_apply_triton, lamb_moments_triton
from bert_kernels.mlm_cross_entropy import mlm_cross_entropy

VOCAB_SIZE, PADDED_VOCAB_SIZE = 30522, 30528
_SCALARS = LambScalars(0.9, 0.999, 0.1, 1e-6, 0.1, 0.001, True)


def mlm_cross_entropy_cases(device: torch.device, *, dry_run: bool) -> Iterator[Case]:
    """Yield the masked-LM loss of 15 % of the tokens; other people's get the same gathered rows."""
    vocab_size, rows_of_table = (50, 56) if dry_run else (VOCAB_SIZE, PADDED_VOCAB_SIZE)
    plain_compiled = compiled(_plain_cross_entropy, dry_run=dry_run)
    liger = importable("liger_kernel.ops.fused_linear_cross_entropy")
    for num_rows, width in [(5, 16)] if dry_run else [(1228, 768), (1228, 1024), (4915, 1024), (9830, 1024)]:

        def make(num_rows: int = num_rows, width: int = width) -> Inputs:
            labels = torch.randint(vocab_size, (num_rows,), device=device)
            weight = (random(rows_of_table, width, device=device) * 0.02).detach().requires_grad_()
            tensors = (random(num_rows, width, device=device), weight, random(rows_of_table, device=device))
            return Inputs(tensors, {"labels": labels})

        providers: dict[str, Callable[[Inputs], Any]] = {
            "ours": lambda x: mlm_cross_entropy(*x.tensors, x.extra["labels"], vocab_size=vocab_size)[0],
            "torch eager": lambda x: _plain_cross_entropy(*x.tensors, x.extra["labels"]),
            "torch compile": lambda x: plain_compiled(*x.tensors, x.extra["labels"]),
            "gemms alone": lambda x: F.linear(*x.tensors),
        }
        if liger is not None:
            providers["liger"] = lambda x: liger.LigerFusedLinearCrossEntropyFunction.apply(
                *x.tensors[:2], x.extra["labels"], x.tensors[2]
            )[0]
        size = float(num_rows * rows_of_table * width)
        # Rows, table and their gradients; logits need not touch memory.
        tensors_bytes = 2.0 * (num_rows + rows_of_table) * width
        work = (Work(tensors_bytes, 2 * size), Work(2 * tensors_bytes, 4 * size))
        priority = int(num_rows != 4915)
        yield Case("mlm_cross_entropy", f"P={num_rows} V={rows_of_table} D={width}", make, providers, *work, priority)


def _plain_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="sum")


def embedding_cases(device: torch.device, *, dry_run: bool) -> Iterator[Case]:
    """Yield the embedding layer with dropout; 12 % of the words are [MASK]."""
    num_words, num_positions = (50, 16) if dry_run else (PADDED_VOCAB_SIZE, 512)
    plain_compiled = compiled(_plain_embedding, dry_run=dry_run)
    for num_tokens, width in [(37, 16)] if dry_run else [(8192, 768), (8192, 1024), (65536, 1024)]:

        def make(num_tokens: int = num_tokens, width: int = width) -> Inputs:
            words = torch.randint(num_words, (num_tokens,), device=device)
            words[torch.rand(num_tokens, device=device) < 0.12] = 3
            positions = torch.arange(num_tokens, device=device) % num_positions
            tables = [random(rows, width, device=device) for rows in (num_words, num_positions, 2)]
            extra = {"words": words, "positions": positions, "types": (positions > num_positions // 2).long()}
            extra["seed"] = torch.tensor([7], device=device)
            return Inputs((*tables, random(width, device=device), random(width, device=device)), extra)

        providers: dict[str, Callable[[Inputs], Any]] = {
            "ours": lambda x: embedding(*_indices(x), *x.tensors, EPS, dropout_p=0.1, dropout_seed=x.extra["seed"]),
            "torch eager": lambda x: _plain_embedding(*_indices(x), *x.tensors),
            "torch compile": lambda x: plain_compiled(*_indices(x), *x.tensors),
        }
        size = 2.0 * num_tokens * width
        # Backward reads the gradient and the words' rows again and writes whole tables.
        tables_bytes = 2.0 * (num_words + num_positions + 2) * width
        yield Case(
            "embedding",
            f"T={num_tokens} D={width}",
            make,
            providers,
            Work(2 * size, 0),
            Work(2 * size + tables_bytes, 0),
        )


def _indices(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return x.extra["words"], x.extra["types"], x.extra["positions"]


def _plain_embedding(
    words: Tensor, types: Tensor, positions: Tensor, word: Tensor, position: Tensor, type_: Tensor, *affine: Tensor
) -> Tensor:
    x = F.embedding(words, word) + F.embedding(types, type_) + F.embedding(positions, position)
    return F.dropout(F.layer_norm(x, affine[0].shape, *affine, EPS), 0.1)


def bert_tensor_sizes(layers: int, width: int) -> list[int]:
    """Return the number of elements of every tensor of BERT with its pre-training heads."""
    vectors = [width] * 2
    layer = [3 * width * width, 3 * width, width * width, width, *vectors]
    layer += [4 * width * width, 4 * width, 4 * width * width, width, *vectors]
    ends = [PADDED_VOCAB_SIZE * width, 512 * width, 2 * width, *vectors]
    heads = [width * width, width, width * width, width, *vectors, PADDED_VOCAB_SIZE, 2 * width, 2]
    return ends + layer * layers + heads


def lamb_cases(device: torch.device, *, dry_run: bool) -> Iterator[Case]:
    """Yield a LAMB step over all tensors: bf16 gradients, fp32 state, a bf16 copy."""
    models = (
        {"tiny": [70, 5]}
        if dry_run
        else {"BERT-base": bert_tensor_sizes(12, 768), "BERT-large": bert_tensor_sizes(24, 1024)}
    )
    for name, sizes in models.items():
        providers: dict[str, Callable[[Inputs], Any]] = {"ours": _lamb_ours, "torch eager": _lamb_eager}
        apex, deepspeed = importable("apex.optimizers"), importable("deepspeed.ops.lamb")
        if apex is not None and hasattr(apex, "FusedLAMB") and not dry_run:
            providers["apex FusedLAMB"] = lambda x, apex=apex: x.extra["optimizer"](apex.FusedLAMB)
        if deepspeed is not None and not dry_run:
            providers["deepspeed FusedLamb"] = lambda x, deepspeed=deepspeed: x.extra["optimizer"](deepspeed.FusedLamb)
        work = Work(42.0 * sum(sizes), 0)
        make = _lamb_inputs(sizes, device)
        shape, priority = f"{name} E={sum(sizes)}", int(name != "BERT-large")
        yield Case("lamb", shape, make, providers, work, Work(0, 0), priority, differentiable=False)


def _lamb_inputs(sizes: list[int], device: torch.device) -> Callable[[], Inputs]:
    def make() -> Inputs:
        segments, begin = [], 0
        for row, size in enumerate(sizes):
            segments.append(Segment(begin, size, row, 0.01 if size > 4096 else 0.0))
            begin += size
        param, grad = torch.randn(begin, device=device), torch.randn(begin, device=device)
        table = SegmentTable(tuple(segments), begin, len(segments))
        shard = FlatShard(param, grad, torch.zeros_like(param), torch.zeros_like(param), table)
        hyper = hyper_of_step(_SCALARS, 1e-6, device=device)
        extra = {"shard": shard, "hyper": hyper, "copy": param.to(DTYPE), "grad": grad.to(DTYPE)}
        optimizers: dict[Any, Any] = {}

        def step_of(kind: Any) -> None:
            """Step somebody else's optimizer over the same tensors, fp32 with fp32 gradients."""
            if kind not in optimizers:
                tensors = [piece.clone().requires_grad_() for piece in param.split(sizes)]
                for tensor, piece in zip(tensors, grad.split(sizes), strict=True):
                    tensor.grad = piece.clone()
                optimizers[kind] = kind(tensors, lr=1e-6)
            optimizers[kind].step()

        return Inputs((), extra | {"optimizer": step_of})

    return make


def _lamb_ours(x: Inputs) -> None:
    shard = x.extra["shard"]._replace(grad_E=x.extra["grad"])
    sums = torch.zeros(shard.table.num_rows, 2, dtype=torch.float64, device=shard.param_E.device)
    lamb_moments_triton(shard, x.extra["hyper"], sums_R2=sums)
    lamb_apply_triton(shard, x.extra["hyper"], ratios_R=_ratios(sums), copy_E=x.extra["copy"])


def _lamb_eager(x: Inputs) -> None:
    shard = x.extra["shard"]
    sums = torch.zeros(shard.table.num_rows, 2, dtype=torch.float64, device=shard.param_E.device)
    lamb_moments_reference(shard, _SCALARS, sums_R2=sums)
    lamb_apply_reference(shard, _SCALARS, ratios_R=_ratios(sums), lr=1e-6)
    x.extra["copy"].copy_(shard.param_E)


def _ratios(sums_R2: Tensor) -> Tensor:
    weight, update = sums_R2.sqrt().unbind(1)
    return torch.where((weight > 0) & (update > 0), weight / update, 1.0).float()
