"""GELU of a biased input, the activation of BERT's feed-forward layer.

    y = gelu(x + bias);  gelu(u) = u * Phi(u) ("none", the published erf form) or its tanh approximation ("tanh")

Letters: T tokens, F intermediate. Inputs and outputs bf16, fp16 or fp32; the maths is fp32.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def bias_gelu_reference(x_TF: Tensor, bias_F: Tensor, *, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """Return gelu(x_TF + bias_F) of shape (T, F), in x_TF's dtype."""
    return F.gelu(x_TF + bias_F, approximate=approximate)


def bias_gelu(x_TF: Tensor, bias_F: Tensor, *, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """Not written yet: use bias_gelu_reference."""
    raise NotImplementedError("bias_gelu has no Triton kernel yet; choose the torch operators")
