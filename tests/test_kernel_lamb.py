"""The Triton kernels of LAMB against the torch reference over flat shards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bert_kernels import _launch, lamb_kernels
from bert_kernels._tiles import Tile
from bert_kernels.flat_shard import FlatShard, LambScalars, Segment, SegmentTable
from bert_kernels.lamb import lamb_apply, lamb_apply_reference, lamb_moments, lamb_moments_reference
from bert_kernels.lamb_kernels import (
    chunk_table,
    hyper_of_step,
    lamb_apply_triton,
    lamb_moments_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A whole chunk and its neighbours, one element, a prime, a gap before and after, two segments of row 0, no row 3.
TABLE = SegmentTable(
    (
        Segment(3, 61, 0, 0.01),
        Segment(64, 1, 1, 0.0),
        Segment(70, 300, 2, 0.01),
        Segment(400, 40, 0, 0.02),
        Segment(440, 64, 4, 0.0),
    ),
    num_elements=520,
    num_rows=5,
)
LR = 0.1


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk_table.cache_clear()
    monkeypatch.setattr(lamb_kernels, "LAMB", Tile(1, 64, 4, 1))
    yield
    chunk_table.cache_clear()


def scalars_of(step: int, *, decay_in_update: bool = True) -> LambScalars:
    return LambScalars(0.9, 0.999, 0.1, 1e-6, 1 - 0.9**step, 1 - 0.999**step, decay_in_update)


def shard_of(table: SegmentTable, *, grad_dtype: torch.dtype = torch.float32) -> FlatShard:
    """Return a shard whose padding is NaN, as uninitialised memory may be."""
    generator = torch.Generator().manual_seed(0)
    param, grad = (torch.randn(table.num_elements, generator=generator) for _ in range(2))
    moments = [torch.randn(table.num_elements, generator=generator) * 0.1]
    moments.append(torch.rand(table.num_elements, generator=generator) * 0.01)
    used = torch.zeros(table.num_elements, dtype=torch.bool)
    for segment in table.segments:
        used[segment.begin : segment.begin + segment.length] = True
    buffers = [torch.where(used, buffer, float("nan")).to(DEVICE) for buffer in (param, grad, *moments)]
    buffers[1] = buffers[1].to(grad_dtype)
    return FlatShard(*buffers, table)


def clone(shard: FlatShard, dtype: torch.dtype = torch.float32) -> FlatShard:
    return FlatShard(*(buffer.to(dtype, copy=True) for buffer in shard[:4]), shard.table)


def sums_for(table: SegmentTable) -> Tensor:
    return torch.zeros(table.num_rows, 2, dtype=torch.float64, device=DEVICE)


def ratios_of(sums_R2: Tensor) -> Tensor:
    weight, update = sums_R2.sqrt().unbind(1)
    return torch.where((weight > 0) & (update > 0), weight / update, 1.0).float()


def step_by_kernel(
    shard: FlatShard, hyper: Tensor, *, decay_in_update: bool = True, copy: Tensor | None = None
) -> Tensor:
    sums = sums_for(shard.table)
    lamb_moments_triton(shard, hyper, sums_R2=sums, decay_in_update=decay_in_update)
    lamb_apply_triton(shard, hyper, ratios_R=ratios_of(sums), copy_E=copy, decay_in_update=decay_in_update)
    return sums


def step_by_reference(shard: FlatShard, scalars: LambScalars) -> Tensor:
    sums = sums_for(shard.table)
    lamb_moments_reference(shard, scalars, sums_R2=sums)
    lamb_apply_reference(shard, scalars, ratios_R=ratios_of(sums), lr=LR)
    return sums


def assert_near(found: FlatShard, expected: FlatShard) -> None:
    for name, a, b in zip(("param", "grad", "exp_avg", "exp_avg_sq"), found[:4], expected[:4], strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=2e-6, atol=2e-7, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("decay_in_update", [True, False])
def test_three_steps_equal_the_reference_in_fp64(decay_in_update: bool) -> None:
    shard = shard_of(TABLE)
    truth = clone(shard, torch.float64)
    for step in (1, 2, 3):
        scalars = scalars_of(step, decay_in_update=decay_in_update)
        sums = step_by_kernel(
            shard, hyper_of_step(scalars, LR, device=shard.param_E.device), decay_in_update=decay_in_update
        )
        torch.testing.assert_close(sums, step_by_reference(truth, scalars), rtol=2e-6, atol=0.0)
        assert_near(shard, truth)


@pytest.mark.parametrize("decay_in_update", [True, False])
def test_the_setting_chooses_between_two_that_agree(decay_in_update: bool) -> None:
    scalars, shards = scalars_of(1, decay_in_update=decay_in_update), []
    for kernels in ("triton", "torch"):
        shard, sums = shard_of(TABLE), sums_for(TABLE)
        lamb_moments(shard, scalars, sums_R2=sums, kernels=kernels)
        lamb_apply(shard, scalars, ratios_R=ratios_of(sums), lr=LR, kernels=kernels)
        shards.append(shard)
    assert_near(*shards)
    with pytest.raises(ValueError, match='"apex", wanted "auto", "triton" or "torch"'):
        lamb_moments(shards[0], scalars, sums_R2=sums, kernels="apex")


def test_padding_is_neither_read_nor_written() -> None:
    shard = shard_of(TABLE)
    before = clone(shard)
    sums = step_by_kernel(shard, hyper_of_step(scalars_of(1), LR, device=shard.param_E.device))
    assert sums.isfinite().all()
    for buffer, old in zip(shard[:4], before[:4], strict=True):
        assert torch.equal(buffer.isnan(), old.isnan())


def test_shipped_chunks_give_what_small_ones_give(monkeypatch: pytest.MonkeyPatch) -> None:
    table = SegmentTable((Segment(5, 9000, 0, 0.01), Segment(9005, 17, 1, 0.0)), 9100, 2)
    small, shipped = shard_of(table), shard_of(table)
    hyper = hyper_of_step(scalars_of(1), LR, device=small.param_E.device)
    sums = step_by_kernel(small, hyper)
    chunk_table.cache_clear()
    monkeypatch.undo()
    torch.testing.assert_close(step_by_kernel(shipped, hyper), sums, rtol=1e-6, atol=0.0)
    assert_near(shipped, small)


def test_a_tensor_of_zeros_moves_by_the_plain_update() -> None:
    table = SegmentTable((Segment(0, 70, 0, 0.01),), 70, 1)
    shard = shard_of(table)
    shard.param_E.zero_()
    truth = clone(shard, torch.float64)
    sums = step_by_kernel(shard, hyper_of_step(scalars_of(1), LR, device=shard.param_E.device))
    step_by_reference(truth, scalars_of(1))
    assert sums[0, 0] == 0.0
    assert_near(shard, truth)


def test_sums_are_added_to_what_is_there() -> None:
    shard = shard_of(TABLE)
    sums = torch.ones(5, 2, dtype=torch.float64, device=DEVICE)
    again = clone(shard)
    hyper = hyper_of_step(scalars_of(1), LR, device=shard.param_E.device)
    lamb_moments_triton(shard, hyper, sums_R2=sums)
    alone = sums_for(TABLE)
    lamb_moments_triton(again, hyper, sums_R2=alone)
    assert torch.equal(sums, alone + 1.0)
    assert alone[3].tolist() == [0.0, 0.0]


def test_a_skipped_step_changes_nothing_even_with_infinite_gradients() -> None:
    shard = shard_of(TABLE)
    shard.grad_E.fill_(float("inf"))
    before = clone(shard)
    copy = torch.zeros(520, dtype=torch.bfloat16, device=DEVICE)
    hyper = hyper_of_step(scalars_of(1), LR, device=shard.param_E.device, skip=torch.ones(1, device=DEVICE))
    sums = step_by_kernel(shard, hyper, copy=copy)
    assert not sums.any() and not copy.any()
    for buffer, old in zip(shard[:4], before[:4], strict=True):
        assert torch.equal(buffer.nan_to_num(7.0), old.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_copy_is_the_rounded_weight_and_gradients_may_have_16_bits(dtype: torch.dtype) -> None:
    shard = shard_of(TABLE, grad_dtype=dtype)
    truth = clone(shard, torch.float64)
    copy = torch.full((520,), 7.0, dtype=dtype, device=DEVICE)
    step_by_kernel(shard, hyper_of_step(scalars_of(1), LR, device=shard.param_E.device), copy=copy)
    step_by_reference(truth, scalars_of(1))
    assert_near(shard, truth)
    used = ~shard.param_E.isnan()
    assert torch.equal(copy[used], shard.param_E[used].to(dtype))
    assert copy[~used].eq(7.0).all()


def test_what_the_kernels_cannot_do_is_refused_with_both_numbers() -> None:
    shard = shard_of(TABLE)
    hyper = hyper_of_step(scalars_of(1), LR, device=shard.param_E.device)
    with pytest.raises(ValueError, match=r"param_E must be contiguous \[520\], .*, got \[519\]"):
        lamb_moments_triton(shard._replace(param_E=shard.param_E[:-1]), hyper, sums_R2=sums_for(TABLE))
    with pytest.raises(ValueError, match=r"exp_avg_E must be torch.float32, got torch.float64"):
        lamb_moments_triton(shard._replace(exp_avg_E=shard.exp_avg_E.double()), hyper, sums_R2=sums_for(TABLE))
    with pytest.raises(ValueError, match=r"float64 \[5, 2\], got torch.float32 \[5, 2\]"):
        lamb_moments_triton(shard, hyper, sums_R2=sums_for(TABLE).float())
    with pytest.raises(ValueError, match=r"ratios_R must be contiguous torch.float32 \[5\], got .* \[4\]"):
        lamb_apply_triton(shard, hyper, ratios_R=torch.ones(4, device=DEVICE))
    with pytest.raises(ValueError, match=r"copy_E must be contiguous \[520\], got \[519\]"):
        lamb_apply_triton(shard, hyper, ratios_R=torch.ones(5, device=DEVICE), copy_E=torch.zeros(519, device=DEVICE))
    with pytest.raises(ValueError, match=r"copy_E must be torch.bfloat16 or torch.float16, got torch.float32"):
        lamb_apply_triton(shard, hyper, ratios_R=torch.ones(5, device=DEVICE), copy_E=torch.zeros(520, device=DEVICE))
    with pytest.raises(ValueError, match=r"hyper must be contiguous torch.float32 \[9\], got .* \[8\]"):
        lamb_apply_triton(shard, hyper[:-1], ratios_R=torch.ones(5, device=DEVICE))


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "INTERPRETING", False)
    shard = FlatShard(*(torch.zeros(8) for _ in range(4)), SegmentTable((Segment(0, 8, 0, 0.0),), 8, 1))
    hyper = hyper_of_step(scalars_of(1), LR, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        lamb_moments_triton(shard, hyper, sums_R2=torch.zeros(1, 2, dtype=torch.float64))
