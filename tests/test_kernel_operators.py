"""Every operator of bert_kernels, forward and backward, passes torch's own checks of schema, fake and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bert_kernels import attention, bias_gelu, embedding, geglu, layer_norm, mlm_cross_entropy, rotary  # noqa: F401
from bert_kernels.flat_shard import LambScalars, Segment, SegmentTable
from bert_kernels.lamb_kernels import chunk_table, hyper_of_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED = torch.tensor([0x1234567_89ABCDEF], device=DEVICE)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE)


def grown(*shape: int) -> Tensor:
    return normal(*shape).requires_grad_()


def index(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def attention_arguments() -> tuple[Any, ...]:
    return torch.tensor([0, 5, 8], dtype=torch.int32, device=DEVICE), 5, 0.3, SEED, 2, 0.25, -1


def row_gradients() -> tuple[Tensor, Tensor, Tensor]:
    """Mean and rstd of three rows, and their gradient."""
    return normal(3), normal(3), normal(3, 16)


def lamb_arguments() -> tuple[list[Tensor], Any, Tensor]:
    table = SegmentTable((Segment(3, 61, 0, 0.01), Segment(64, 1, 1, 0.0)), num_elements=80, num_rows=2)
    hyper = hyper_of_step(LambScalars(0.9, 0.999, 0.1, 1e-6, 0.1, 0.001, True), 0.1, device=DEVICE)
    return [normal(80).abs() for _ in range(4)], chunk_table(table, DEVICE), hyper


def sample_arguments() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every operator, by name."""
    indices, tables = [index(3, 1, 4), index(0, 1, 2), index(0, 1, 1)], (grown(6, 8), grown(5, 8), grown(2, 8))
    flat = [table.detach() for table in tables]
    (param, grad, exp_avg, exp_avg_sq), chunks, hyper = lamb_arguments()
    lamb_table = (chunks.chunks_C5, chunks.decays_C)
    sums, ratios = torch.zeros(2, 2, dtype=torch.float64, device=DEVICE), torch.ones(2, device=DEVICE)
    return {
        "attention": [(grown(8, 3, 1, 16), *attention_arguments())],
        "attention_backward": [
            (normal(8, 3, 1, 16), *attention_arguments(), normal(8, 1, 16), normal(1, 8), normal(8, 1, 16))
        ],
        "layer_norm": [
            (grown(3, 16), grown(3, 16), grown(16), grown(16), grown(16), 1e-5, 0.3, SEED, 5, False),
            (grown(3, 16), grown(3, 16), grown(16), None, grown(16), 1e-5, 0.3, SEED, 5, True),
            (grown(3, 16), None, grown(16), None, None, 1e-5, 0.0, None, 0, False),
        ],
        "layer_norm_backward": [
            (*(normal(3, 16), normal(3, 16), normal(16), True, normal(16), 0.3, SEED, 5), *row_gradients(), None),
            (*(normal(3, 16), None, normal(16), False, normal(16), 0.3, SEED, 5), *row_gradients(), normal(3, 16)),
            (*(normal(3, 16), None, normal(16), False, None, 0.0, None, 0), *row_gradients(), None),
        ],
        "rotary": [(grown(3, 3, 2, 10), index(0, 1, 7), 1e4, False), (normal(3, 3, 2, 10), index(2, 0, 1), 1e4, True)],
        "bias_gelu": [(grown(3, 16), grown(16), "none")],
        "bias_gelu_backward": [(normal(3, 16), normal(16), normal(3, 16), "tanh")],
        "geglu": [(grown(3, 16), grown(16), "none"), (grown(3, 16), None, "tanh")],
        "geglu_backward": [
            (normal(3, 16), normal(16), normal(3, 8), "none"),
            (normal(3, 16), None, normal(3, 8), "none"),
        ],
        "mlm_cross_entropy": [(grown(3, 8), grown(12, 8), grown(12), index(2, -100, 8), 9, [True, True, True])],
        "embedding": [(indices, *tables, grown(8), grown(8), 1e-12, 0.3, SEED, 2)],
        "embedding_backward": [
            (indices, flat, normal(8), 0.3, SEED, 2, normal(3), normal(3), normal(3, 8), [True, False, True])
        ],
        "lamb_moments": [
            (param, grad, exp_avg, exp_avg_sq, *lamb_table, chunks.row_slots_R1, hyper, sums, chunks.num_slots, True)
        ],
        "lamb_apply": [(param, exp_avg, exp_avg_sq, param.bfloat16(), *lamb_table, hyper, ratios, True)],
    }


def test_the_samples_cover_every_registered_operator() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bert_kernels::")}
    assert {name.removeprefix("bert_kernels::") for name in registered} == set(sample_arguments())


@pytest.mark.parametrize("name", sample_arguments())
def test_an_operator_passes_torchs_own_checks(name: str) -> None:
    for arguments in sample_arguments()[name]:
        torch.library.opcheck(getattr(torch.ops.bert_kernels, name).default, arguments)
