"""The masked-LM loss of gathered rows: decoder GEMM, log-sum-exp in fp32, loss sum and number of right guesses.

    logits = hidden @ weight[:vocab_size].T + bias[:vocab_size]
    loss_sum = sum over rows of lse(logits) - logits[label]

Letters: P masked positions, D hidden, V vocabulary padded for the GEMM. Rows of weight and bias from vocab_size on are
padding: they get no probability and no gradient. Rows whose label is -100 are ignored. Logits leave the GEMM in the
dtype of hidden; everything after it is fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_IGNORED_LABEL = -100
# Above this many logits the rows are taken in parts whose logits are recomputed in backward.
_MAX_LOGITS = 1 << 26


def mlm_cross_entropy_reference(
    hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_P: Tensor, *, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Return (loss sum, number of rows whose likeliest token is the label), fp32 scalars.

    Args:
        labels_P: int64, in [0, vocab_size), or -100 for rows that do not count.
        vocab_size: rows of weight_VD and bias_V in use, at most V.
    """
    rows = max(1, _MAX_LOGITS // weight_VD.shape[0])
    if hidden_PD.shape[0] <= rows:
        return _loss_of_rows(hidden_PD, weight_VD, bias_V, labels_P, vocab_size)
    loss, correct = hidden_PD.new_zeros((), dtype=torch.float32), hidden_PD.new_zeros((), dtype=torch.float32)
    for hidden_part, labels_part in zip(hidden_PD.split(rows), labels_P.split(rows), strict=True):
        part = checkpoint(
            _loss_of_rows, hidden_part, weight_VD, bias_V, labels_part, vocab_size,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        loss, correct = loss + part[0], correct + part[1]
    return loss, correct


def _loss_of_rows(
    hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_P: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    logits_PV = F.linear(hidden_PD, weight_VD, bias_V)[:, :vocab_size].float()
    loss = F.cross_entropy(logits_PV, labels_P, ignore_index=_IGNORED_LABEL, reduction="sum")
    if logits_PV.shape[0] == 0:
        return loss, loss.detach().clone()
    with torch.no_grad():
        correct = (logits_PV.argmax(dim=1) == labels_P).sum().float()
    return loss, correct


def mlm_cross_entropy(
    hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_P: Tensor, *, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Not written yet: use mlm_cross_entropy_reference."""
    raise NotImplementedError("mlm_cross_entropy has no Triton kernel yet; choose the torch operators")
