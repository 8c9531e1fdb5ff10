"""The masked-LM loss of gathered rows: decoder GEMM, log-sum-exp in fp32, loss sum and number of right guesses.

    logits = hidden @ weight[:vocab_size].T + bias[:vocab_size]
    loss_sum = sum over rows of lse(logits) - logits[label]      dlogits = softmax(logits) - onehot(label)

Letters: P masked positions, D hidden, V vocabulary padded for the GEMM. Rows of weight and bias from vocab_size on are
padding: they get no probability and no gradient. Rows whose label is -100 are ignored. Logits leave the GEMM in the
dtype of hidden and are overwritten by their gradient in that dtype, unscaled; everything between is fp32. The gradient
of the loss is linear in dlogits, so the incoming factor multiplies tensors of P x D only, in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bert_kernels._launch import check_device, values_at_hand
from bert_kernels._operator import operator
from bert_kernels.mlm_cross_entropy_kernels import IGNORED_LABEL, Wanted, empty_gradients, mlm_cross_entropy_forward

# Logits whose fp32 softmax is held at a time. On a CPU that softmax stays in the cache.
_LOGITS_PER_PIECE = {"cpu": 1 << 20, "cuda": 1 << 26}


def mlm_cross_entropy_reference(
    hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_P: Tensor, *, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Return (loss sum, number of rows whose label is likelier than any other token), fp32 scalars (fp64 for fp64).

    A tie is not a right guess: in bf16 ties are common, and a collapsed model ties everywhere.

    Args:
        labels_P: int64, in [0, vocab_size), or -100 for rows that do not count.
        vocab_size: rows of weight_VD and bias_V in use, at most V.
    """
    return _Reference.apply(hidden_PD, weight_VD, bias_V, labels_P, vocab_size)


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_P: Tensor, vocab_size: int
    ) -> tuple[Tensor, Tensor]:
        logits_PV = F.linear(hidden_PD, weight_VD, bias_V)
        logits_PV[:, vocab_size:] = float("-inf")
        dtype = torch.promote_types(logits_PV.dtype, torch.float32)
        loss, correct = logits_PV.new_zeros(2, dtype=dtype).unbind()
        rows = max(1, _LOGITS_PER_PIECE[logits_PV.device.type] // logits_PV.shape[1])
        dbias_V = logits_PV.new_zeros(logits_PV.shape[1], dtype=dtype) if ctx.needs_input_grad[2] else None
        for piece_PV, labels in zip(logits_PV.split(rows), labels_P.split(rows), strict=True):
            piece_loss, piece_correct = _replace_by_gradient(piece_PV, labels, dtype, dbias_V)
            loss, correct = loss + piece_loss, correct + piece_correct
        ctx.save_for_backward(hidden_PD, weight_VD, logits_PV, dbias_V)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _dcorrect: Tensor) -> tuple[Tensor | None, ...]:
        hidden_PD, weight_VD, dlogits_PV, dbias_V = ctx.saved_tensors
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        dhidden = _scaled(dlogits_PV @ weight_VD, dloss) if needs_hidden else None
        dweight = dlogits_PV.T @ _scaled(hidden_PD, dloss) if needs_weight else None
        dbias = None if dbias_V is None else (dbias_V * dloss).to(dlogits_PV.dtype)
        return dhidden, dweight, dbias, None, None


def _replace_by_gradient(
    logits_PV: Tensor, labels_P: Tensor, dtype: torch.dtype, dbias_V: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Overwrite logits by softmax - onehot (0 for ignored rows) and return (loss sum, number right) in `dtype`.

    The sum of the rows is added to `dbias_V` here, where they are in the cache and not rounded yet.
    """
    counts_P1 = (labels_P != IGNORED_LABEL).to(dtype)[:, None]
    labels_P1 = labels_P.clamp(min=0)[:, None]
    p_PV = torch.softmax(logits_PV, dim=1, dtype=dtype)
    label_logit_P1, label_p_P1 = logits_PV.gather(1, labels_P1), p_PV.gather(1, labels_P1)
    p_PV.scatter_add_(1, labels_P1, torch.full_like(counts_P1, -1.0))
    # What is at most 0 now is the label's, so this is the likeliest of the others.
    other_p_P1 = p_PV.amax(dim=1, keepdim=True)
    # lse = logit - log(p) for any token; for the likeliest, whose p is at least 1/V, nothing underflows.
    lse_P1 = logits_PV.amax(dim=1, keepdim=True) - torch.maximum(label_p_P1, other_p_P1).log()
    torch.mul(p_PV, counts_P1, out=logits_PV)
    if dbias_V is not None:
        dbias_V.addmv_(p_PV.mT, counts_P1[:, 0])
    loss = ((lse_P1 - label_logit_P1) * counts_P1).sum()
    return loss, ((label_p_P1 > other_p_P1) * counts_P1).sum()


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply in the factor's precision: rounded to bf16 it would bring the same error to every gradient."""
    return (x.to(factor.dtype) * factor).to(x.dtype)


@operator("bert_kernels::mlm_cross_entropy")
def _mlm_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, vocab_size: int, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return mlm_cross_entropy_forward(hidden, weight, bias, labels, vocab_size, Wanted(*wanted))


@_mlm_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, vocab_size: int, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=torch.float32)
    return loss, torch.empty_like(loss), *empty_gradients(hidden, weight, Wanted(*wanted))


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    hidden, *_ = inputs
    _loss, correct, *gradients = output
    ctx.save_for_backward(*gradients)
    ctx.dtype = hidden.dtype
    ctx.mark_non_differentiable(correct, *gradients)


def _backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    # One pass: the product is fp32 and rounded as it is written.
    dhidden, dweight, dbias = (
        torch.mul(gradient, dloss, out=torch.empty_like(gradient, dtype=ctx.dtype)) if needed else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
    )
    return dhidden, dweight, dbias, None, None, None


_mlm_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def mlm_cross_entropy(
    hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_P: Tensor, *, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Return (loss sum, number of right rows) as mlm_cross_entropy_reference does, by the Triton kernel.

    The gradients are computed here, with the loss. Not differentiable twice.

    Args:
        labels_P: int64, in [0, vocab_size) or -100. On a GPU this cannot be checked without a wait: another label makes
            the loss infinite.

    Raises:
        ValueError: an argument is outside what the kernel can do.
    """
    tensors = {"hidden_PD": hidden_PD, "weight_VD": weight_VD, "bias_V": bias_V}
    check_device("mlm_cross_entropy", **tensors, labels_P=labels_P)
    _check(tensors, labels_P, vocab_size)
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors.values()]
    loss, correct, *_ = _mlm_cross_entropy(*tensors.values(), labels_P.contiguous(), vocab_size, wanted)
    return loss, correct


def _check(tensors: dict[str, Tensor], labels_P: Tensor, vocab_size: int) -> None:
    hidden, weight = tensors["hidden_PD"], tensors["weight_VD"]
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        found = f"{list(hidden.shape)} and {list(weight.shape)}"
        raise ValueError(f"mlm_cross_entropy: hidden_PD and weight_VD must be (P, D) and (V, D), got {found}")
    for name, tensor, shape in (
        ("bias_V", tensors["bias_V"], weight.shape[:1]),
        ("labels_P", labels_P, hidden.shape[:1]),
    ):
        if tensor.shape != shape:
            raise ValueError(f"mlm_cross_entropy: {name} must have shape {list(shape)}, got {list(tensor.shape)}")
    for name, tensor in tensors.items():
        if tensor.dtype != hidden.dtype or tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            wanted = "bfloat16, float16 or float32, all alike"
            raise ValueError(f"mlm_cross_entropy: {name} is {tensor.dtype}, hidden_PD {hidden.dtype}: wanted {wanted}")
    if labels_P.dtype != torch.int64:
        raise ValueError(f"mlm_cross_entropy: labels_P must be torch.int64, got {labels_P.dtype}")
    if not 1 <= vocab_size <= weight.shape[0]:
        raise ValueError(f"mlm_cross_entropy: vocab_size must be in [1, V = {weight.shape[0]}], got {vocab_size}")
    if values_at_hand(labels_P):
        wrong = labels_P[((labels_P < 0) | (labels_P >= vocab_size)) & (labels_P != IGNORED_LABEL)]
        if len(wrong):
            raise ValueError(f"mlm_cross_entropy: labels_P must be in [0, {vocab_size}) or -100, got {int(wrong[0])}")
