"""The Triton attention operator: in the interpreter without a CUDA device, on the device where there is one."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bert_kernels import _launch, _tiles
from bert_kernels._tiles import Tile
from bert_kernels.attention import attention, attention_reference
from bert_kernels.dropout_mask import ATTENTION, keep_mask_reference, keep_scale
from bert_kernels.testing import assert_close_to_truth, poison_empty

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = torch.tensor([0x1234567_89ABCDEF], device=DEVICE)
# What rounding alone may add where torch happens to be exact: some units in the last place of numbers near 1.
ATOL = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# No longer than a tile (the whole-sequence backward), and longer ones with tails of one key.
SHORT, LONG = (13, 0, 64, 1), (65, 0, 1, 20)


def packed(
    lengths: tuple[int, ...], *, heads: int = 2, head_dim: int = 32, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, generator=generator).to(dtype)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return qkv.to(DEVICE), bounds.to(DEVICE)


def out_and_gradients(op, qkv: Tensor, cu_seqlens: Tensor, dout: Tensor, **options) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    qkv = qkv.detach().clone().requires_grad_()
    longest = int(cu_seqlens.diff().max())
    out = op(qkv, cu_seqlens, longest, **options)
    out.backward(dout)
    assert qkv.grad is not None
    return {"out": out.detach()} | dict(zip(("dq", "dk", "dv"), qkv.grad.unbind(1), strict=True))


def check_by_the_2x_rule(qkv: Tensor, cu_seqlens: Tensor, **options) -> None:  # type: ignore[no-untyped-def]
    dout = torch.randn(qkv[:, 0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, qkv.dtype)
    with poison_empty():
        kernel = out_and_gradients(attention, qkv, cu_seqlens, dout, **options)
    truth = out_and_gradients(attention_reference, qkv.double(), cu_seqlens, dout.double(), **options)
    peer = out_and_gradients(attention_reference, qkv, cu_seqlens, dout, **options)
    for name, value in kernel.items():
        assert_close_to_truth(value, truth[name], peer[name], name=name, atol=ATOL[qkv.dtype])


@pytest.mark.parametrize(
    ("lengths", "dtype", "dropout_p"),
    [
        (SHORT, torch.float32, 0.1),
        (SHORT, torch.float16, 0.0),
        (SHORT, torch.bfloat16, 0.1),
        (LONG, torch.float32, 0.0),
        (LONG, torch.float16, 0.1),
        (LONG, torch.bfloat16, 0.0),
    ],
)
def test_output_and_gradients_are_as_near_to_the_truth_as_torch(
    lengths: tuple[int, ...], dtype: torch.dtype, dropout_p: float
) -> None:
    qkv, cu_seqlens = packed(lengths, dtype=dtype)
    check_by_the_2x_rule(qkv, cu_seqlens, dropout_p=dropout_p, dropout_seed=SEED, site=3)


@pytest.mark.parametrize(
    ("lengths", "head_dim"), [((13,), 1), ((13,), 20), ((13,), 128), ((65,), 1), ((65,), 20), ((65,), 128)]
)
def test_head_dims_up_to_128_are_padded(lengths: tuple[int, ...], head_dim: int) -> None:
    qkv, cu_seqlens = packed(lengths, heads=1, head_dim=head_dim, dtype=torch.float16)
    check_by_the_2x_rule(qkv, cu_seqlens, dropout_p=0.1, dropout_seed=SEED)


@pytest.mark.parametrize("lengths", [(40,), (130,)], ids=["short", "long"])
def test_a_window_hides_keys_further_away(lengths: tuple[int, ...]) -> None:
    qkv, cu_seqlens = packed(lengths, heads=1, dtype=torch.float16)
    check_by_the_2x_rule(qkv, cu_seqlens, window=5, dropout_p=0.1, dropout_seed=SEED)


def test_in_a_window_of_0_every_token_sees_itself_alone() -> None:
    qkv, cu_seqlens = packed((9, 20), heads=1, dtype=torch.float32)
    torch.testing.assert_close(attention(qkv, cu_seqlens, 20, window=0), qkv[:, 2])


@pytest.mark.campaign
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("window", [None, 3, 70])
def test_the_2x_rule_holds_for_all_lengths_about_a_tile(
    window: int | None, head_dim: int, dtype: torch.dtype, dropout_p: float
) -> None:
    for lengths in ((63, 64, 1), (64, 65, 0), (127, 128, 129), (257, 97)):
        qkv, cu_seqlens = packed(lengths, head_dim=head_dim, dtype=dtype)
        check_by_the_2x_rule(qkv, cu_seqlens, window=window, dropout_p=dropout_p, dropout_seed=SEED, site=1)


def test_packed_sequences_give_what_padded_ones_give_in_torch() -> None:
    qkv, cu_seqlens = packed(LONG, dtype=torch.float32)
    out = attention(qkv, cu_seqlens, 65)
    for start, length in zip(cu_seqlens.tolist(), LONG, strict=False):
        q, k, v = F.pad(qkv[start : start + length], (0, 0) * 3 + (0, 7)).permute(1, 2, 0, 3)
        mask = torch.arange(length + 7, device=DEVICE) < length
        padded = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, :length] if length else q[:, :0]
        torch.testing.assert_close(out[start : start + length], padded.transpose(0, 1), atol=2e-6, rtol=2e-6)


def keep_of_forward(length: int, head_dim: int, **options) -> Tensor:  # type: ignore[no-untyped-def]
    """Read the mask off the output: equal scores and one-hot values make out[i, j] = keep / length * scale."""
    keep = []
    for first in range(0, length, head_dim):
        qkv = torch.zeros(length, 3, 2, head_dim, device=DEVICE)
        width = min(head_dim, length - first)
        qkv[first : first + width, 2, :, :width] = torch.eye(width, device=DEVICE)[:, None]
        bounds = torch.tensor([0, length], dtype=torch.int32, device=DEVICE)
        out = attention(qkv, bounds, length, dropout_p=0.1, dropout_seed=SEED, site=3)
        expected = keep_scale(0.1) / length
        assert bool(((out == 0) | ((out - expected).abs() < 1e-6)).all())
        keep.append(out[..., :width] > 0)
    return torch.cat(keep, dim=2).transpose(0, 1)


def keep_of_backward(length: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Read the masks of dq, dk and dv: with equal scores and dp = 1 everywhere, ds > 0 where an element is kept."""
    bounds = torch.tensor([0, length], dtype=torch.int32, device=DEVICE)
    masks: dict[str, list[Tensor]] = {"dq": [], "dk": [], "dv": []}
    for first in range(0, length, head_dim):
        width = min(head_dim, length - first)
        one_hot = torch.zeros(length, head_dim, device=DEVICE)
        one_hot[first : first + width, :width] = torch.eye(width, device=DEVICE)
        for name in masks:
            qkv = torch.zeros(length, 3, 2, head_dim, device=DEVICE)
            dout = torch.zeros(length, 2, head_dim, device=DEVICE)
            if name == "dv":
                dout[:] = one_hot[:, None]
            else:
                # Scores stay equal: only one of q and k is not zero.
                qkv[:, 1 if name == "dq" else 0] = one_hot[:, None]
                qkv[:, 2, :, 0] = 1.0
                dout[:, :, 0] = 1.0
            gradients = out_and_gradients(
                attention, qkv, bounds, dout, dropout_p=0.1, dropout_seed=SEED, site=3, softmax_scale=1.0
            )
            masks[name].append(gradients[name][..., :width] > 0)
    dq, dk, dv = (torch.cat(parts, dim=2).transpose(0, 1) for parts in masks.values())
    return dq, dk.transpose(1, 2), dv.transpose(1, 2)


def reference_keep(length: int) -> Tensor:
    return keep_mask_reference(
        torch.arange(length, device=DEVICE), length, dropout_p=0.1, dropout_seed=SEED, site=3,
        heads=torch.arange(2, device=DEVICE)[:, None], layout=ATTENTION,
    )  # fmt: skip


def test_forward_and_backward_drop_exactly_what_the_reference_drops() -> None:
    keep = reference_keep(70)
    assert torch.equal(keep_of_forward(70, 128), keep)
    for mask in keep_of_backward(70, 128):
        assert torch.equal(mask, keep)


@pytest.mark.parametrize("tile", [Tile(16, 64, 4, 1), Tile(128, 128, 8, 1)])
def test_the_mask_does_not_depend_on_the_tile(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in ("fwd", "dq", "dkdv"):
        monkeypatch.setitem(_tiles.ATTENTION, f"{kernel}/fp32", {"default": ((1 << 62, tile),)})  # type: ignore[arg-type]
    keep = reference_keep(70)
    assert torch.equal(keep_of_forward(70, 128), keep)
    for mask in keep_of_backward(70, 128):
        assert torch.equal(mask, keep)


def test_a_sequence_gives_the_same_bits_alone_and_in_company() -> None:
    qkv, cu_seqlens = packed((30, 64), dtype=torch.float16)
    alone = attention(qkv[30:].contiguous(), cu_seqlens[1:] - 30, 64)
    assert torch.equal(attention(qkv, cu_seqlens, 64)[30:], alone)


def test_gradients_agree_with_finite_differences() -> None:
    qkv, cu_seqlens = packed((5, 3), heads=1, head_dim=16, dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    step, dout = (torch.randn(shape, generator=generator).to(DEVICE) for shape in (qkv.shape, qkv[:, 0].shape))

    def value(x: Tensor) -> float:
        out = attention(x, cu_seqlens, 5, dropout_p=0.3, dropout_seed=SEED)
        return float((out.double() * dout.double()).sum())

    gradients = out_and_gradients(attention, qkv, cu_seqlens, dout, dropout_p=0.3, dropout_seed=SEED)
    slope = sum(float((gradients[name] * step[:, i]).sum()) for i, name in enumerate(("dq", "dk", "dv")))
    assert (value(qkv + 1e-2 * step) - value(qkv - 1e-2 * step)) / 2e-2 == pytest.approx(slope, rel=1e-3)


def test_a_gradient_of_any_strides_and_a_strided_input_are_read_right() -> None:
    qkv, cu_seqlens = packed((20, 5), dtype=torch.float32)
    wide = F.pad(qkv, (0, 3))[..., :32]
    assert not wide.is_contiguous()
    dout = torch.randn(32, 2, 25, device=DEVICE).permute(2, 1, 0)
    expected = out_and_gradients(attention_reference, qkv, cu_seqlens, dout)
    wide = wide.detach().requires_grad_()
    out = attention(wide, cu_seqlens, 20)
    out.backward(dout)
    torch.testing.assert_close(out, expected["out"], atol=2e-6, rtol=2e-6)
    assert wide.grad is not None
    for i, name in enumerate(("dq", "dk", "dv")):
        torch.testing.assert_close(wide.grad[:, i], expected[name], atol=3e-6, rtol=2e-6)


def test_only_the_gradients_asked_for_reach_the_parts_of_qkv() -> None:
    qkv, cu_seqlens = packed((9,), dtype=torch.float32)
    expected = out_and_gradients(attention_reference, qkv, cu_seqlens, torch.ones_like(qkv[:, 0]))
    q, k, v = (part.clone() for part in qkv.unbind(1))
    attention(torch.stack((q, k, v.requires_grad_()), dim=1), cu_seqlens, 9).sum().backward()
    assert q.grad is None and v.grad is not None
    torch.testing.assert_close(v.grad, expected["dv"], atol=2e-6, rtol=2e-6)
    assert not attention(qkv, cu_seqlens, 9).requires_grad


def test_no_tokens_at_all_give_an_empty_output() -> None:
    qkv = torch.empty(0, 3, 2, 32, device=DEVICE, requires_grad=True)
    out = attention(qkv, torch.zeros(3, dtype=torch.int32, device=DEVICE), 0)
    out.sum().backward()
    assert out.shape == (0, 2, 32) and qkv.grad is not None and qkv.grad.shape == qkv.shape


def test_recomputation_under_checkpointing_draws_the_same_mask() -> None:
    qkv, cu_seqlens = packed((20,), dtype=torch.float32)
    dout = torch.randn_like(qkv[:, 0])

    def recomputed(x: Tensor, *args, **options) -> Tensor:  # type: ignore[no-untyped-def]
        return checkpoint(attention, x, *args, **options, use_reentrant=False)

    options = {"dropout_p": 0.3, "dropout_seed": SEED}
    kept = out_and_gradients(attention, qkv, cu_seqlens, dout, **options)
    again = out_and_gradients(recomputed, qkv, cu_seqlens, dout, **options)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_it_compiles_without_a_graph_break() -> None:
    qkv, cu_seqlens = packed((5, 3), heads=1, head_dim=16, dtype=torch.float32)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    dout = torch.randn_like(qkv[:, 0])
    eager, traced = (out_and_gradients(op, qkv, cu_seqlens, dout) for op in (attention, compiled))
    assert all(torch.equal(eager[name], traced[name]) for name in eager)


def test_what_the_kernels_cannot_do_is_refused_with_both_numbers() -> None:
    qkv, cu_seqlens = packed((9,), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"\[1, 128\], got 160"):
        attention(torch.zeros(9, 3, 1, 160, device=DEVICE), cu_seqlens, 9)
    with pytest.raises(ValueError, match="float64"):
        attention(qkv.double(), cu_seqlens, 9)
    with pytest.raises(ValueError, match="stride 1, got 2"):
        attention(qkv[..., ::2], cu_seqlens, 9)
    with pytest.raises(ValueError, match=r"int32 of shape \(N \+ 1,\), got torch.int64"):
        attention(qkv, cu_seqlens.long(), 9)
    with pytest.raises(ValueError, match="cu_seqlens must have stride 1, got 2"):
        attention(qkv, torch.tensor([0, 1, 9], dtype=torch.int32, device=DEVICE)[::2], 9)
    with pytest.raises(ValueError, match=r"at most 2130706432 elements of qkv_T3HK, got 12000000 tokens of 192"):
        attention(qkv, cu_seqlens, 12_000_000)
    with pytest.raises(ValueError, match="dropout_seed is None"):
        attention(qkv, cu_seqlens, 9, dropout_p=0.1)
    with pytest.raises(ValueError, match=r"\(T, 3, H, K\), got \[9, 3, 64\]"):
        attention(qkv.flatten(2), cu_seqlens, 9)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU these would need a wait for the device")
def test_lengths_that_contradict_the_sizes_are_refused_on_the_cpu() -> None:
    qkv, cu_seqlens = packed((9,), dtype=torch.float32)
    with pytest.raises(ValueError, match="max_seqlen is 8, but the longest sequence has 9"):
        attention(qkv, cu_seqlens, 8)
    with pytest.raises(ValueError, match="end at T = 9, got 0 and 7"):
        attention(qkv, torch.tensor([0, 7], dtype=torch.int32), 9)


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "INTERPRETING", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        attention(torch.zeros(3, 3, 1, 16), torch.tensor([0, 3], dtype=torch.int32), 3)
