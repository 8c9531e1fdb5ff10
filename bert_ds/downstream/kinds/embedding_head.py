"""Head of sentence embeddings: the mean over a sentence's tokens, and a loss over pairs of sentences.

N sequences, two after each other for each of F pairs; D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_ds.basics.loss_term import LossTerm
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.downstream.kinds.task_model import HeadInput, HeadOutput

TEMPERATURE = 0.05
"""Contrastive loss: cosines are divided by this, which is sentence-transformers' scale of 20."""


class EmbeddingHead(nn.Module):
    """Mean pooling over all tokens, [CLS] and [SEP] included, as sentence-transformers does it; it has no weights.

    Which loss it is, the targets say. The contrastive one finds each first sentence's partner among the second ones of
    the same micro-batch (Henderson et al. 2017, arXiv 1705.00652): it depends on the size of the micro-batch, and each
    rank looks at its own.
    """

    needs_pooler = False
    terms = (LossTerm("pair", count="pair"),)

    def forward(self, stream: HeadInput, targets: Mapping[str, Tensor]) -> HeadOutput:
        """Compare with targets["cosine"], fp32 [F], or with targets["partner"], int64 [F].

        A pair of which the partner is IGNORE_INDEX need not be found; its second sentence is there to be told apart.
        """
        vectors_ND = mean_of_tokens(stream.hidden_TD, stream.cu_seqlens)
        scores = {"vectors": vectors_ND}
        none = vectors_ND.new_zeros(0)
        if not targets:
            return HeadOutput(vectors_ND.sum()[None] * 0.0, none, scores)
        left_FD, right_FD = F.normalize(vectors_ND, dim=-1).unflatten(0, (-1, 2)).unbind(dim=1)
        if "cosine" in targets:
            loss = F.mse_loss((left_FD * right_FD).sum(dim=-1), targets["cosine"], reduction="sum")
            return HeadOutput(loss[None], none, scores)
        cosines_FF = left_FD @ right_FD.T / TEMPERATURE
        own_F = torch.arange(len(cosines_FF), device=cosines_FF.device)
        labels_F = torch.where(targets["partner"] == IGNORE_INDEX, IGNORE_INDEX, own_F)
        loss = F.cross_entropy(cosines_FF, labels_F, ignore_index=IGNORE_INDEX, reduction="sum")
        return HeadOutput(loss[None], none, scores)


def mean_of_tokens(hidden_TD: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the mean over the tokens of each sequence, fp32 [N, D]."""
    lengths_N = cu_seqlens.diff()
    sequence_T = torch.repeat_interleave(
        torch.arange(len(lengths_N), device=hidden_TD.device), lengths_N, output_size=len(hidden_TD)
    )
    sums_ND = hidden_TD.new_zeros(len(lengths_N), hidden_TD.shape[1], dtype=torch.float32)
    return sums_ND.index_add(0, sequence_T, hidden_TD.float()) / lengths_N[:, None]
