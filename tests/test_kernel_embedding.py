"""The embedding layer: the reference against plain autograd, the Triton operator by the 2x rule."""

from __future__ import annotations

import torch

from bert_kernels.embedding import embedding_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
