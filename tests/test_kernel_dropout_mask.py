"""The torch reference of the dropout masks, and its equality with what kernels draw."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_kernels import dropout_mask
from bert_kernels._drawn_ahead import DrawnAhead
from bert_kernels.dropout_mask import (
    ATTENTION,
    HIDDEN,
    MaskLayout,
    check_dropout,
    dropout_reference,
    hidden_keep_mask,
    keep_attention_tile,
    keep_hidden_tile,
    keep_mask_reference,
    keep_scale,
    keep_threshold,
    philox_words,
)

SEED = torch.tensor([-0x0123456789ABCDEF])


def words_hex(counter: int, seed: int, num_rounds: int) -> list[str]:
    counters = tuple(torch.tensor([counter]) for _ in range(4))
    return [f"{word:08x}" for word in philox_words(counters, torch.tensor([seed]), num_rounds).flatten().tolist()]


def test_philox_gives_the_known_answers_of_its_authors() -> None:
    assert words_hex(0, 0, 7) == ["5f6fb709", "0d893f64", "4f121f81", "4f730a48"]
    assert words_hex(0xFFFFFFFF, -1, 7) == ["5207ddc2", "45165e59", "4d8ee751", "8c52f662"]
    assert words_hex(0, 0, 10) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert words_hex(0xFFFFFFFF, -1, 10) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


@pytest.mark.parametrize("seed", [0, -1, 0x7234567890ABCDEF])
@pytest.mark.parametrize(("num_rows", "num_calls", "threads"), [(0, 4, 1), (1, 1, 1), (7, 3, 1), (2100, 32, 2)])
def test_numpy_draws_what_torch_draws(
    num_rows: int, num_calls: int, threads: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rows, heads = (torch.arange(num_rows) * 0x1234567) % 2**32, torch.arange(num_rows) % 5
    options = {"dropout_p": 0.1, "seed": torch.tensor([seed]), "site": 2**32 - 5}
    assert dropout_mask._philox_numpy is not None
    by_numpy = dropout_mask._bytes_kept(rows, heads, num_calls, **options)
    monkeypatch.setattr(dropout_mask, "_philox_numpy", None)
    assert torch.equal(by_numpy, dropout_mask._bytes_kept(rows, heads, num_calls, **options))


def test_small_masks_of_later_seeds_are_drawn_together_and_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    by_numpy, draws = dropout_mask._philox_numpy, []
    assert by_numpy is not None
    draw = by_numpy._draw
    monkeypatch.setattr(by_numpy, "_draw", lambda *a, **named: (draws.append([*named["sites"]]), draw(*a, **named)))
    monkeypatch.setattr(by_numpy, "_ahead", DrawnAhead())

    def masks(seed: int, sites: tuple[int, ...]) -> list[Tensor]:
        options = {"dropout_p": 0.1, "dropout_seed": torch.tensor([seed])}
        drawn = []
        for site in sites:
            drawn.append(hidden_keep_mask(9 + seed, 24, site=site, **options))
            drawn.append(keep_mask_reference(torch.arange(5), 70, site=site + 100, layout=ATTENTION, **options))
        return [*drawn, hidden_keep_mask(3, 24, site=9, **options)]

    asked = [(1, (0, 2, 4)), (2, (0, 2, 4)), (3, (0, 4, 5)), (4, (0,))]
    found = [masks(*one) for one in asked]
    assert draws[:7] == [[0], [100], [2], [102], [4], [104], [9]]
    assert draws[7:10] == [[0, 2, 4], [100, 102, 104], [9]]
    assert draws[10:] == [[0, 2, 4], [100, 102, 104], [5], [105], [9], [0, 4, 5], [100, 104, 105], [9]]
    monkeypatch.setattr(dropout_mask, "_philox_numpy", None)
    for one, wanted in zip(asked, found, strict=True):
        assert all(map(torch.equal, masks(*one), wanted))


@pytest.mark.parametrize(
    ("layout", "row", "column", "counter", "byte"),
    [
        (ATTENTION, 41, 0, (0, 41, 3, 9), 0),
        (ATTENTION, 41, 1, (0, 41, 3, 9), 1),
        (ATTENTION, 41, 2, (1, 41, 3, 9), 0),
        (ATTENTION, 41, 15, (3, 41, 3, 9), 3),
        (ATTENTION, 41, 63, (3, 41, 3, 9), 15),
        (ATTENTION, 41, 64 * 5 + 8 * 3 + 4, (22, 41, 3, 9), 6),
        (HIDDEN, 40, 0, (0, 20, 0, 9), 0),
        (HIDDEN, 41, 0, (0, 20, 0, 9), 8),
        (HIDDEN, 41, 767, (95, 20, 0, 9), 15),
        (HIDDEN, 42, 13, (1, 21, 0, 9), 5),
    ],
)
def test_an_element_is_the_byte_that_the_definition_names(
    layout: MaskLayout, row: int, column: int, counter: tuple[int, ...], byte: int
) -> None:
    c0, c1, c2, c3 = (torch.tensor([c]) for c in counter)
    drawn = int(philox_words((c0, c1, c2, c3), SEED)[byte // 4]) >> 8 * (byte % 4) & 255
    heads = torch.tensor([3]) if layout is ATTENTION else None
    # Thresholds on both sides of the byte: it is kept by the higher one only.
    for dropout_p, kept in ((1 - drawn / 256, False), (1 - (drawn + 1) / 256, True)):
        if 0 < round((1 - dropout_p) * 256) < 256:
            keep = keep_mask_reference(
                torch.tensor([row]), 800, dropout_p=dropout_p, dropout_seed=SEED, site=9, heads=heads, layout=layout
            )
            assert bool(keep[0, column]) == kept


def test_the_mask_does_not_depend_on_how_many_rows_or_columns_are_asked_for() -> None:
    rows = torch.arange(300)
    whole = keep_mask_reference(rows, 5000, dropout_p=0.1, dropout_seed=SEED, site=1)
    part = keep_mask_reference(rows[200:], 700, dropout_p=0.1, dropout_seed=SEED, site=1)
    assert torch.equal(whole[200:, :700], part)


def test_seed_site_head_and_row_each_change_the_mask() -> None:
    def mask(row: int = 5, seed: int = 1, site: int = 0, head: int = 0) -> Tensor:
        return keep_mask_reference(
            torch.tensor([row]), 512, dropout_p=0.5, dropout_seed=torch.tensor([seed]), site=site,
            heads=torch.tensor([head]), layout=ATTENTION,
        )  # fmt: skip

    others = (mask(row=6), mask(seed=2), mask(seed=1 + (1 << 32)), mask(site=1), mask(head=1))
    agreement = [(mask() == other).float().mean().item() for other in others]
    assert all(0.4 < share < 0.6 for share in agreement), agreement


@pytest.mark.parametrize("dropout_p", [0.1, 0.25, 0.9])
def test_the_scale_makes_the_expectation_exact(dropout_p: float) -> None:
    keep = keep_mask_reference(torch.arange(1000), 1024, dropout_p=dropout_p, dropout_seed=SEED, site=0)
    drawn = keep_threshold(dropout_p) / 256
    assert keep_scale(dropout_p) * drawn == pytest.approx(1.0, abs=1e-12)
    # Five standard deviations of the mean of 1,024,000 draws.
    assert keep.double().mean().item() == pytest.approx(drawn, abs=5 * (drawn * (1 - drawn) / 1_024_000) ** 0.5)


def test_neighbours_rows_and_heads_are_uncorrelated() -> None:
    heads = torch.arange(4)[:, None]
    keep = keep_mask_reference(
        torch.arange(256), 512, dropout_p=0.5, dropout_seed=SEED, site=0, heads=heads, layout=ATTENTION
    )
    sign = keep.double() * 2 - 1
    pairs = (sign[..., 1:] * sign[..., :-1], sign[:, 1:] * sign[:, :-1], sign[1:] * sign[:-1])
    assert all(abs(pair.mean().item()) < 5 / pair.numel() ** 0.5 for pair in pairs)


def test_dropout_of_a_hidden_tensor_scales_what_it_keeps_and_adds_the_residual() -> None:
    x, residual = torch.randn(7, 300, dtype=torch.float64), torch.randn(7, 300, dtype=torch.float64)
    keep = keep_mask_reference(torch.arange(7), 300, dropout_p=0.1, dropout_seed=SEED, site=4)
    out = dropout_reference(x, dropout_p=0.1, dropout_seed=SEED, site=4, residual=residual)
    torch.testing.assert_close(out, residual + torch.where(keep, x * 256 / 230, 0.0))


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, 1.5, 1e-4, 0.999])
def test_a_probability_that_the_mask_cannot_draw_is_refused(dropout_p: float) -> None:
    with pytest.raises(ValueError, match=str(dropout_p)):
        keep_threshold(dropout_p)


def test_dropout_without_a_seed_or_with_a_wrong_one_is_refused() -> None:
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="dropout_seed is None"):
        check_dropout(0.1, None, device)
    with pytest.raises(ValueError, match="int32"):
        check_dropout(0.1, torch.tensor([1], dtype=torch.int32), device)
    with pytest.raises(ValueError, match=r"\[2\]"):
        check_dropout(0.1, torch.tensor([1, 2]), device)


@triton.jit
def _draw_kernel(
    seed_ptr, keep_ptr, first_row, head, site, first_column,
    THRESHOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_ATTENTION: tl.constexpr,
):  # fmt: skip
    seed = tl.load(seed_ptr)
    rows = first_row + tl.arange(0, BLOCK_M)
    if IS_ATTENTION:
        keep = keep_attention_tile(seed, rows, head, site, first_column, THRESHOLD, BLOCK_N)
    else:
        keep = keep_hidden_tile(seed, first_row, site, THRESHOLD, BLOCK_M, BLOCK_N)
    tl.store(keep_ptr + tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], keep.to(tl.int8))


@pytest.mark.parametrize(
    ("layout", "head", "first_column", "width"),
    [(ATTENTION, 5, 0, 64), (ATTENTION, 5, 192, 128), (HIDDEN, 0, 0, 8), (HIDDEN, 0, 0, 1024)],
)
def test_a_kernel_draws_the_mask_of_the_reference(layout: MaskLayout, head: int, first_column: int, width: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawn = torch.empty(16, width, dtype=torch.int8, device=device)
    _draw_kernel[(1,)](SEED.to(device), drawn, 1000, head, 77, first_column, 230, 16, width, layout is ATTENTION)
    keep = keep_mask_reference(
        torch.arange(1000, 1016), first_column + width, dropout_p=0.1, dropout_seed=SEED, site=77,
        heads=torch.tensor([head]) if head else None, layout=layout,
    )  # fmt: skip
    assert torch.equal(drawn.bool().cpu(), keep[:, first_column:])
