"""dropout_add_layer_norm as autocast needs it: x in 16 bits, the residual stream and what comes out in fp32."""

from __future__ import annotations

import pytest
import torch
from test_kernel_layer_norm import DEVICE, SEED, check_by_the_2x_rule, fused, inputs, out_and_gradients
from torch import Tensor

from bert_kernels.layer_norm import dropout_add_layer_norm, dropout_add_layer_norm_reference
from bert_kernels.layer_norm_kernels import LayerNormCall, layer_norm_backward, layer_norm_forward


def autocast_inputs(num_rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """What autocast leads to: a linear layer's output in 16 bits, everything else in fp32."""
    tensors = inputs(num_rows, width)
    return tensors | {"x": tensors["x"].to(dtype)}


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("num_rows", "width", "dtype"), [(5, 768, torch.bfloat16), (3, 7, torch.bfloat16), (13, 256, torch.float16)]
)
def test_a_residual_stream_in_fp32_stays_so_beside_an_x_in_16_bits(
    num_rows: int, width: int, dtype: torch.dtype, dropout_p: float
) -> None:
    tensors = autocast_inputs(num_rows, width, dtype)
    for has_bias in (True, False):
        ops = (dropout_add_layer_norm, dropout_add_layer_norm_reference)
        kernel, reference = (fused(op, dropout_p, has_bias, has_bias) for op in ops)
        check_by_the_2x_rule(kernel, reference, tensors)
        for op in (kernel, reference):
            found = {name: value.dtype for name, value in out_and_gradients(op, tensors).items()}
            assert found.pop("dx") == dtype
            assert set(found.values()) == {torch.float32}


def test_the_mixed_operator_is_what_autocast_computes_to_the_last_digits_of_fp32() -> None:
    """Of x in bf16 and the same x in fp32 nothing may differ: no rounding of the stream, and dx is rounded once."""
    tensors = autocast_inputs(6, 40)
    exact = {name: tensor.float() for name, tensor in tensors.items()}
    for dropout_p in (0.0, 0.3):
        op = fused(dropout_add_layer_norm, dropout_p)
        mixed, wanted = out_and_gradients(op, tensors), out_and_gradients(op, exact)
        assert torch.equal(mixed.pop("dx"), wanted.pop("dx").bfloat16())
        assert all(torch.equal(mixed[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_the_kernel_writes_the_gradient_of_x_in_its_16_bits(dropout_p: float) -> None:
    """A gradient in fp32 would be converted by a launch of torch's own."""
    x, residual, weight, bias, _ = autocast_inputs(4, 16).values()
    call = LayerNormCall(x, residual, weight, None, dropout_p, SEED if dropout_p else None, 0)
    y, _, mean, rstd = layer_norm_forward(call, bias, 1e-5)
    dz, dx, _ = layer_norm_backward(call, (mean, rstd), torch.ones_like(y), has_bias=True)
    assert (dz.dtype, dx.dtype, dx.shape) == (torch.float32, torch.bfloat16, x.shape)


def test_plain_autocast_gives_the_same_numbers() -> None:
    """The block of transformers' BertSelfOutput under autocast, without dropout; its LayerNorm runs in fp32."""
    tensors = autocast_inputs(6, 40)
    x, residual, weight, bias, x_bias = tensors.values()
    with torch.autocast(DEVICE, torch.bfloat16):
        dense = torch.nn.functional.linear(x, torch.eye(40, device=DEVICE), x_bias)
        plain = torch.nn.functional.layer_norm(dense + residual, (40,), weight, bias, 1e-5)
    ours = dropout_add_layer_norm(x, residual, weight, bias, 1e-5, x_bias_D=x_bias)
    assert plain.dtype == ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain, atol=2e-2, rtol=0)
    torch.testing.assert_close(dropout_add_layer_norm(dense, residual, weight, bias, 1e-5), plain)


def test_it_compiles_without_a_graph_break() -> None:
    op, tensors = fused(dropout_add_layer_norm, 0.3), autocast_inputs(3, 16)
    eager = out_and_gradients(op, tensors)
    traced = out_and_gradients(torch.compile(op, backend="aot_eager", fullgraph=True), tensors)
    assert all(torch.equal(eager[name], traced[name]) for name in eager)
