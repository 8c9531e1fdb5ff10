"""The Triton LayerNorm operators: in the interpreter without a CUDA device, on the device where there is one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bert_kernels._tiles import Tile
from bert_kernels.dropout_mask import keep_mask_reference
from bert_kernels.layer_norm import (
    dropout_add_layer_norm,
    dropout_add_layer_norm_reference,
    dropout_add_then_norm,
    dropout_add_then_norm_reference,
    layer_norm,
    layer_norm_reference,
)
from bert_kernels.testing import assert_close_to_truth, poison_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = torch.tensor([0x1234567_89ABCDEF], device=DEVICE)
NAMES = ("x", "residual", "weight", "bias", "x_bias")
# What rounding alone may add where torch happens to be exact; dweight and dbias are sums over all rows.
ATOL = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def inputs(num_rows: int, width: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(width)
    shapes = ((num_rows, width), (num_rows, width), (width,), (width,), (width,))
    tensors = {n: torch.randn(s, generator=generator).to(DEVICE, dtype) for n, s in zip(NAMES, shapes, strict=True)}
    # A common offset of all columns: a variance computed as E[z^2] - E[z]^2 would cancel.
    return tensors | {"residual": tensors["residual"] + 30}


def fused(
    op: Callable[..., Any], dropout_p: float, has_x_bias: bool = True, has_bias: bool = True
) -> Callable[..., Any]:
    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Any:
        options = {"dropout_p": dropout_p, "dropout_seed": SEED, "site": 5}
        x_bias_D = x_bias if has_x_bias else None
        return op(x, residual, weight, bias if has_bias else None, 1e-5, x_bias_D=x_bias_D, **options)

    return call


def plain(op: Callable[..., Tensor], has_bias: bool = True) -> Callable[..., Tensor]:
    return lambda x, residual, weight, bias, x_bias: op(x, weight, bias if has_bias else None, 1e-5)


def out_and_gradients(op: Callable[..., Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what an operator gives, one tensor or (normalised, sum), and all gradients of all it gives."""
    leaves = [tensors[name].detach().clone().requires_grad_() for name in NAMES]
    out = op(*leaves)
    outs = dict(zip(("out", "sum"), out if isinstance(out, tuple) else (out,), strict=False))
    generator = torch.Generator().manual_seed(1)
    douts = [torch.randn(tensor.shape, generator=generator).to(tensor) for tensor in outs.values()]
    gradients = torch.autograd.grad(tuple(outs.values()), leaves, douts, allow_unused=True)
    found = {name: tensor.detach() for name, tensor in outs.items()}
    return found | {f"d{n}": g for n, g in zip(NAMES, gradients, strict=True) if g is not None}


def check_by_the_2x_rule(kernel: Callable, reference: Callable, tensors: dict[str, Tensor]) -> None:
    with poison_empty():
        ours = out_and_gradients(kernel, tensors)
    truth = out_and_gradients(reference, {name: tensor.double() for name, tensor in tensors.items()})
    peer = out_and_gradients(reference, tensors)
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        assert_close_to_truth(value, truth[name], peer[name], name=name, atol=ATOL[value.dtype])


@pytest.mark.parametrize(
    ("num_rows", "width", "dropout_p", "dtype"),
    [
        (1, 768, 0.1, torch.float32),
        (1, 768, 0.0, torch.bfloat16),
        (13, 256, 0.1, torch.float16),
        (13, 256, 0.0, torch.float32),
        (5, 1024, 0.1, torch.bfloat16),
        (5, 1024, 0.0, torch.float16),
        (3, 7, 0.1, torch.float16),
        (3, 7, 0.0, torch.bfloat16),
        (2, 4096, 0.1, torch.float32),
    ],
)
def test_the_fused_operator_is_as_near_to_the_truth_as_torch(
    num_rows: int, width: int, dropout_p: float, dtype: torch.dtype
) -> None:
    kernel, reference = (fused(op, dropout_p) for op in (dropout_add_layer_norm, dropout_add_layer_norm_reference))
    check_by_the_2x_rule(kernel, reference, inputs(num_rows, width, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_plain_operator_is_as_near_to_the_truth_as_torch(dtype: torch.dtype) -> None:
    check_by_the_2x_rule(plain(layer_norm), plain(layer_norm_reference), inputs(13, 768, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_bias_there_is_a_gradient_of_the_weight_alone(dtype: torch.dtype) -> None:
    tensors = inputs(13, 40, dtype)
    for kernel, reference in (
        (plain(layer_norm, False), plain(layer_norm_reference, False)),
        (
            fused(dropout_add_layer_norm, 0.1, has_bias=False),
            fused(dropout_add_layer_norm_reference, 0.1, has_bias=False),
        ),
    ):
        check_by_the_2x_rule(kernel, reference, tensors)
        assert "dbias" not in out_and_gradients(kernel, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_biases", [False, True], ids=["weight only", "biases"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_the_operator_that_returns_the_sum_is_as_near_to_the_truth_as_torch(
    dropout_p: float, has_biases: bool, dtype: torch.dtype
) -> None:
    ops = (dropout_add_then_norm, dropout_add_then_norm_reference)
    kernel, reference = (fused(op, dropout_p, has_biases, has_biases) for op in ops)
    check_by_the_2x_rule(kernel, reference, inputs(7, 72, dtype))


@pytest.mark.parametrize("op", [dropout_add_then_norm, dropout_add_then_norm_reference])
def test_what_is_normalised_is_the_sum_as_the_next_layer_reads_it(op: Callable[..., Any]) -> None:
    x, residual, weight, bias, _ = inputs(6, 40, torch.bfloat16).values()
    y, z = op(x, residual, weight, bias, 1e-5)
    assert torch.equal(z, x + residual)
    truth = layer_norm_reference(z.double(), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(y.double(), truth, atol=1e-2, rtol=4e-3)


def test_each_of_the_two_outputs_has_its_own_gradient() -> None:
    def alone(op: Callable[..., Any], which: int) -> Callable[..., Tensor]:
        return lambda *leaves: fused(op, 0.3)(*leaves)[which]

    tensors = inputs(5, 24)
    check_by_the_2x_rule(alone(dropout_add_then_norm, 0), alone(dropout_add_then_norm_reference, 0), tensors)
    of_sum, wanted = (
        out_and_gradients(alone(op, 1), tensors) for op in (dropout_add_then_norm, dropout_add_then_norm_reference)
    )
    for name, value in of_sum.items():
        torch.testing.assert_close(value, wanted.get(name, torch.zeros_like(value)))


def test_the_sums_mask_is_that_of_the_other_operator() -> None:
    tensors = inputs(9, 300)
    before, after = (fused(op, 0.3) for op in (dropout_add_layer_norm, dropout_add_then_norm))
    assert torch.equal(out_and_gradients(before, tensors)["out"], out_and_gradients(after, tensors)["out"])
    keep = keep_mask_reference(torch.arange(9, device=DEVICE), 300, dropout_p=0.3, dropout_seed=SEED, site=5)
    assert torch.equal(out_and_gradients(after, tensors)["dx"] != 0, keep)


def test_without_an_x_bias_the_mask_still_applies() -> None:
    kernel, reference = (fused(op, 0.3, False) for op in (dropout_add_layer_norm, dropout_add_layer_norm_reference))
    check_by_the_2x_rule(kernel, reference, inputs(6, 40))


def test_more_row_blocks_than_programs_are_all_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows as a micro-batch of BERT, in fewer and larger blocks than a GPU would take, for the interpreter."""
    kernels = importlib.import_module("bert_kernels.layer_norm_kernels")
    monkeypatch.setattr(kernels, "LAYER_NORM", {"default": ((1 << 62, Tile(64, 40, 1, 1)),)})
    kernel, reference = (fused(op, 0.1) for op in (dropout_add_layer_norm, dropout_add_layer_norm_reference))
    check_by_the_2x_rule(kernel, reference, inputs(64 * 64 + 5, 8, torch.bfloat16))


def test_backward_drops_exactly_what_the_reference_drops() -> None:
    tensors = inputs(9, 300)
    gradients = out_and_gradients(fused(dropout_add_layer_norm, 0.3), tensors)
    keep = keep_mask_reference(torch.arange(9, device=DEVICE), 300, dropout_p=0.3, dropout_seed=SEED, site=5)
    assert torch.equal(gradients["dx"] != 0, keep)
    assert bool((gradients["dresidual"] != 0).all())


def test_gradients_agree_with_finite_differences() -> None:
    tensors = inputs(5, 12)
    tensors["residual"] = tensors["residual"] - 30
    generator = torch.Generator().manual_seed(3)
    steps = {name: torch.randn(tensor.shape, generator=generator).to(DEVICE) for name, tensor in tensors.items()}
    dout = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    op = fused(dropout_add_layer_norm, 0.3)

    def value(size: float) -> float:
        moved = [tensors[name] + size * steps[name] for name in NAMES]
        return float((op(*moved).double() * dout).sum())

    found = out_and_gradients(op, tensors)
    slope = sum(float((found[f"d{name}"] * steps[name]).sum()) for name in NAMES)
    assert (value(1e-3) - value(-1e-3)) / 2e-3 == pytest.approx(slope, rel=1e-2)


def test_a_weight_in_fp32_serves_inputs_in_16_bits() -> None:
    tensors = inputs(5, 64, torch.bfloat16)
    weight, bias = tensors["weight"].float(), tensors["bias"].float()
    out = layer_norm(tensors["x"], weight, bias, 1e-5)
    truth = layer_norm_reference(tensors["x"].float(), weight, bias, 1e-5)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), truth, atol=2e-2, rtol=8e-3)


def test_strided_inputs_and_gradients_are_read_right() -> None:
    tensors = inputs(6, 40)
    x = tensors["x"].t().contiguous().t().requires_grad_()
    out = layer_norm(x, tensors["weight"], tensors["bias"], 1e-5)
    out.sum().backward()
    torch.testing.assert_close(out, layer_norm_reference(x, tensors["weight"], tensors["bias"], 1e-5))
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("op", [dropout_add_layer_norm, dropout_add_then_norm])
def test_no_rows_give_no_output_and_zero_gradients(op: Callable[..., Any]) -> None:
    gradients = out_and_gradients(fused(op, 0.1), inputs(0, 64))
    assert gradients["out"].shape == (0, 64)
    assert all(bool((gradients[name] == 0).all()) for name in ("dweight", "dbias", "dx_bias"))


def test_only_the_gradients_asked_for_are_returned() -> None:
    tensors = inputs(3, 16)
    weight = tensors["weight"].requires_grad_()
    dropout_add_layer_norm(tensors["x"], tensors["residual"], weight, tensors["bias"], 1e-5).sum().backward()
    assert weight.grad is not None and tensors["x"].grad is None and tensors["bias"].grad is None


@pytest.mark.parametrize("kind", [dropout_add_layer_norm, dropout_add_then_norm])
def test_recomputation_under_checkpointing_draws_the_same_mask(kind: Callable[..., Any]) -> None:
    tensors = inputs(4, 48)
    op = fused(kind, 0.3)
    kept = out_and_gradients(op, tensors)
    again = out_and_gradients(lambda *leaves: checkpoint(op, *leaves, use_reentrant=False), tensors)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize("kind", [dropout_add_layer_norm, dropout_add_then_norm])
def test_it_compiles_without_a_graph_break(kind: Callable[..., Any]) -> None:
    op, tensors = fused(kind, 0.3, has_bias=kind is dropout_add_layer_norm), inputs(3, 16)
    eager = out_and_gradients(op, tensors)
    traced = out_and_gradients(torch.compile(op, backend="aot_eager", fullgraph=True), tensors)
    assert all(torch.equal(eager[name], traced[name]) for name in eager)


def test_what_the_kernels_cannot_do_is_refused_with_both_numbers() -> None:
    x, vector = torch.zeros(3, 16, device=DEVICE), torch.zeros(16, device=DEVICE)
    with pytest.raises(ValueError, match=r"\[1, 4096\], got \[3, 5000\]"):
        layer_norm(torch.zeros(3, 5000, device=DEVICE), vector, vector, 1e-5)
    with pytest.raises(ValueError, match=r"weight_D must be contiguous torch.float32 \[16\], got torch.float32 \[15\]"):
        layer_norm(x, vector[:15], vector, 1e-5)
    with pytest.raises(ValueError, match=r"residual_TD must be torch.float32 \[3, 16\] as x_TD, got torch.float32 \[2"):
        dropout_add_layer_norm(x, x[:2], vector, vector, 1e-5)
    with pytest.raises(ValueError, match=r"as x_TD, or the same in torch.float32, got torch.float16 \["):
        dropout_add_layer_norm(x.bfloat16(), x.half(), vector, vector, 1e-5)
    with pytest.raises(ValueError, match=r"must be torch.float32 \[3, 16\] as x_TD, got torch.bfloat16 \["):
        dropout_add_layer_norm(x, x.bfloat16(), vector, vector, 1e-5)
    with pytest.raises(ValueError, match=r"residual_TD must be torch.bfloat16 \[3, 16\] as x_TD, got torch.float32 \["):
        dropout_add_then_norm(x.bfloat16(), x, vector, vector, 1e-5)
    with pytest.raises(ValueError, match="dropout_seed is None"):
        dropout_add_layer_norm(x, x, vector, vector, 1e-5, dropout_p=0.1)
    with pytest.raises(
        ValueError, match=r"dropout_add_then_norm: x_bias_D must be contiguous torch.float32 \[16\], got"
    ):
        dropout_add_then_norm(x, x, vector, None, 1e-5, x_bias_D=vector.half())
