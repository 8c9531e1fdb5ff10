"""Heads of classification, multi-label and regression tasks, of tagging, of both at once, and of multiple choice.

N sequences, T tokens, D hidden, L labels. Losses are sums in nats (regression: squares) over the targets; a target of
IGNORE_INDEX counts for nothing. The formulas are those of Hugging Face's BertFor... classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_ds.basics.loss_term import LossTerm
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.downstream.kinds.span_head import softmax_parts
from bert_ds.downstream.kinds.task_model import HeadInput, HeadOutput, head_site
from bert_ds.encoder.families.family import RoleName
from bert_ds.encoder.fused_ops import FusedOps

Objective = Literal["one_of", "any_of", "number"]


class Projection(nn.Module):
    """Dropout, then one score per label."""

    def __init__(self, config: EncoderConfig, num_labels: int, *, ops: FusedOps, site: int) -> None:
        super().__init__()
        self.ops, self.site, self.dropout_prob = ops, site, config.classifier_dropout_prob
        self.weight = nn.Parameter(torch.empty(num_labels, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(num_labels))

    def forward(self, rows_RD: Tensor, dropout_seed: Tensor | None) -> Tensor:
        """Return fp32 scores [R, L] of rows of any kind."""
        dropped_RD = self.ops.dropout(
            rows_RD, dropout_p=self.dropout_prob if self.training else 0.0, dropout_seed=dropout_seed, site=self.site
        )
        return F.linear(dropped_RD, self.weight, self.bias).float()


class SequenceHead(nn.Module):
    """Scores of whole sequences: one label of several, any of them, or a number.

    Args:
        config: shape and dropout.
        num_labels: scores per sequence.
        objective: one_of (cross-entropy), any_of (binary cross-entropy per label) or number (squared error).
        ops: the table of fused operations.
        class_weights: one_of only: weight of each label in the loss.
    """

    roles: tuple[RoleName, ...] = ("sequence classification",)

    def __init__(
        self,
        config: EncoderConfig,
        num_labels: int,
        *,
        objective: Objective,
        ops: FusedOps,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.class_weights = class_weights
        metric = None if objective == "number" else "label_correct"
        self.terms = (LossTerm("label", count="label", metric=metric),)
        self.classifier = Projection(config, num_labels, ops=ops, site=head_site(config))

    def forward(self, stream: HeadInput, targets: Mapping[str, Tensor]) -> HeadOutput:
        """Compare with targets["label"]: int64 [N], or fp32 [N, L] for any_of and number."""
        assert stream.sequence_ND is not None
        scores_NL = self.classifier(stream.sequence_ND, stream.dropout_seed)
        return _compared(scores_NL, targets.get("label"), self.objective, self.class_weights, name="scores")


class TokenHead(nn.Module):
    """A tag for every token; the first piece of a word is the one that has a target."""

    roles: tuple[RoleName, ...] = ("token tags",)
    terms = (LossTerm("tag", count="tag", metric="tag_correct"),)

    def __init__(
        self, config: EncoderConfig, num_labels: int, *, ops: FusedOps, class_weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.class_weights = class_weights
        self.classifier = Projection(config, num_labels, ops=ops, site=head_site(config))

    def forward(self, stream: HeadInput, targets: Mapping[str, Tensor]) -> HeadOutput:
        """Compare with targets["tag"], int64 [T]."""
        scores_TL = self.classifier(stream.token_TD, stream.dropout_seed)
        return _compared(scores_TL, targets.get("tag"), "one_of", self.class_weights, name="token_scores")


class IntentSlotHead(nn.Module):
    """One label for the sequence and a tag for every token, over one encoder (Chen et al. 2019, arXiv 1902.10909)."""

    roles: tuple[RoleName, ...] = ("sequence classification", "token tags")
    terms = (
        LossTerm("intent", count="intent", metric="intent_correct"),
        LossTerm("tag", count="tag", metric="tag_correct"),
    )

    def __init__(self, config: EncoderConfig, *, num_intents: int, num_tags: int, ops: FusedOps) -> None:
        super().__init__()
        site = head_site(config)
        self.intent_classifier = Projection(config, num_intents, ops=ops, site=site)
        self.tag_classifier = Projection(config, num_tags, ops=ops, site=site + 1)

    def forward(self, stream: HeadInput, targets: Mapping[str, Tensor]) -> HeadOutput:
        """Compare with targets["intent"], int64 [N], and targets["tag"], int64 [T]."""
        assert stream.sequence_ND is not None
        scores_NL = self.intent_classifier(stream.sequence_ND, stream.dropout_seed)
        scores_TL = self.tag_classifier(stream.token_TD, stream.dropout_seed)
        intent = _compared(scores_NL, targets.get("intent"), "one_of", None, name="scores")
        tags = _compared(scores_TL, targets.get("tag"), "one_of", None, name="token_scores")
        return HeadOutput(
            torch.cat((intent.loss_sums_L, tags.loss_sums_L)),
            torch.cat((intent.metric_sums_M, tags.metric_sums_M)),
            {**intent.scores, **tags.scores},
        )


class ChoiceHead(nn.Module):
    """One score per choice; each choice is a sequence of its own, and those of a question compete in a softmax."""

    roles: tuple[RoleName, ...] = ("multiple choice",)
    terms = (LossTerm("choice", count="choice", metric="choice_correct"),)

    def __init__(self, config: EncoderConfig, *, ops: FusedOps) -> None:
        super().__init__()
        self.classifier = Projection(config, 1, ops=ops, site=head_site(config))

    def forward(self, stream: HeadInput, targets: Mapping[str, Tensor]) -> HeadOutput:
        """Compare with targets["choice"], int64 [Q]; targets["num_choices"], int64 [Q], cuts the N sequences.

        An answer is right when no other choice of its question beats it.
        """
        assert stream.sequence_ND is not None
        scores_N = self.classifier(stream.sequence_ND, stream.dropout_seed).squeeze(1)
        if "choice" not in targets:
            zero = scores_N.sum()[None] * 0.0
            return HeadOutput(zero, zero, {"scores": scores_N})
        starts = F.pad(targets["num_choices"].cumsum(0), (1, 0))
        top_Q1, log_sum_Q1 = softmax_parts(scores_N[:, None], starts)
        counts_Q = (targets["choice"] != IGNORE_INDEX).float()
        chosen_Q = scores_N.gather(0, starts[:-1] + targets["choice"].clamp(min=0))
        loss = ((log_sum_Q1[:, 0] - chosen_Q) * counts_Q).sum()
        num_correct = ((chosen_Q >= top_Q1[:, 0]) * counts_Q).sum()
        return HeadOutput(loss[None], num_correct[None], {"scores": scores_N})


def _compared(
    scores_RL: Tensor, targets: Tensor | None, objective: Objective, class_weights: Sequence[float] | None, *, name: str
) -> HeadOutput:
    """Return the sum of losses and of right answers of rows of scores."""
    if targets is None:
        zero = scores_RL.sum()[None] * 0.0
        return HeadOutput(zero, zero if objective != "number" else zero[:0], {name: scores_RL})
    if objective == "number":
        loss = F.mse_loss(scores_RL, targets, reduction="sum")
        return HeadOutput(loss[None], loss.new_zeros(0), {name: scores_RL})
    if objective == "any_of":
        loss = F.binary_cross_entropy_with_logits(scores_RL, targets, reduction="sum")
        num_correct = ((scores_RL > 0) == (targets > 0.5)).sum().float()
        return HeadOutput(loss[None], num_correct[None], {name: scores_RL})
    weights = None if class_weights is None else _on_device(tuple(class_weights), scores_RL.device)
    loss = F.cross_entropy(scores_RL, targets, weight=weights, ignore_index=IGNORE_INDEX, reduction="sum")
    num_correct = (scores_RL.argmax(dim=-1) == targets).sum().float()
    return HeadOutput(loss[None], num_correct[None], {name: scores_RL})


@lru_cache(maxsize=8)
def _on_device(weights: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the weights, fp32 [L]; kept, because every copy of a list makes the host wait for the card."""
    return torch.tensor(weights, device=device)
