"""Every operator of bert_kernels, forward and backward, passes torch's own checks of schema, fake and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bert_kernels import attention, bias_gelu, embedding, geglu, layer_norm, mlm_cross_entropy, rotary
from bert_kernels.flat_shard import LambScalars, Segment, SegmentTable
from bert_kernels.lamb_kernels import chunk_table, hyper_of_step

DIRECT = {
    "attention": attention._attention,
    "rotary": rotary._rotary,
    "layer_norm": layer_norm._layer_norm,
    "bias_gelu": bias_gelu._bias_gelu,
    "geglu": geglu._geglu,
    "mlm_cross_entropy": mlm_cross_entropy._mlm_cross_entropy,
    "embedding": embedding._embedding,
}
"""How the public functions call the operators that have a gradient."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED = torch.tensor([0x1234567_89ABCDEF], device=DEVICE)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE)


def grown(*shape: int) -> Tensor:
    return normal(*shape).requires_grad_()


def half(leaf: Tensor) -> Tensor:
    """A leaf of the same numbers in fp16."""
    return leaf.detach().half().requires_grad_()


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
            (half(grown(3, 16)), grown(3, 16), grown(16), None, None, 1e-5, 0.0, None, 0, False),
        ],
        "layer_norm_backward": [
            (*(normal(3, 16), normal(3, 16), normal(16), True, normal(16), 0.3, SEED, 5), *row_gradients(), None),
            (*(normal(3, 16), None, normal(16), False, normal(16), 0.3, SEED, 5), *row_gradients(), normal(3, 16)),
            (*(normal(3, 16), None, normal(16), False, None, 0.0, None, 0), *row_gradients(), None),
            (*(normal(3, 16).half(), normal(3, 16), normal(16), False, None, 0.0, None, 0), *row_gradients(), None),
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


def results_of(call: Callable[..., Any], name: str) -> list[Tensor]:
    """Return the outputs of an operator's first sample, and the gradients."""
    arguments = sample_arguments()[name][0]
    found = call(*arguments)
    outs = [out for out in (found if isinstance(found, tuple) else (found,)) if out.requires_grad]
    leaves = [each for each in arguments if isinstance(each, Tensor) and each.requires_grad]
    return [*outs, *torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])]


def results_and_library_calls(call: Callable[..., Any], name: str) -> tuple[list[Tensor], set[str]]:
    """Return the same, and the registered operators that torch's profiler sees meanwhile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        results = results_of(call, name)
    return results, {event.name for event in profile.events() if event.name.startswith("bert_kernels::")}


@pytest.mark.parametrize("name", DIRECT)
def test_eager_code_calls_the_kernels_without_the_library_and_a_mode_sees_the_operators(name: str) -> None:
    direct, calls = results_and_library_calls(DIRECT[name], name)
    assert calls == set()
    registered, calls = results_and_library_calls(getattr(torch.ops.bert_kernels, name).default, name)
    assert f"bert_kernels::{name}" in calls
    with Seen() as seen:
        watched = results_of(DIRECT[name], name)
    assert f"bert_kernels.{name}.default" in seen.names
    for others in (registered, watched):
        assert all(torch.equal(a, b) for a, b in zip(direct, others, strict=True))


class Seen(TorchDispatchMode):
    """Writes down what torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_a_gradient_of_a_gradient_is_refused_and_not_left_out() -> None:
    x, bias = grown(3, 16), grown(16)
    y = bias_gelu.bias_gelu(x, bias)
    with pytest.raises(RuntimeError, match="autograd"):
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        torch.autograd.grad(dx.sum(), x)
