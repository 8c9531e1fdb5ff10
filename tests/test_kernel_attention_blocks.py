"""The torch reference of attention on long sequences: blocks of queries give what the whole gives, in linear memory."""

from __future__ import annotations

import pytest
import torch
from test_kernel_attention import DEVICE, SEED, out_and_gradients, packed
from torch import Tensor

from bert_kernels import attention_reference as attention_module
from bert_kernels.attention_reference import attention_reference


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_reference_computes_the_same_in_blocks_of_queries(
    window: int | None, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv, cu_seqlens = packed((333, 1, 300, 40, 0, 334), head_dim=8, dtype=torch.float64)
    dout = torch.randn(qkv[:, 0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)
    options = {"window": window, "dropout_p": dropout_p, "dropout_seed": SEED, "site": 3}
    whole = out_and_gradients(attention_reference, qkv, cu_seqlens, dout, **options)
    monkeypatch.setattr(attention_module, "_WHOLE_LENGTH", 64)
    monkeypatch.setattr(attention_module, "_MIN_WINDOW_ROWS", 16)
    assert attention_module._rows_together(333, window) == {None: 12, 5: 16, 40: 80}[window]
    blocks = out_and_gradients(attention_reference, qkv, cu_seqlens, dout, **options)
    for name, value in whole.items():
        torch.testing.assert_close(blocks[name], value, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("window", [None, 64])
def test_what_the_reference_keeps_for_the_backward_pass_is_linear_in_the_tokens(window: int | None) -> None:
    kept = {}
    for length in (1024, 2048, 4096):
        qkv, cu_seqlens = packed((length,), heads=1, head_dim=8, dtype=torch.float32)
        storages: dict[int, int] = {}

        def keep(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = attention_reference(qkv.requires_grad_(), cu_seqlens, length, window=window)
        kept[length] = sum(storages.values())
        assert out.requires_grad
    assert kept[4096] < 2.2 * kept[2048] and kept[2048] < 2.2 * kept[1024]


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("lengths", [(40,) * 3, (50, 50, 20, 0, 20, 31), (70, 69, 68, 3)])
def test_torchs_attention_and_padding_change_no_more_than_the_last_digits(
    lengths: tuple[int, ...], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By groups of one, which is attention sequence by sequence; by groups; by groups and torch's own attention."""
    qkv, cu_seqlens = packed(lengths, head_dim=8, dtype=torch.float32)
    dout = torch.randn(qkv[:, 0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found, calls = {}, []
    theirs = attention_module._by_sdpa
    monkeypatch.setattr(attention_module, "_by_sdpa", lambda *args: calls.append(len(args)) or theirs(*args))
    for name, few_scores, fill, sdpa_length in (
        ("one", -1, 2.0, 1 << 20),
        ("groups", 1 << 20, 0.0, 1 << 20),
        ("sdpa", -1, 0.85, 30),
    ):
        monkeypatch.setattr(attention_module, "_FEW_SCORES", few_scores)
        monkeypatch.setattr(attention_module, "_MIN_FILL", fill)
        monkeypatch.setattr(attention_module, "_SDPA_LENGTH", sdpa_length)
        groups = list(attention_module._groups(cu_seqlens))
        assert len(groups) == {"one": sum(map(bool, lengths)), "groups": 1}.get(name, len(groups))
        found[name] = out_and_gradients(attention_reference, qkv, cu_seqlens, dout, window=window)
    assert calls or DEVICE == "cuda"
    for name, value in found["one"].items():
        for other in ("groups", "sdpa"):
            torch.testing.assert_close(found[other][name], value, atol=2e-6, rtol=2e-6)


def test_sequences_of_one_length_are_taken_where_they_lie() -> None:
    _, cu_seqlens = packed((6, 6, 6), head_dim=8, dtype=torch.float32)
    (group,) = attention_module._groups(cu_seqlens)
    assert attention_module._token_grid(*group, cu_seqlens.device)[2] == 0
    apart = attention_module._token_grid([0, 12], [6, 6], cu_seqlens.device)
    assert apart[2] is None and apart[0].tolist() == [list(range(6)), list(range(12, 18))]
