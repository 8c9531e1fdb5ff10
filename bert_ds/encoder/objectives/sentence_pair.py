"""Sentence pairs: whether the second is the next one (NSP, arXiv 1810.04805), or whether both are in order (SOP).

The order of two segments is ALBERT's objective (Lan et al. 2020, arXiv 1909.11942). Both are one classifier over the
pooled [CLS]; which of them it learns, the corpus says. Letters as in `encoder/families/bert.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bert_ds.basics.loss_term import LossTerm
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.encoder.blocks import first_tokens
from bert_ds.encoder.families.table import family_of
from bert_ds.encoder.fused_ops import FusedOps
from bert_ds.encoder.objectives.objective import Seen, Sums


class SentencePair:
    """Reads targets["pair_labels"], int64 [N] in {0, 1, IGNORE_INDEX}; 0 means is next (NSP) or in order (SOP).

    Args:
        weight: of the loss.
    """

    needs_front = True
    num_classes = 2

    def __init__(self, weight: float = 1.0) -> None:
        self.terms = (LossTerm("pair", count="sentence_pair", metric="pair_correct", weight=weight),)

    def heads(self, config: EncoderConfig, ops: FusedOps) -> dict[str, nn.Module]:
        """Return the classifier."""
        pair_head = family_of(config).pair_head
        assert pair_head is not None, "refused where the recipe is read"
        return {"seq_relationship": pair_head(config, self.num_classes)}

    def tokens_read(self, model: Any, seen: Seen) -> Tensor | None:
        """See `Objective.tokens_read`."""
        return tokens_of_sequences(model.bert, seen.stream)

    def sums(self, model: Any, seen: Seen) -> Sums:
        """See `Objective.sums`."""
        labels_N = seen.targets["pair_labels"]
        logits_NC = pair_logits(model, seen.hidden_TD, seen.stream["cu_seqlens"]).float()
        loss = F.cross_entropy(logits_NC, labels_N, ignore_index=IGNORE_INDEX, reduction="sum")
        return Sums({"pair": loss}, {"pair_correct": (logits_NC.argmax(dim=-1) == labels_N).sum().float()})


def tokens_of_sequences(encoder: Any, stream: Mapping[str, Any]) -> Tensor | None:
    """Return the tokens that `sequence_rows` of an encoder reads, int64 [N]; None for all."""
    if not encoder.reads_first_tokens:
        return None
    return first_tokens(stream["cu_seqlens"], num_tokens=len(stream["input_ids_T"]))


def pair_logits(model: Any, hidden_TD: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return logits_NC of a model that has the classifier."""
    return model.seq_relationship(model.bert.sequence_rows(hidden_TD, cu_seqlens))
