"""The embedding layer: the reference against plain autograd, the Triton operator by the 2x rule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bert_kernels import _launch, embedding_kernels
from bert_kernels._tiles import Tile
from bert_kernels.dropout_mask import hidden_keep_mask
from bert_kernels.embedding import embedding, embedding_reference
from bert_kernels.embedding_kernels import table_gradient
from bert_kernels.testing import assert_close_to_truth, poison_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = torch.tensor([0x1234567_89ABCDEF], device=DEVICE)
NAMES = ("dword", "dposition", "dtype", "dln_weight", "dln_bias")
EPS = 1e-12


def arguments(num_tokens: int, width: int, dtype: torch.dtype, *, num_types: int = 2) -> tuple[list[Tensor], ...]:
    """Return the indices (half of the words alike, as [MASK] is) and the tables and vectors, which need gradients."""
    generator = torch.Generator().manual_seed(num_tokens)
    words = torch.randint(50, (num_tokens,), generator=generator)
    words[::2] = 7
    positions = torch.arange(num_tokens) % 19
    indices = [words, torch.randint(num_types, (num_tokens,), generator=generator), positions]
    shapes = ((50, width), (20, width), (num_types, width), (width,), (width,))
    tensors = [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]
    return [index.to(DEVICE) for index in indices], tensors


def results(op, indices: list[Tensor], tensors: list[Tensor], dout: Tensor, **options) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    out = op(*indices, *tensors, EPS, **options)
    return {"out": out.detach()} | dict(zip(NAMES, torch.autograd.grad(out, tensors, dout), strict=True))


def dout_of(num_tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def check_by_the_2x_rule(num_tokens: int, width: int, dtype: torch.dtype, **options) -> None:  # type: ignore[no-untyped-def]
    indices, tensors = arguments(num_tokens, width, dtype)
    dout = dout_of(num_tokens, width, dtype)
    with poison_empty():
        kernel = results(embedding, indices, tensors, dout, **options)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    truth = results(embedding_reference, indices, wide, dout.double(), **options)
    peer = results(embedding_reference, indices, tensors, dout, **options)
    for name, value in kernel.items():
        # Where torch happens to be exact: one rounding of the largest number.
        atol = torch.finfo(dtype).eps * truth[name].abs().max().item()
        assert_close_to_truth(value, truth[name], peer[name], name=name, atol=atol)


@pytest.mark.parametrize(
    ("num_tokens", "width", "dtype", "dropout_p"),
    [
        (1, 8, torch.float32, 0.1),
        (1, 8, torch.bfloat16, 0.0),
        (131, 24, torch.float32, 0.0),
        (131, 24, torch.float16, 0.1),
        (67, 768, torch.bfloat16, 0.1),
        (67, 768, torch.float16, 0.0),
    ],
)
def test_output_and_gradients_are_as_near_to_the_truth_as_torch(
    num_tokens: int, width: int, dtype: torch.dtype, dropout_p: float
) -> None:
    check_by_the_2x_rule(num_tokens, width, dtype, dropout_p=dropout_p, dropout_seed=SEED, site=3)


@pytest.mark.campaign
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 127, 256, 768, 1024])
@pytest.mark.parametrize("num_tokens", [63, 64, 65, 257, 1031])
def test_the_2x_rule_holds_over_the_whole_matrix(num_tokens: int, width: int, dtype: torch.dtype) -> None:
    check_by_the_2x_rule(num_tokens, width, dtype, dropout_p=0.1, dropout_seed=SEED, site=3)


@pytest.mark.parametrize(
    ("num_tokens", "num_rows"),
    [(1, 3), (63, 1), (64, 3), (65, 300), (128, 1), (700, 300), (700, 3), (5000, 3)],
)
def test_rows_are_summed_right_however_many_chunks_share_them(num_tokens: int, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    dz = torch.randint(-8, 9, (num_tokens, 8), generator=generator).float().to(DEVICE)
    index = torch.randint(num_rows, (num_tokens,), generator=generator).to(DEVICE)
    expected = torch.zeros(num_rows, 8, device=DEVICE).index_add_(0, index, dz)
    with poison_empty():
        assert torch.equal(table_gradient(dz, index, num_rows), expected)


@pytest.mark.parametrize("num_rows", [3, 40000], ids=["16-bit keys", "32-bit keys"])
def test_an_index_outside_the_table_writes_nothing(num_rows: int) -> None:
    index = torch.tensor([num_rows, -1] * 100 + [2] * 5, device=DEVICE)
    found = table_gradient(torch.ones(205, 8, device=DEVICE), index, num_rows)
    assert found[2].eq(5.0).all() and found.sum() == 40.0


def test_every_row_of_ones_shows_the_mask_of_the_reference() -> None:
    indices, tensors = arguments(13, 40, torch.float32)
    with torch.no_grad():
        tensors[3].zero_()
        tensors[4].fill_(1.0)
        out = embedding(*indices, *tensors, EPS, dropout_p=0.3, dropout_seed=SEED, site=5)
    keep = hidden_keep_mask(13, 40, dropout_p=0.3, dropout_seed=SEED, site=5)
    assert torch.equal(out > 0, keep)


def test_the_gradient_sees_the_mask_of_the_reference() -> None:
    indices, tensors = arguments(13, 40, torch.float32)
    keep = hidden_keep_mask(13, 40, dropout_p=0.3, dropout_seed=SEED, site=5)
    dout = (~keep).float()
    found = results(embedding, indices, tensors, dout, dropout_p=0.3, dropout_seed=SEED, site=5)
    assert not any(found[name].any() for name in NAMES)


def test_neither_tile_changes_more_than_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    indices, tensors = arguments(70, 24, torch.float32)
    dout = dout_of(70, 24, torch.float32)
    options = {"dropout_p": 0.1, "dropout_seed": SEED}
    expected = results(embedding, indices, tensors, dout, **options)
    monkeypatch.setattr(embedding_kernels, "LAYER_NORM", {"default": ((1 << 62, Tile(8, 3, 4, 1)),)})
    monkeypatch.setattr(embedding_kernels, "SEGMENT_SUM", {4: Tile(16, 16, 4, 1)})
    found = results(embedding, indices, tensors, dout, **options)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", range(5))
def test_one_gradient_alone_is_what_it_is_with_the_others(wanted: int) -> None:
    indices, tensors = arguments(37, 16, torch.float32)
    dout = dout_of(37, 16, torch.float32)
    every = results(embedding, indices, tensors, dout)
    alone = [tensor.detach() for tensor in tensors]
    alone[wanted].requires_grad_()
    embedding(*indices, *alone, EPS).backward(dout)
    assert [tensor.grad is not None for tensor in alone] == [i == wanted for i in range(5)]
    assert torch.equal(alone[wanted].grad, every[NAMES[wanted]])  # type: ignore[arg-type]


def test_no_tokens_give_an_empty_output_and_zero_gradients() -> None:
    indices, tensors = arguments(0, 16, torch.float32)
    with poison_empty():
        found = results(embedding, indices, tensors, dout_of(0, 16, torch.float32))
    assert found["out"].shape == (0, 16) and not any(found[name].any() for name in NAMES)


def test_strided_indices_and_gradients_are_read_right() -> None:
    indices, tensors = arguments(37, 16, torch.float32)
    dout = dout_of(16, 37, torch.float32).T
    strided = [torch.stack((index, index + 90), dim=1)[:, 0] for index in indices]
    found = results(embedding, strided, tensors, dout)
    for name, value in results(embedding, indices, tensors, dout.contiguous()).items():
        assert torch.equal(found[name], value), name


def test_gradients_agree_with_finite_differences() -> None:
    indices, tensors = arguments(9, 8, torch.float32)
    dout = dout_of(9, 8, torch.float32)
    generator = torch.Generator().manual_seed(3)
    steps = [torch.randn(tensor.shape, generator=generator).to(DEVICE) for tensor in tensors]
    options = {"dropout_p": 0.3, "dropout_seed": SEED}

    def value(size: float) -> float:
        moved = [tensor.detach() + size * step for tensor, step in zip(tensors, steps, strict=True)]
        return float((embedding(*indices, *moved, EPS, **options).double() * dout).sum())

    found = results(embedding, indices, tensors, dout, **options)
    slope = sum(float((found[name] * step).sum()) for name, step in zip(NAMES, steps, strict=True))
    assert (value(1e-3) - value(-1e-3)) / 2e-3 == pytest.approx(slope, rel=1e-2)


def test_recomputation_under_checkpointing_draws_the_same_mask() -> None:
    indices, tensors = arguments(37, 16, torch.float32)
    dout = dout_of(37, 16, torch.float32)

    def recomputed(*args, **options) -> Tensor:  # type: ignore[no-untyped-def]
        return checkpoint(embedding, *args, **options, use_reentrant=False)

    options = {"dropout_p": 0.3, "dropout_seed": SEED}
    kept, again = (results(op, indices, tensors, dout, **options) for op in (embedding, recomputed))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_it_compiles_without_a_graph_break() -> None:
    indices, tensors = arguments(9, 8, torch.float32)
    compiled = torch.compile(embedding, backend="aot_eager", fullgraph=True)
    dout = dout_of(9, 8, torch.float32)
    eager, traced = (results(op, indices, tensors, dout) for op in (embedding, compiled))
    assert all(torch.equal(eager[name], traced[name]) for name in eager)


def test_what_the_kernels_cannot_do_is_refused_with_both_numbers() -> None:
    (words, types, positions), tensors = arguments(9, 8, torch.float32)
    word, position, type_, weight, bias = tensors
    with pytest.raises(ValueError, match=r"\[1, 4096\], got \[2, 5000\]"):
        embedding(words, types, positions, torch.zeros(2, 5000, device=DEVICE), *tensors[1:], EPS)
    with pytest.raises(ValueError, match=r"width 8, got .*20, 7"):
        embedding(words, types, positions, word, position[:, :7].contiguous(), type_, weight, bias, EPS)
    with pytest.raises(ValueError, match=r"int64 \[9\], got .*int32"):
        embedding(words, types.int(), positions, *tensors, EPS)
    with pytest.raises(ValueError, match=r"type_2D must be contiguous .*float32 .*, got .*float16"):
        embedding(words, types, positions, word, position, type_.half(), weight, bias, EPS)
    with pytest.raises(ValueError, match="dropout_seed is None"):
        embedding(words, types, positions, *tensors, EPS, dropout_p=0.1)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU this would need a wait for the device")
def test_an_index_outside_its_table_is_refused_on_the_cpu() -> None:
    (words, types, positions), tensors = arguments(9, 8, torch.float32)
    with pytest.raises(ValueError, match=r"token_type_ids_T must be in \[0, 2\), got .* to 2"):
        embedding(words, types + 1, positions, *tensors, EPS)


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "INTERPRETING", False)
    indices, tensors = arguments(9, 8, torch.float32)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        embedding(*(index.cpu() for index in indices), *(tensor.cpu() for tensor in tensors), EPS)


def test_the_reference_passes_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = [
        torch.randn(size, 4, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_() for size in (6, 5, 2)
    ]
    affine = [torch.randn(4, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_() for _ in range(2)]
    words, types, positions = (
        torch.tensor(index, device=DEVICE) for index in ([5, 1, 1, 0], [0, 1, 1, 0], [0, 1, 2, 0])
    )
    assert torch.autograd.gradcheck(
        lambda *x: embedding_reference(words, types, positions, *x, 1e-5), (*tables, *affine)
    )


def test_the_reference_sums_thousands_of_bf16_gradients_without_losing_them() -> None:
    types = torch.zeros(4096, dtype=torch.int64, device=DEVICE)
    tables = [torch.randn(2, 2, device=DEVICE).bfloat16().requires_grad_() for _ in range(3)]
    affine = [torch.ones(2, dtype=torch.bfloat16, device=DEVICE), torch.zeros(2, dtype=torch.bfloat16, device=DEVICE)]
    # An epsilon so large that LayerNorm only divides by 1024 and takes the mean away.
    out = embedding_reference(types, types, types, *tables, *affine, float(1 << 20))
    out.backward(torch.tensor([1024.0, 0.0], device=DEVICE).bfloat16().expand_as(out))
    for table in tables:
        assert table.grad is not None
        torch.testing.assert_close(table.grad[0].float().cpu(), torch.tensor([2048.0, -2048.0]), rtol=1e-2, atol=0.0)
