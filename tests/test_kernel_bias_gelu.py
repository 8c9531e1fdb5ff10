"""The Triton bias_gelu operator: in the interpreter without a CUDA device, on the device where there is one."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bert_kernels._tiles import Tile
from bert_kernels.bias_gelu import bias_gelu, bias_gelu_reference
from bert_kernels.testing import assert_close_to_truth, poison_empty

# Infinite powers of two on the way to a limit are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What rounding alone may add where torch happens to be exact; dbias is a sum over all rows.
ATOL = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def out_and_gradients(op: Callable[..., Tensor], x: Tensor, bias: Tensor, approximate: str) -> dict[str, Tensor]:
    x, bias = (tensor.detach().clone().requires_grad_() for tensor in (x, bias))
    out = op(x, bias, approximate=approximate)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    dx, dbias = torch.autograd.grad(out, (x, bias), dout)
    return {"out": out.detach(), "dx": dx, "dbias": dbias}


def inputs(num_rows: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    x, bias = torch.randn(num_rows, width, generator=generator) * 2, torch.randn(width, generator=generator)
    return x.to(DEVICE, dtype), bias.to(DEVICE, dtype)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 3072), (17, 257), (5, 7), (16, 256)])
def test_output_and_gradients_are_as_near_to_the_truth_as_torch(
    num_rows: int, width: int, dtype: torch.dtype, approximate: str
) -> None:
    x, bias = inputs(num_rows, width, dtype)
    with poison_empty():
        ours = out_and_gradients(bias_gelu, x, bias, approximate)
    truth = out_and_gradients(bias_gelu_reference, x.double(), bias.double(), approximate)
    peer = out_and_gradients(bias_gelu_reference, x, bias, approximate)
    for name, value in ours.items():
        assert_close_to_truth(value, truth[name], peer[name], name=name, atol=ATOL[dtype])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_tails_keep_their_relative_precision_in_16_bits(approximate: str) -> None:
    x = torch.linspace(-4.5, 4.5, 512, device=DEVICE, dtype=torch.float16)[None]
    bias = torch.zeros(512, device=DEVICE, dtype=torch.float16)
    truth = bias_gelu_reference(x.double(), bias.double(), approximate=approximate)  # type: ignore[arg-type]
    out = bias_gelu(x, bias, approximate=approximate)  # type: ignore[arg-type]
    torch.testing.assert_close(out.double(), truth, rtol=2e-3, atol=1e-7)


def test_large_inputs_give_the_limits_and_no_nan() -> None:
    x = torch.tensor([[-3e4, -50.0, 50.0, 3e4]], device=DEVICE, dtype=torch.float16)
    for approximate in ("none", "tanh"):
        results = out_and_gradients(bias_gelu, x, torch.zeros(4, device=DEVICE, dtype=torch.float16), approximate)
        assert results["out"].tolist() == [[0.0, 0.0, 50.0, 30000.0]]
        assert all(bool(torch.isfinite(tensor).all()) for tensor in results.values())


def test_more_row_blocks_than_programs_are_all_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows as a micro-batch of BERT, in fewer and larger blocks than a GPU would take, for the interpreter."""
    kernels = importlib.import_module("bert_kernels.bias_gelu")
    monkeypatch.setattr(kernels, "BIAS_GELU", {"default": ((1 << 62, Tile(64, 16, 1, 1)),)})
    monkeypatch.setattr(kernels, "BIAS_GELU_PROGRAMS", 40)
    x, bias = inputs(64 * 64 + 3, 8, torch.bfloat16)
    ours, peer = (out_and_gradients(op, x, bias, "none") for op in (bias_gelu, bias_gelu_reference))
    truth = out_and_gradients(bias_gelu_reference, x.double(), bias.double(), "none")
    for name, value in ours.items():
        assert_close_to_truth(value, truth[name], peer[name], name=name, atol=ATOL[torch.bfloat16])


def test_strided_inputs_and_no_rows_are_handled() -> None:
    x, bias = inputs(6, 40)
    strided = x.t().contiguous().t()
    torch.testing.assert_close(bias_gelu(strided, bias), bias_gelu_reference(x, bias), atol=1e-6, rtol=1e-6)
    empty = out_and_gradients(bias_gelu, x[:0], bias, "none")
    assert empty["out"].shape == (0, 40) and bool((empty["dbias"] == 0).all())


def test_gradients_agree_with_finite_differences() -> None:
    x, bias = inputs(5, 7)
    generator = torch.Generator().manual_seed(3)
    steps = [torch.randn(tensor.shape, generator=generator).to(DEVICE) for tensor in (x, bias)]
    dout = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def value(size: float) -> float:
        moved = [tensor + size * step for tensor, step in zip((x, bias), steps, strict=True)]
        return float((bias_gelu(*moved).double() * dout).sum())

    found = out_and_gradients(bias_gelu, x, bias, "none")
    slope = sum(float((found[name] * step).sum()) for name, step in zip(("dx", "dbias"), steps, strict=True))
    assert (value(1e-2) - value(-1e-2)) / 2e-2 == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_alone_is_what_it_is_with_the_other(wanted: int) -> None:
    x, bias = inputs(6, 40)
    every = out_and_gradients(bias_gelu, x, bias, "none")
    alone = [x.clone(), bias.clone()]
    alone[wanted].requires_grad_()
    bias_gelu(*alone).backward(torch.randn(6, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE))
    assert [tensor.grad is not None for tensor in alone] == [i == wanted for i in range(2)]
    assert torch.equal(alone[wanted].grad, every[("dx", "dbias")[wanted]])  # type: ignore[arg-type]


def test_it_compiles_without_a_graph_break() -> None:
    x, bias = inputs(3, 16)
    compiled = torch.compile(bias_gelu, backend="aot_eager", fullgraph=True)
    eager, traced = (out_and_gradients(op, x, bias, "tanh") for op in (bias_gelu, compiled))
    assert all(torch.equal(eager[name], traced[name]) for name in eager)


def test_what_the_kernel_cannot_do_is_refused_with_both_numbers() -> None:
    x, bias = inputs(3, 16)
    with pytest.raises(ValueError, match=r"\[3, 16\] and \[15\]"):
        bias_gelu(x, bias[:15])
    with pytest.raises(ValueError, match="float64"):
        bias_gelu(x.double(), bias)
    with pytest.raises(ValueError, match=r"bias_F must be bfloat16, float16 or float32, got torch.int64"):
        bias_gelu(x, bias.long())
    with pytest.raises(ValueError, match="'none' or 'tanh', got 'erf'"):
        bias_gelu(x, bias, approximate="erf")  # type: ignore[arg-type]
