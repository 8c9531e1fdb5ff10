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
from bert_ds.encoder.blocks import mean_rows
from bert_ds.encoder.families.family import RoleName

TEMPERATURE = 0.05
"""Contrastive loss: cosines are divided by this, which is sentence-transformers' scale of 20."""


class EmbeddingHead(nn.Module):
    """Mean pooling over all tokens, [CLS] and [SEP] included, as sentence-transformers does it; it has no weights.

    Which loss it is, the targets say. The contrastive one finds each first sentence's partner among the second ones of
    the same micro-batch (Henderson et al. 2017, arXiv 1705.00652): it depends on the size of the micro-batch, and each
    rank looks at its own.
    """

    roles: tuple[RoleName, ...] = ("encoder",)
    terms = (LossTerm("pair", count="pair"),)

    def forward(self, stream: HeadInput, targets: Mapping[str, Tensor]) -> HeadOutput:
        """Compare with targets["cosine"], fp32 [F], or with targets["partner"], int64 [F].

        A pair of which the partner is IGNORE_INDEX need not be found; its second sentence is there to be told apart.
        """
        vectors_ND = mean_rows(stream.token_TD, stream.cu_seqlens)
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
