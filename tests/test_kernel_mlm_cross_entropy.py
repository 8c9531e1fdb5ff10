"""The masked-LM loss: the reference against plain autograd, the Triton operator by the 2x rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bert_kernels.mlm_cross_entropy import mlm_cross_entropy_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("hidden", "weight", "bias")


def arguments(
    rows: int, vocab_size: int, *, padded: int, hidden_size: int, dtype: torch.dtype, ignored: int = 3
) -> tuple[list[Tensor], Tensor]:
    """Return hidden, weight and bias that need gradients, and labels of which every `ignored`-th is -100."""
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, hidden_size), (padded, hidden_size), (padded,))
    tensors = [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]
    labels = torch.randint(vocab_size, (rows,), generator=generator)
    labels[ignored - 1 :: ignored] = -100
    return tensors, labels.to(DEVICE)


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, *, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Eager torch, every gradient by autograd."""
    logits = F.linear(hidden, weight, bias)[:, :vocab_size]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return loss, (logits.argmax(1) == labels).sum().to(loss.dtype) if len(labels) else loss.detach()


def results(op, tensors: list[Tensor], labels: Tensor, *, vocab_size: int, factor: float = 1.0) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """Return loss, correct and the gradients by name."""
    loss, correct = op(*tensors, labels, vocab_size=vocab_size)
    gradients = torch.autograd.grad(loss * factor, tensors)
    named = zip(("dhidden", "dweight", "dbias"), gradients, strict=True)
    return {"loss": loss.detach(), "correct": correct} | dict(named)


@pytest.mark.parametrize(("rows", "vocab_size", "padded"), [(1, 1, 1), (7, 37, 40), (64, 500, 512)])
def test_the_reference_equals_plain_autograd(rows: int, vocab_size: int, padded: int) -> None:
    tensors, labels = arguments(rows, vocab_size, padded=padded, hidden_size=8, dtype=torch.float64)
    options = {"vocab_size": vocab_size, "factor": 0.37}
    ours = results(mlm_cross_entropy_reference, tensors, labels, **options)
    expected = results(plain, tensors, labels, **options)
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_the_reference_passes_gradcheck() -> None:
    tensors, labels = arguments(5, 9, padded=12, hidden_size=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: mlm_cross_entropy_reference(*x, labels, vocab_size=9)[0], tensors)


def test_the_reference_takes_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, labels = arguments(7, 37, padded=40, hidden_size=8, dtype=torch.float32)
    whole = results(mlm_cross_entropy_reference, tensors, labels, vocab_size=37)
    monkeypatch.setitem(mlm_cross_entropy_reference.__globals__["_LOGITS_PER_PIECE"], DEVICE, 3 * 40)
    pieces = results(mlm_cross_entropy_reference, tensors, labels, vocab_size=37)
    for name, value in whole.items():
        torch.testing.assert_close(pieces[name], value)


def test_the_reference_survives_logits_a_hundred_apart() -> None:
    hidden, bias = torch.ones(1, 1, device=DEVICE), torch.zeros(3, device=DEVICE)
    weight = torch.tensor([[200.0], [0.0], [-200.0]], device=DEVICE)
    for label, loss in ((0, 0.0), (1, 200.0), (2, 400.0)):
        found, _ = mlm_cross_entropy_reference(hidden, weight, bias, torch.tensor([label], device=DEVICE), vocab_size=3)
        assert found.item() == loss


def test_the_factor_of_bf16_gradients_is_not_rounded_to_bf16() -> None:
    tensors, labels = arguments(64, 64, padded=64, hidden_size=8, dtype=torch.bfloat16)
    once = results(mlm_cross_entropy_reference, tensors, labels, vocab_size=64)
    # The nearest bf16 numbers are 1.5 and 1.5078.
    scaled = results(mlm_cross_entropy_reference, tensors, labels, vocab_size=64, factor=1.5039)
    for name in ("dhidden", "dweight", "dbias"):
        ratio = (scaled[name].double().norm() / once[name].double().norm()).item()
        assert ratio == pytest.approx(1.5039, abs=1.5e-3)
