"""The update of Muon: a matrix with its singular values brought near 1, by a polynomial in place of a decomposition.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks": with X = U / |U| (Frobenius), a few times

    X = a X + (b A + c A^2) X,   A = X X^T

which applies p(s) = a s + b s^3 + c s^5 to every singular value s. The published (a, b, c) do not converge: they bring
every s above 0.01 into about (0.7, 1.2) in five steps, which trains as well as 1. With a polynomial of its own each
step does more: the first is the best on [l, 1], the second on what the first leaves, and so on (Amsel et al. 2025, "The
Polar Express", arXiv 2505.16932).

Letters: M rows, N columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bert_ds.configuration.recipe.muon_polynomials import Polynomial
from bert_kernels.lamb import squared_norm

_EPS = 1e-7
"""Added to the norm: a matrix of zeros stays one."""


def orthogonalise(update_MN: Tensor, *, polynomials: Sequence[Polynomial]) -> Tensor:
    """Return the orthogonalised matrix, in the dtype of the update, which is left as it is.

    The norm is accumulated in fp64: in fp32 it is off by 4e-5 at 768 x 3072, and the polynomial is not scale-free.

    Args:
        update_MN: fp32 or bf16 [M, N].
        polynomials: (a, b, c) of each step, at least one.
    """
    tall = update_MN.shape[0] > update_MN.shape[1]
    x = update_MN.mT if tall else update_MN
    norm = squared_norm(update_MN.reshape(-1)).sqrt() + _EPS
    x = x.float().div(norm.float()).to(update_MN.dtype)
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def update_scale(rows: int, columns: int) -> float:
    """Return the factor that gives an orthogonalised matrix the root mean square of AdamW's updates, about 0.2.

    0.2 sqrt(max(M, N)), Liu et al. 2025, arXiv 2502.16982: a learning rate and decay found for AdamW carry over.
    """
    return 0.2 * math.sqrt(max(rows, columns))


def orthogonalising_dtype(device: torch.device) -> torch.dtype:
    """Return the precision the polynomial is evaluated in where a run does not say it: bf16 on a GPU, else fp32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
