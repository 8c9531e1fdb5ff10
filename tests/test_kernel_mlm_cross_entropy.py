"""The masked-LM loss: the reference against plain autograd, the Triton operator by the 2x rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bert_kernels import _launch, mlm_cross_entropy_kernels
from bert_kernels.mlm_cross_entropy import mlm_cross_entropy, mlm_cross_entropy_reference
from bert_kernels.testing import assert_close_to_truth, poison_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What rounding alone may add: units in the last place of the logits' loss and of gradients near 1.
ATOL = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


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
    hidden, weight, bias = tensors
    likeliest = (hidden @ weight.T + bias)[:, :37].argmax(1)
    for right in (0, 3, 7):
        given = torch.where(torch.arange(7, device=DEVICE) < right, likeliest, (likeliest + 1) % 37)
        assert mlm_cross_entropy_reference(*tensors, given, vocab_size=37)[1] == right


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


def check_by_the_2x_rule(rows: int, vocab_size: int, padded: int, hidden_size: int, dtype: torch.dtype) -> None:
    tensors, labels = arguments(rows, vocab_size, padded=padded, hidden_size=hidden_size, dtype=dtype)
    options = {"vocab_size": vocab_size, "factor": 0.37}
    with poison_empty():
        kernel = results(mlm_cross_entropy, tensors, labels, **options)
    truth = results(plain, [tensor.detach().double().requires_grad_() for tensor in tensors], labels, **options)
    peer = results(plain, tensors, labels, **options)
    for name, value in kernel.items():
        if name != "correct":
            # A loss of hundreds is known to 2^-23 of itself.
            atol = ATOL[dtype] + (2**-22 * truth[name].item() if name == "loss" else 0.0)
            assert_close_to_truth(value, truth[name], peer[name], name=name, atol=atol)
    assert kernel["correct"] == mlm_cross_entropy_reference(*tensors, labels, vocab_size=vocab_size)[1]
    assert not kernel["dweight"][vocab_size:].any() and not kernel["dbias"][vocab_size:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "vocab_size", "padded"),
    [(1, 1, 1), (7, 37, 40), (6, 2048, 2048), (5, 2049, 2056)],
    ids=["one token", "small", "a whole block", "one over"],
)
def test_loss_and_gradients_are_as_near_to_the_truth_as_torch(
    rows: int, vocab_size: int, padded: int, dtype: torch.dtype
) -> None:
    check_by_the_2x_rule(rows, vocab_size, padded, 16, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "padded"), [(30522, 30528), (40001, 40064)], ids=["one block", "five blocks"])
def test_berts_vocabulary_and_one_that_needs_several_blocks(vocab_size: int, padded: int, dtype: torch.dtype) -> None:
    check_by_the_2x_rule(4, vocab_size, padded, 8, dtype)


@pytest.mark.campaign
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hidden_size", [1, 127, 768, 1024])
@pytest.mark.parametrize(("vocab_size", "padded"), [(2047, 2047), (8191, 8192), (8193, 8200), (30522, 30528)])
@pytest.mark.parametrize("rows", [1, 61])
def test_the_2x_rule_holds_over_the_whole_matrix(
    rows: int, vocab_size: int, padded: int, hidden_size: int, dtype: torch.dtype
) -> None:
    check_by_the_2x_rule(rows, vocab_size, padded, hidden_size, dtype)


def test_rows_in_several_parts_give_what_they_give_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, labels = arguments(150, 37, padded=40, hidden_size=8, dtype=torch.float32)
    whole = results(mlm_cross_entropy, tensors, labels, vocab_size=37)
    monkeypatch.setattr(mlm_cross_entropy_kernels, "MAX_LOGITS", 40 * 100)
    with poison_empty():
        parts = results(mlm_cross_entropy, tensors, labels, vocab_size=37)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-5)


def test_a_tie_is_no_right_guess() -> None:
    labels = torch.tensor([0, 2], device=DEVICE)
    weight = torch.tensor([[1.0], [1.0], [0.0]], device=DEVICE)
    for op in (mlm_cross_entropy, mlm_cross_entropy_reference):
        hidden = torch.tensor([[1.0], [-1.0]], device=DEVICE)
        assert op(hidden, weight, torch.zeros(3, device=DEVICE), labels, vocab_size=3)[1].item() == 1


def test_gradients_agree_with_finite_differences() -> None:
    tensors, labels = arguments(5, 9, padded=12, hidden_size=3, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    steps = [torch.randn(tensor.shape, generator=generator).to(DEVICE) for tensor in tensors]

    def value(size: float) -> float:
        moved = [tensor.detach() + size * step for tensor, step in zip(tensors, steps, strict=True)]
        return mlm_cross_entropy(*moved, labels, vocab_size=9)[0].item()

    found = results(mlm_cross_entropy, tensors, labels, vocab_size=9)
    gradients = (found["dhidden"], found["dweight"], found["dbias"])
    slope = sum(float((gradient * step).sum()) for gradient, step in zip(gradients, steps, strict=True))
    assert (value(1e-2) - value(-1e-2)) / 2e-2 == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_one_gradient_alone_is_what_it_is_with_the_others(wanted: int) -> None:
    tensors, labels = arguments(7, 37, padded=40, hidden_size=8, dtype=torch.float32)
    every = torch.autograd.grad(mlm_cross_entropy(*tensors, labels, vocab_size=37)[0], tensors)
    alone = [tensor.detach() for tensor in tensors]
    alone[wanted].requires_grad_()
    mlm_cross_entropy(*alone, labels, vocab_size=37)[0].backward()
    assert [tensor.grad is not None for tensor in alone] == [i == wanted for i in range(3)]
    assert torch.equal(alone[wanted].grad, every[wanted])  # type: ignore[arg-type]


def test_without_gradients_the_loss_is_the_same() -> None:
    tensors, labels = arguments(7, 37, padded=40, hidden_size=8, dtype=torch.float32)
    with torch.no_grad():
        loss, correct = mlm_cross_entropy(*tensors, labels, vocab_size=37)
    found = results(mlm_cross_entropy, tensors, labels, vocab_size=37)
    assert torch.equal(loss, found["loss"]) and torch.equal(correct, found["correct"]) and not loss.requires_grad


@pytest.mark.parametrize("rows", [0, 4], ids=["no rows", "all ignored"])
def test_nothing_that_counts_gives_zero_loss_and_zero_gradients(rows: int) -> None:
    tensors, labels = arguments(rows, 37, padded=40, hidden_size=8, dtype=torch.float32, ignored=1)
    with poison_empty():
        found = results(mlm_cross_entropy, tensors, labels, vocab_size=37)
    assert not any(value.any() for value in found.values())


def test_strided_inputs_are_read_right() -> None:
    tensors, labels = arguments(7, 37, padded=40, hidden_size=8, dtype=torch.float32)
    strided = [F.pad(tensor.detach(), (0, 3))[..., : tensor.shape[-1]].requires_grad_() for tensor in tensors]
    wide_labels = torch.stack((labels, labels - 5), dim=1)[:, 0]
    expected = results(mlm_cross_entropy, tensors, labels, vocab_size=37)
    found = results(mlm_cross_entropy, strided, wide_labels, vocab_size=37)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_it_compiles_without_a_graph_break() -> None:
    tensors, labels = arguments(5, 9, padded=12, hidden_size=3, dtype=torch.float32)
    compiled = torch.compile(mlm_cross_entropy, backend="aot_eager", fullgraph=True)
    eager, traced = (results(op, tensors, labels, vocab_size=9, factor=0.37) for op in (mlm_cross_entropy, compiled))
    assert all(torch.equal(eager[name], traced[name]) for name in eager)


def test_what_the_kernel_cannot_do_is_refused_with_both_numbers() -> None:
    (hidden, weight, bias), labels = arguments(5, 9, padded=12, hidden_size=3, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"\(V, D\), got \[5, 3\] and \[12, 2\]"):
        mlm_cross_entropy(hidden, weight[:, :2], bias, labels, vocab_size=9)
    with pytest.raises(ValueError, match=r"bias_V must have shape \[12\], got \[9\]"):
        mlm_cross_entropy(hidden, weight, bias[:9], labels, vocab_size=9)
    with pytest.raises(ValueError, match=r"weight_VD is .*float16, hidden_PD .*float32"):
        mlm_cross_entropy(hidden, weight.half(), bias, labels, vocab_size=9)
    with pytest.raises(ValueError, match=r"int64, got .*int32"):
        mlm_cross_entropy(hidden, weight, bias, labels.int(), vocab_size=9)
    with pytest.raises(ValueError, match=r"\[1, V = 12\], got 13"):
        mlm_cross_entropy(hidden, weight, bias, labels, vocab_size=13)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU this would need a wait for the device")
def test_a_label_outside_the_vocabulary_is_refused_on_the_cpu() -> None:
    (hidden, weight, bias), labels = arguments(5, 9, padded=12, hidden_size=3, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"\[0, 9\) or -100, got 9"):
        mlm_cross_entropy(hidden, weight, bias, torch.full_like(labels, 9), vocab_size=9)


def test_a_label_outside_the_vocabulary_makes_the_loss_infinite() -> None:
    labels = torch.tensor([0, 9, -3, -100], device=DEVICE)
    logits = torch.zeros(4, 12, device=DEVICE)
    losses, _ = mlm_cross_entropy_kernels.replace_by_gradient(logits, labels, 9, gradient=True)
    assert losses.isinf().tolist() == [False, True, True, False]


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "INTERPRETING", False)
    tensors, labels = [torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1)], torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        mlm_cross_entropy(*tensors, labels, vocab_size=1)
