"""The Triton geglu operator: in the interpreter without a CUDA device, on the device where there is one."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bert_kernels.geglu import geglu, geglu_reference
from bert_kernels.testing import assert_close_to_truth, poison_empty

# Infinite powers of two on the way to a limit are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What rounding alone may add where torch happens to be exact; dbias is a sum over all rows.
ATOL = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def out_and_gradients(op: Callable[..., Tensor], x: Tensor, bias: Tensor | None, approximate: str) -> dict[str, Tensor]:
    leaves = {"dx": x} if bias is None else {"dx": x, "dbias": bias}
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in leaves.items()}
    out = op(*leaves.values(), approximate=approximate)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    gradients = torch.autograd.grad(out, tuple(leaves.values()), dout)
    return {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))


def inputs(num_rows: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    x, bias = torch.randn(num_rows, 2 * width, generator=generator) * 2, torch.randn(2 * width, generator=generator)
    return x.to(DEVICE, dtype), bias.to(DEVICE, dtype)


def check_by_the_2x_rule(x: Tensor, bias: Tensor | None, approximate: str) -> None:
    with poison_empty():
        ours = out_and_gradients(geglu, x, bias, approximate)
    truth = out_and_gradients(geglu_reference, x.double(), None if bias is None else bias.double(), approximate)
    peer = out_and_gradients(geglu_reference, x, bias, approximate)
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        assert_close_to_truth(value, truth[name], peer[name], name=name, atol=ATOL[x.dtype])


def test_the_first_half_is_activated_and_the_second_one_gates() -> None:
    x = torch.tensor([[1.0, -2.0, 10.0, 3.0]], device=DEVICE)
    expected = torch.tensor([[0.8413447 * 10.0, -0.0455003 * 3.0]], device=DEVICE)
    torch.testing.assert_close(geglu(x), expected, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(geglu_reference(x), expected, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 2624), (17, 257), (5, 7), (8, 256)])
def test_output_and_gradients_are_as_near_to_the_truth_as_torch(
    num_rows: int, width: int, dtype: torch.dtype, approximate: str
) -> None:
    check_by_the_2x_rule(*inputs(num_rows, width, dtype), approximate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_layer_without_a_bias_is_as_near_to_the_truth_as_torch(dtype: torch.dtype) -> None:
    check_by_the_2x_rule(inputs(13, 40, dtype)[0], None, "none")


@pytest.mark.campaign
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 127, 768, 1024, 3072, 4096])
@pytest.mark.parametrize("num_rows", [3, 4, 5, 521])
def test_the_2x_rule_holds_over_the_whole_matrix(num_rows: int, width: int, dtype: torch.dtype) -> None:
    check_by_the_2x_rule(*inputs(num_rows, width, dtype), "none")


def test_more_row_blocks_than_programs_are_all_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("bert_kernels.geglu"), "BIAS_GELU_PROGRAMS", 2)
    check_by_the_2x_rule(*inputs(33, 8), "none")


def test_gradients_agree_with_finite_differences() -> None:
    x, bias = inputs(5, 7)
    generator = torch.Generator().manual_seed(3)
    steps = [torch.randn(tensor.shape, generator=generator).to(DEVICE) for tensor in (x, bias)]
    dout = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def value(size: float) -> float:
        moved = [tensor + size * step for tensor, step in zip((x, bias), steps, strict=True)]
        return float((geglu(*moved).double() * dout).sum())

    found = out_and_gradients(geglu, x, bias, "none")
    slope = sum(float((found[name] * step).sum()) for name, step in zip(("dx", "dbias"), steps, strict=True))
    assert (value(1e-2) - value(-1e-2)) / 2e-2 == pytest.approx(slope, rel=1e-3)


def test_large_inputs_give_the_limits_and_no_nan() -> None:
    x = torch.tensor([[-3e4, -50.0, 50.0, 3e4, 2.0, 2.0, 2.0, 2.0]], device=DEVICE, dtype=torch.float16)
    for approximate in ("none", "tanh"):
        results = out_and_gradients(geglu, x, None, approximate)
        assert results["out"].tolist() == [[0.0, 0.0, 100.0, 60000.0]]
        assert bool(torch.isfinite(results["dx"]).all())


def test_strided_inputs_gradients_and_no_rows_are_handled() -> None:
    x, bias = inputs(6, 40)
    strided = x.t().contiguous().t().requires_grad_()
    out = geglu(strided, bias)
    torch.testing.assert_close(out, geglu_reference(x, bias), atol=1e-6, rtol=1e-6)
    dout = torch.randn(40, 6, device=DEVICE).t()
    wanted = torch.autograd.grad(geglu_reference(leaf := x.clone().requires_grad_(), bias), leaf, dout)[0]
    torch.testing.assert_close(torch.autograd.grad(out, strided, dout)[0], wanted, atol=2e-6, rtol=2e-6)
    empty = out_and_gradients(geglu, x[:0], bias, "none")
    assert empty["out"].shape == (0, 40) and bool((empty["dbias"] == 0).all())


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_alone_is_what_it_is_with_the_other(wanted: int) -> None:
    x, bias = inputs(6, 40)
    every = out_and_gradients(geglu, x, bias, "none")
    alone = [x.clone(), bias.clone()]
    alone[wanted].requires_grad_()
    geglu(*alone).backward(torch.randn(6, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE))
    assert [tensor.grad is not None for tensor in alone] == [i == wanted for i in range(2)]
    assert torch.equal(alone[wanted].grad, every[("dx", "dbias")[wanted]])  # type: ignore[arg-type]


def test_it_compiles_without_a_graph_break() -> None:
    x, bias = inputs(3, 16)
    compiled = torch.compile(geglu, backend="aot_eager", fullgraph=True)
    eager, traced = (out_and_gradients(op, x, bias, "tanh") for op in (geglu, compiled))
    assert all(torch.equal(eager[name], traced[name]) for name in eager)


def test_what_the_kernel_cannot_do_is_refused_with_both_numbers() -> None:
    x, bias = inputs(3, 16)
    with pytest.raises(ValueError, match=r"bias_G must have shape \[32\], got \[31\]"):
        geglu(x, bias[:31])
    with pytest.raises(ValueError, match=r"even G, got \[3, 31\]"):
        geglu(x[:, :31])
    with pytest.raises(ValueError, match="float64"):
        geglu(x.double(), bias)
    with pytest.raises(ValueError, match=r"bias_G must be bfloat16, float16 or float32, got torch.int64"):
        geglu(x, bias.long())
    with pytest.raises(ValueError, match="'none' or 'tanh', got 'erf'"):
        geglu(x, bias, approximate="erf")  # type: ignore[arg-type]
