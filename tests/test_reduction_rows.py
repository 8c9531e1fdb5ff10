"""Rows of a shard: norms, padding, parts of a tensor that are tensors of their own."""

from __future__ import annotations

import math

import pytest
import torch
from lamb_tensors import parameters
from torch import nn

from bert_ds.training.optimizers.elementwise_optimizers import StableAdamW
from bert_ds.training.optimizers.lamb import Lamb, Lans
from bert_kernels.flat_shard import FlatShard, LambScalars, Segment, SegmentTable
from bert_kernels.lamb import lamb_apply, lamb_moments, squared_norm


def test_the_norm_of_16_million_elements_is_exact_to_1e_7() -> None:
    torch.manual_seed(0)
    param = nn.Parameter(0.02 * torch.randn(16_000_000))
    truth = math.sqrt(sum(float((part.double() ** 2).sum()) for part in param.detach().split(100_000)))
    param.grad = torch.ones_like(param)
    optimizer = Lamb([("w", param)], lr=0.0)
    optimizer.step()
    assert abs(optimizer.trust_statistics()["w"].weight_norm / truth - 1) <= 1e-7


def test_a_square_sum_does_not_depend_on_how_a_tensor_is_cut() -> None:
    torch.manual_seed(0)
    x = torch.randn(300_001)
    parts = sum(float(squared_norm(part)) for part in x.split(12_345))
    assert abs(parts / float(squared_norm(x)) - 1) < 1e-12


SCALARS = LambScalars(0.9, 0.99, 0.1, 1e-6, 0.1, 0.01, True)


def shard(num_elements: int, segments: tuple[Segment, ...]) -> FlatShard:
    table = SegmentTable(segments, num_elements, num_rows=2)
    return FlatShard(*(torch.full((num_elements,), math.nan) for _ in range(4)), table)


def test_padding_is_neither_read_nor_written() -> None:
    flat = shard(11, (Segment(1, 3, 0, 0.1), Segment(6, 4, 1, 0.0)))
    for buffer in flat[:4]:
        buffer[1:4], buffer[6:10] = 1.0, 2.0
    sums = torch.zeros(2, 2, dtype=torch.float64)
    lamb_moments(flat, SCALARS, sums_R2=sums)
    lamb_apply(flat, SCALARS, ratios_R=torch.ones(2), lr=0.1)
    assert sums[:, 0].tolist() == [3.0, 16.0]
    is_padding = torch.tensor([True, False, False, False, True, True, False, False, False, False, True])
    assert all(torch.equal(buffer.isnan(), is_padding) for buffer in flat[:4])


def test_a_buffer_that_does_not_fit_the_segment_table_is_refused() -> None:
    flat = shard(11, (Segment(1, 3, 0, 0.1),))._replace(grad_E=torch.zeros(10))
    with pytest.raises(ValueError, match=r"grad has shape \(10,\), the segment table is for \(11,\)"):
        lamb_moments(flat, SCALARS, sums_R2=torch.zeros(2, 2, dtype=torch.float64))


def test_a_buffer_of_another_dtype_is_refused() -> None:
    flat = shard(4, (Segment(0, 4, 0, 0.1),))._replace(grad_E=torch.zeros(4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"grad is torch.bfloat16"):
        lamb_moments(flat, SCALARS, sums_R2=torch.zeros(2, 2, dtype=torch.float64))


def test_the_parts_of_a_tensor_are_stepped_like_tensors_of_their_own() -> None:
    torch.manual_seed(5)
    pieces = [torch.randn(4, 3) * scale for scale in (0.1, 1.0, 10.0)]
    grads = [torch.randn(4, 3) * scale for scale in (3.0, 1.0, 0.2)]
    separate = [(name, nn.Parameter(piece.clone())) for name, piece in zip("qkv", pieces, strict=True)]
    together = nn.Parameter(torch.cat(pieces))
    for optimizer_class in (Lamb, Lans, StableAdamW):
        apart, joined = optimizer_class(separate, lr=0.1), optimizer_class([("a.qkv_weight", together)], lr=0.1)
        joined.declare_parts({"*qkv_weight": ("query", "key", "value")})
        for _ in range(3):
            for (_, parameter), grad in zip(separate, grads, strict=True):
                parameter.grad = grad
            together.grad = torch.cat(grads)
            apart.step()
            joined.step()
        assert torch.equal(together, torch.cat([parameter for _, parameter in separate]))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"*typo": ("a", "b")}, "no parameter matches the part pattern '\\*typo'"),
        ({"scale": ("a", "b")}, "scale has 1 elements, not 2 equal parts"),
        ({"scale": ("a",), "sc*": ("a",)}, "scale matches the part patterns"),
    ],
)
def test_parts_that_a_model_does_not_have_are_refused(parts: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lamb(parameters(), lr=0.1).declare_parts(parts)
