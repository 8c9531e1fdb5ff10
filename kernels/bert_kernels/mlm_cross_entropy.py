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

_IGNORED_LABEL = -100
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
        for piece_PV, labels in zip(logits_PV.split(rows), labels_P.split(rows), strict=True):
            piece_loss, piece_correct = _replace_by_gradient(piece_PV, labels, dtype)
            loss, correct = loss + piece_loss, correct + piece_correct
        ctx.save_for_backward(hidden_PD, weight_VD, logits_PV)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _dcorrect: Tensor) -> tuple[Tensor | None, ...]:
        hidden_PD, weight_VD, dlogits_PV = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dhidden = _scaled(dlogits_PV @ weight_VD, dloss) if needs_hidden else None
        dweight = dlogits_PV.T @ _scaled(hidden_PD, dloss) if needs_weight else None
        dbias = (dlogits_PV.sum(0, dtype=dloss.dtype) * dloss).to(dlogits_PV.dtype) if needs_bias else None
        return dhidden, dweight, dbias, None, None


def _replace_by_gradient(logits_PV: Tensor, labels_P: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Overwrite logits by softmax - onehot (0 for ignored rows) and return (loss sum, number right) in `dtype`."""
    counts_P1 = (labels_P != _IGNORED_LABEL).to(dtype)[:, None]
    labels_P1 = labels_P.clamp(min=0)[:, None]
    p_PV = torch.softmax(logits_PV, dim=1, dtype=dtype)
    label_logit_P1, label_p_P1 = logits_PV.gather(1, labels_P1), p_PV.gather(1, labels_P1)
    p_PV.scatter_add_(1, labels_P1, torch.full_like(counts_P1, -1.0))
    # What is at most 0 now is the label's, so this is the likeliest of the others.
    other_p_P1 = p_PV.amax(dim=1, keepdim=True)
    # lse = logit - log(p) for any token; for the likeliest, whose p is at least 1/V, nothing underflows.
    lse_P1 = logits_PV.amax(dim=1, keepdim=True) - torch.maximum(label_p_P1, other_p_P1).log()
    torch.mul(p_PV, counts_P1, out=logits_PV)
    loss = ((lse_P1 - label_logit_P1) * counts_P1).sum()
    return loss, ((label_p_P1 > other_p_P1) * counts_P1).sum()


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply in the factor's precision: rounded to bf16 it would bring the same error to every gradient."""
    return (x.to(factor.dtype) * factor).to(x.dtype)


def mlm_cross_entropy(
    hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_P: Tensor, *, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Not written yet: use mlm_cross_entropy_reference."""
    raise NotImplementedError("mlm_cross_entropy has no Triton kernel yet; choose the torch operators")
