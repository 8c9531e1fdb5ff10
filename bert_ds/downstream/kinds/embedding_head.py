"""Head of sentence embeddings: a vector for every sequence, and a loss over pairs of them.

A row is a text, its partner and, where the task has them, texts that are no partners of it: K sequences after each
other. B rows of a step, R of them summed over, N = B K sequences, C = B (K - 1) candidates, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_ds.basics.loss_term import LossTerm
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.configuration.task.task_sections import EmbeddingConfig
from bert_ds.downstream.kinds.task_model import HeadInput, HeadOutput
from bert_ds.encoder.blocks import first_rows, mean_rows
from bert_ds.encoder.families.family import RoleName


class EmbeddingHead(nn.Module):
    """Pooling as sentence-transformers does it, over all tokens, [CLS] and [SEP] included; it has no weights.

    A loss that compares a row with others sees all rows of the step (`whole_step_loss`); in an evaluation, where
    it is a figure and no more, those of the batch.

    Args:
        settings: of the task.
    """

    roles: tuple[RoleName, ...] = ("encoder",)
    terms = (LossTerm("pair", count="pair"),)

    def __init__(self, settings: EmbeddingConfig = EmbeddingConfig()) -> None:  # noqa: B008 - it is frozen
        super().__init__()
        self.settings = settings
        self.num_layers_read = settings.pooled_layers if settings.pooling == "last_layers" else 1
        self.whole_step_loss = None if settings.loss == "cosine" else self._loss

    def forward(self, stream: HeadInput, targets: Mapping[str, Tensor]) -> HeadOutput:
        """Return the vectors, fp32 [N, D], and the loss.

        The targets are "cosine", fp32 [B], or "partner", int64 [B], with "texts", int64 [B, K]: equal numbers are equal
        texts. A row of which the partner is IGNORE_INDEX need not find its second text, which is there to be told from
        the others' partners.
        """
        pooled = first_rows if self.settings.pooling == "cls" else mean_rows
        vectors_ND = pooled(stream.token_TD, stream.cu_seqlens).float()
        if not targets or (self.training and self.whole_step_loss is not None):
            sums_L = vectors_ND.sum()[None] * 0.0
        else:
            sums_L = self._loss(vectors_ND, targets, slice(0, len(next(iter(targets.values())))))
        return HeadOutput(sums_L, vectors_ND.new_zeros(0), {"vectors": vectors_ND})

    def _loss(self, vectors_ND: Tensor, targets: Mapping[str, Tensor], own: slice) -> Tensor:
        """See `WholeStepLoss`; the mean over the sizes that a vector is cut to (Kusupati et al. 2022, 2205.13147)."""
        vectors_BKD = vectors_ND.unflatten(0, (len(next(iter(targets.values()))), -1))
        if self.settings.loss == "contrastive":
            hidden_RC, labels_R = _to_be_told_apart(targets["texts"], targets["partner"], own)
        losses = []
        for size in sorted({*self.settings.matryoshka, vectors_ND.shape[1]}):
            unit_BKD = F.normalize(vectors_BKD[..., :size], dim=-1)
            if self.settings.loss == "contrastive":
                logits_RC = unit_BKD[own, 0] @ unit_BKD[:, 1:].flatten(0, 1).T * self.settings.scale
                logits_RC = logits_RC.masked_fill(hidden_RC, -torch.inf)
                losses.append(F.cross_entropy(logits_RC, labels_R, ignore_index=IGNORE_INDEX, reduction="sum"))
                continue
            cosines_B = (unit_BKD[:, 0] * unit_BKD[:, 1]).sum(dim=-1)
            if self.settings.loss == "cosent":
                losses.append(_cosent(cosines_B * self.settings.scale, targets["cosine"], own))
            else:
                losses.append(F.mse_loss(cosines_B[own], targets["cosine"][own], reduction="sum"))
        return torch.stack(losses).mean()[None]


def _to_be_told_apart(texts_BK: Tensor, partner_B: Tensor, own: slice) -> tuple[Tensor, Tensor]:
    """Return which candidates a row is not compared with, bool [R, C], and the place of its partner, int64 [R].

    Left out is what would be a wrong negative: the row's own text, its partner elsewhere, and the partners of rows with
    the same text.
    """
    own_BK, own_partner_R = texts_BK[own], partner_B[own]
    num_candidates = texts_BK.shape[1] - 1
    equal_RBK = (texts_BK[None, :, 1:, None] == own_BK[:, None, None, :2]).any(dim=-1)
    twins_RB = (own_BK[:, :1] == texts_BK[None, :, 0]) & (partner_B != IGNORE_INDEX)
    equal_RBK[..., 0] |= twins_RB
    places_R = torch.arange(own.start, own.stop, device=texts_BK.device) * num_candidates
    hidden_RC = equal_RBK.flatten(1).scatter(1, places_R[:, None], False)
    return hidden_RC, torch.where(own_partner_R == IGNORE_INDEX, IGNORE_INDEX, places_R)


def _cosent(scaled_B: Tensor, wanted_B: Tensor, own: slice) -> Tensor:
    """Return the share of some rows in CoSENT: log(1 + sum over wanted_i > wanted_j of exp(scaled_j - scaled_i)).

    The formula is one number for all rows (Su 2022, kexue.fm/archives/8847, as in sentence-transformers): of each row
    it is counted once, so that their mean is it.
    """
    exponents_BB = (scaled_B[None, :] - scaled_B[:, None]).masked_fill(
        wanted_B[:, None] <= wanted_B[None, :], -torch.inf
    )
    return F.pad(exponents_BB.flatten(), (1, 0)).logsumexp(dim=0) * (own.stop - own.start)
