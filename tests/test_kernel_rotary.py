"""Rotary positions: the reference against transformers, the Triton operator against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bert_kernels.rotary import rotary, rotary_reference
from bert_kernels.testing import assert_close_to_truth, poison_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THETA = 160_000.0
# Two sequences, the second one reaching as far as ModernBERT goes.
POSITIONS = torch.tensor([0, 1, 2, 0, 63, 511, 4097, 8191], device=DEVICE)
# What rounding alone may add where torch happens to be exact.
ATOL = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def out_and_gradient(
    op: Callable[..., Tensor], qkv: Tensor, positions: Tensor = POSITIONS, theta: float = 10_000.0
) -> dict[str, Tensor]:
    leaf = qkv.detach().clone().requires_grad_()
    out = op(leaf, positions, theta=theta)
    (gradient,) = torch.autograd.grad(out, leaf, normal(*qkv.shape, seed=1).to(out))
    return {"out": out.detach(), "dqkv": gradient}


@pytest.mark.parametrize("layer_type", ["full_attention", "sliding_attention"])
def test_the_reference_gives_the_bits_of_transformers_modernbert(layer_type: str) -> None:
    from transformers import ModernBertConfig
    from transformers.models.modernbert import modeling_modernbert as theirs

    config = ModernBertConfig(hidden_size=128, num_attention_heads=2)
    qkv = normal(8, 3, 2, 64).cpu()
    q, k, v = (part.transpose(0, 1)[None] for part in qkv.unbind(1))
    embedding = theirs.ModernBertRotaryEmbedding(config)
    angles = embedding(q, POSITIONS.cpu()[None], layer_type)
    q, k = theirs.apply_rotary_pos_emb(q, k, *angles)
    theta = {"full_attention": 160_000.0, "sliding_attention": 10_000.0}[layer_type]
    found = rotary_reference(qkv, POSITIONS.cpu(), theta=theta)
    assert torch.equal(found, torch.stack([part[0].transpose(0, 1) for part in (q, k, v)], dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 64), (1, 20), (1, 128)])
def test_output_and_gradient_are_as_near_to_the_truth_as_torch(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    qkv = normal(8, 3, heads, head_dim, dtype=dtype)
    with poison_empty():
        ours = out_and_gradient(rotary, qkv)
    truth, peer = out_and_gradient(rotary_reference, qkv.double()), out_and_gradient(rotary_reference, qkv)
    for name, value in ours.items():
        assert value.dtype == dtype
        assert_close_to_truth(value, truth[name], peer[name], name=name, atol=ATOL[dtype])
        assert torch.equal(value[:, 2], peer[name][:, 2]), "values are changed"


@pytest.mark.parametrize("theta", [10_000.0, THETA])
def test_all_frequencies_are_those_of_the_reference_far_from_the_start(theta: float) -> None:
    """A frequency off by one unit in its last place would turn position 8191 by 5e-4 too far."""
    positions = torch.arange(8192 - 40, 8192, device=DEVICE)
    qkv = normal(40, 3, 1, 64)
    difference = rotary(qkv, positions, theta=theta) - rotary_reference(qkv, positions, theta=theta)
    assert float(difference.abs().max()) < 2e-6


def test_the_score_of_two_tokens_depends_on_their_distance_alone() -> None:
    qkv = normal(1, 3, 1, 16).expand(8, 3, 1, 16)
    positions = torch.tensor([0, 3, 1, 4, 10, 13, 100, 103], device=DEVICE)
    q, k, _ = rotary(qkv, positions, theta=THETA).squeeze(2).unbind(1)
    scores = (q[1::2] * k[::2]).sum(1)
    torch.testing.assert_close(scores, scores[:1].expand(4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", [rotary, rotary_reference])
def test_the_argument_stays_as_it_is_and_backward_turns_back(op: Callable[..., Tensor]) -> None:
    qkv = normal(8, 3, 2, 16).requires_grad_()
    before = qkv.detach().clone()
    out = op(qkv, POSITIONS, theta=THETA)
    (back,) = torch.autograd.grad(out, qkv, out.detach())
    assert torch.equal(qkv, before)
    torch.testing.assert_close(back, before, rtol=1e-5, atol=1e-5)


def test_strided_inputs_and_no_tokens_are_handled() -> None:
    qkv = normal(2, 3, 8, 16).permute(2, 1, 0, 3)
    for found, wanted in zip(*(out_and_gradient(op, qkv).values() for op in (rotary, rotary_reference)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)
    for op in (rotary, rotary_reference):
        assert out_and_gradient(op, qkv[:0], POSITIONS[:0])["dqkv"].shape == (0, 3, 2, 16)


def test_compiled_and_recomputed_it_gives_the_bits_of_eager() -> None:
    qkv = normal(8, 3, 1, 16)
    for op in (rotary, rotary_reference):
        eager = out_and_gradient(op, qkv)
        traced = out_and_gradient(torch.compile(op, backend="aot_eager", fullgraph=True), qkv)
        again = out_and_gradient(
            lambda *x, op=op, theta: checkpoint(lambda *y: op(*y, theta=theta), *x, use_reentrant=False), qkv
        )
        assert all(torch.equal(eager[name], other[name]) for name in eager for other in (traced, again))


@pytest.mark.parametrize("op", [rotary, rotary_reference])
def test_what_cannot_be_turned_is_refused_with_both_values(op: Callable[..., Tensor]) -> None:
    qkv = normal(8, 3, 1, 16)
    with pytest.raises(ValueError, match=r"head dim must be even, as its halves are turned together, got 15"):
        op(qkv[..., :15], POSITIONS, theta=THETA)
    with pytest.raises(ValueError, match=r"must have shape \(T, 3, H, K\), got \[8, 2, 1, 16\]"):
        op(qkv[:, :2], POSITIONS, theta=THETA)
    with pytest.raises(ValueError, match=r"position_ids_T must be torch.int64 \[8\], got torch.int32 \[8\]"):
        op(qkv, POSITIONS.int(), theta=THETA)
    with pytest.raises(ValueError, match=r"position_ids_T must be torch.int64 \[8\], got torch.int64 \[7\]"):
        op(qkv, POSITIONS[:7], theta=THETA)
    with pytest.raises(ValueError, match=r"theta must be above 1 and finite, got 1\.0"):
        op(qkv, POSITIONS, theta=1.0)


def test_what_the_kernel_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="head dim must be at most 128, got 130"):
        rotary(normal(8, 3, 1, 130), POSITIONS, theta=THETA)
    with pytest.raises(ValueError, match=r"must be bfloat16, float16 or float32, got torch.float64"):
        rotary(normal(8, 3, 1, 16, dtype=torch.float64), POSITIONS, theta=THETA)
