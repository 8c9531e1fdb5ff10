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
