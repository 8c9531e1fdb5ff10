"""Every kernel gives the same bits again and again: a race shows as a difference, on a GPU.

On a GPU each kernel runs a thousand times at BERT's sizes (`-m gpu`). The small sizes run anywhere, and under
compute-sanitizer with `make sanitize-gpu`; the interpreter computes in order, so there they only keep this file alive.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bert_kernels.attention import attention
from bert_kernels.bias_gelu import bias_gelu
from bert_kernels.embedding import embedding
from bert_kernels.flat_shard import FlatShard, LambScalars, Segment, SegmentTable
from bert_kernels.geglu import geglu
from bert_kernels.lamb_kernels import hyper_of_step, lamb_apply_triton, lamb_moments_triton
from bert_kernels.layer_norm import dropout_add_layer_norm, dropout_add_then_norm, layer_norm
from bert_kernels.mlm_cross_entropy import mlm_cross_entropy
from bert_kernels.rotary import rotary

# A window leaves some rows of a block without any key.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
OPTIONS = {"dropout_p": 0.1, "dropout_seed": torch.tensor([0x1234567_89ABCDEF], device=DEVICE)}
Run = Callable[[], tuple[Tensor, ...]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


def integers(limit: int, size: int) -> Tensor:
    return torch.randint(limit, (size,), generator=torch.Generator().manual_seed(limit)).to(DEVICE)


def differentiated(op: Callable[..., Tensor | tuple[Tensor, ...]], *tensors: Tensor) -> Run:
    """Return a function that gives the outputs and the gradients of all tensors."""
    leaves = [tensor.requires_grad_() for tensor in tensors]

    def outputs() -> tuple[Tensor, ...]:
        out = op(*leaves)
        return out if isinstance(out, tuple) else (out,)

    douts = [torch.randn_like(out) for out in outputs()]

    def run() -> tuple[Tensor, ...]:
        outs = outputs()
        return *(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, douts)

    return run


def attention_run(lengths: tuple[int, ...], heads: int, head_dim: int, window: int | None = None) -> Run:
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    qkv = normal(sum(lengths), 3, heads, head_dim)
    return differentiated(lambda x: attention(x, bounds, max(lengths), window=window, **OPTIONS), qkv)


def layer_norm_run(rows: int, width: int, *, wide: bool = False) -> Run:
    tensors = (normal(rows, width), normal(rows, width, seed=1), normal(width), normal(width, seed=1), normal(width))
    if wide:
        tensors = (tensors[0], *(tensor.float() for tensor in tensors[1:]))
    return differentiated(
        lambda x, z, w, b, c: dropout_add_layer_norm(x, z, w, b, 1e-5, x_bias_D=c, **OPTIONS), *tensors
    )


def pre_norm_run(rows: int, width: int) -> Run:
    tensors = normal(rows, width), normal(rows, width, seed=1), normal(width)
    return differentiated(lambda x, z, w: dropout_add_then_norm(x, z, w, None, 1e-5, **OPTIONS), *tensors)


def rotary_run(tokens: int, heads: int, head_dim: int) -> Run:
    positions = integers(8192, tokens)
    return differentiated(lambda x: rotary(x, positions, theta=1e4), normal(tokens, 3, heads, head_dim))


def plain_layer_norm_run(rows: int, width: int) -> Run:
    return differentiated(lambda x, w, b: layer_norm(x, w, b, 1e-5), normal(rows, width), normal(width), normal(width))


def loss_run(rows: int, vocab_size: int, padded: int, width: int) -> Run:
    labels = integers(vocab_size, rows)
    tensors = (normal(rows, width), normal(padded, width), normal(padded))
    return differentiated(lambda *x: mlm_cross_entropy(*x, labels, vocab_size=vocab_size)[0], *tensors)


def embedding_run(tokens: int, words: int, width: int) -> Run:
    indices = integers(words, tokens), integers(2, tokens), integers(20, tokens)
    indices[0][::2] = 3
    tensors = normal(words, width), normal(20, width), normal(2, width), normal(width), normal(width)
    return differentiated(lambda *x: embedding(*indices, *x, 1e-12, **OPTIONS), *tensors)


def lamb_run(tensors: int, size: int) -> Run:
    table = SegmentTable(tuple(Segment(i * size, size - 1, i, 0.01) for i in range(tensors)), tensors * size, tensors)
    param = normal(tensors * size).float()
    hyper = hyper_of_step(LambScalars(0.9, 0.999, 0.1, 1e-6, 0.1, 0.001, True), 0.1, device=DEVICE)

    def run() -> tuple[Tensor, ...]:
        shard = FlatShard(*(param.clone() for _ in range(3)), param.square(), table)
        sums, copy = torch.zeros(tensors, 2, dtype=torch.float64, device=DEVICE), torch.zeros_like(param, dtype=DTYPE)
        lamb_moments_triton(shard, hyper, sums_R2=sums)
        lamb_apply_triton(shard, hyper, ratios_R=sums.sum(1).float(), copy_E=copy)
        return *shard[:4], sums, copy

    return run


SMALL: dict[str, Callable[[], Run]] = {
    "attention, whole sequences": lambda: attention_run((13, 0, 64, 1), 2, 32),
    "attention, long sequences": lambda: attention_run((130, 0, 1), 1, 64),
    "attention, window": lambda: attention_run((130, 3), 1, 20, window=5),
    "dropout_add_layer_norm": lambda: layer_norm_run(13, 300),
    "dropout_add_layer_norm, autocast": lambda: layer_norm_run(13, 300, wide=True),
    "dropout_add_then_norm": lambda: pre_norm_run(13, 300),
    "layer_norm": lambda: plain_layer_norm_run(13, 300),
    "rotary": lambda: rotary_run(37, 2, 20),
    "bias_gelu": lambda: differentiated(bias_gelu, normal(17, 257), normal(257)),
    "geglu": lambda: differentiated(geglu, normal(17, 2 * 257), normal(2 * 257)),
    "mlm_cross_entropy, one block": lambda: loss_run(7, 37, 40, 16),
    "mlm_cross_entropy, two reads": lambda: loss_run(3, 33000, 33024, 16),
    "embedding": lambda: embedding_run(131 if DEVICE.type == "cuda" else 20, 50, 24),
    "lamb": lambda: lamb_run(2, 5000),
}
LARGE: dict[str, Callable[[], Run]] = {
    "attention, whole sequences": lambda: attention_run((128,) * 64, 12, 64),
    "attention, long sequences": lambda: attention_run((512,) * 16, 12, 64),
    "attention, many lengths": lambda: attention_run((511, 300, 129, 65, 0, 1), 12, 64),
    "attention, head dim 32": lambda: attention_run((512,) * 4, 12, 32),
    "attention, head dim 128": lambda: attention_run((512,) * 4, 12, 128),
    "attention, window": lambda: attention_run((512,) * 4, 12, 64, window=64),
    "dropout_add_layer_norm": lambda: layer_norm_run(8191, 768),
    "dropout_add_layer_norm, autocast": lambda: layer_norm_run(8191, 768, wide=True),
    "dropout_add_then_norm": lambda: pre_norm_run(8191, 1024),
    "layer_norm": lambda: plain_layer_norm_run(8191, 1024),
    "rotary": lambda: rotary_run(8191, 12, 64),
    "bias_gelu": lambda: differentiated(bias_gelu, normal(8191, 3072), normal(3072)),
    "geglu": lambda: differentiated(geglu, normal(8191, 2 * 2624), normal(2 * 2624)),
    "mlm_cross_entropy, one block": lambda: loss_run(1229, 30522, 30528, 768),
    "mlm_cross_entropy, two reads": lambda: loss_run(307, 119547, 119552, 768),
    "embedding": lambda: embedding_run(8192, 30522, 1024),
    "lamb": lambda: lamb_run(100, 300_000),
}


def check_bits(run: Run, times: int) -> None:
    first = run()
    for _ in range(times):
        assert all(torch.equal(bits_of(a), bits_of(b)) for a, b in zip(first, run(), strict=True))


def bits_of(tensor: Tensor) -> Tensor:
    """The bits of the numbers, in which a NaN equals itself and nothing else."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def test_a_nan_is_no_zero_and_equals_itself() -> None:
    answers = iter([math.nan, math.nan, 0.0, -0.0])
    check_bits(lambda: (torch.tensor([1.0, next(answers)]),), 1)
    with pytest.raises(AssertionError):
        check_bits(lambda: (torch.tensor([1.0, next(answers)]),), 1)


@pytest.mark.parametrize("name", SMALL)
def test_runs_at_small_sizes_give_the_same_bits(name: str) -> None:
    check_bits(SMALL[name](), 1 if DEVICE.type == "cuda" else 0)  # the interpreter computes in order


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="races show on a GPU only")
@pytest.mark.parametrize("name", LARGE)
def test_a_thousand_runs_at_berts_sizes_give_the_same_bits(name: str) -> None:
    check_bits(LARGE[name](), 1000)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="only a GPU is waited for")
@pytest.mark.parametrize("name", LARGE)
def test_no_operator_waits_for_the_gpu(name: str) -> None:
    run = LARGE[name]()
    # What is only made once, such as LAMB's table of chunks, is made now.
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
