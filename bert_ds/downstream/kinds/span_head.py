"""Head of extractive question answering: where an answer begins and where it ends.

N sequences, T tokens. The softmax runs over the tokens of each sequence; [CLS], the first, stands for no answer here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_ds.basics.loss_term import LossTerm
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.downstream.kinds.task_model import HeadInput, HeadOutput, head_site, role_of
from bert_ds.encoder.families.family import RoleName
from bert_ds.encoder.fused_ops import FusedOps


class SpanHead(nn.Module):
    """Two scores per token, of the begin and of the end; with dropout in front where the family's class has it."""

    roles: tuple[RoleName, ...] = ("question answering",)
    terms = (LossTerm("span", count="span", metric="span_correct"),)

    def __init__(self, config: EncoderConfig, *, ops: FusedOps) -> None:
        super().__init__()
        drops = role_of(config, "question answering").has_dropout
        self.ops, self.site = ops, head_site(config)
        self.dropout_prob = config.classifier_dropout_prob if drops else 0.0
        self.weight = nn.Parameter(torch.empty(2, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(2))

    def forward(self, stream: HeadInput, targets: Mapping[str, Tensor]) -> HeadOutput:
        """Compare with targets["span"], int64 [N, 2]: tokens of the sequence; IGNORE_INDEX counts for nothing.

        The loss is the mean of the two cross-entropies. A span is correct when no token beats its begin nor its end.
        """
        dropped_TD = self.ops.dropout(
            stream.token_TD,
            dropout_p=self.dropout_prob if self.training else 0.0,
            dropout_seed=stream.dropout_seed,
            site=self.site,
        )
        scores_T2 = F.linear(dropped_TD, self.weight, self.bias).float()
        scores = {"token_scores": scores_T2}
        if "span" not in targets:
            zero = scores_T2.sum()[None] * 0.0
            return HeadOutput(zero, zero, scores)
        span_N2 = targets["span"]
        counts_N = (span_N2[:, 0] != IGNORE_INDEX).float()
        top_N2, log_sum_N2 = softmax_parts(scores_T2, stream.cu_seqlens)
        tokens_N2 = stream.cu_seqlens[:-1, None] + span_N2.clamp(min=0)
        chosen_N2 = scores_T2.gather(0, tokens_N2.long())
        loss = ((log_sum_N2 - chosen_N2).mean(dim=1) * counts_N).sum()
        num_correct = ((chosen_N2 >= top_N2).all(dim=1) * counts_N).sum()
        return HeadOutput(loss[None], num_correct[None], scores)


def softmax_parts(scores_TC: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest score and log-sum-exp of each of N groups of rows, fp32 [N, C] each.

    Args:
        scores_TC: fp32.
        starts: whole numbers [N + 1], group n is rows starts[n] to starts[n + 1].
    """
    shape = len(starts) - 1, scores_TC.shape[1]
    group_T = torch.repeat_interleave(
        torch.arange(shape[0], device=scores_TC.device), starts.diff(), output_size=len(scores_TC)
    )
    top_NC = scores_TC.new_full(shape, -torch.inf)
    top_NC = top_NC.scatter_reduce(0, group_T[:, None].expand(-1, shape[1]), scores_TC.detach(), "amax")
    shifted_TC = (scores_TC - top_NC[group_T]).exp()
    sums_NC = scores_TC.new_zeros(shape).index_add(0, group_T, shifted_TC)
    return top_NC, top_NC + sums_NC.log()
