"""An encoder with its pre-training heads: those of masked words, sentence pairs, or whatever objectives there are.

Letters as in `families/bert.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_ds.basics.micro_batch import NO_FILLINGS, BranchDraws, Fillings
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.encoder.families.table import family_of
from bert_ds.encoder.fused_ops import fused_ops
from bert_ds.encoder.objectives.masked_words import MaskedWords
from bert_ds.encoder.objectives.objective import Objective, Seen, ordered_terms, stacked
from bert_ds.encoder.objectives.sentence_pair import SentencePair, pair_logits
from bert_ds.encoder.word_head import MaskedWordHead


class Logits(NamedTuple):
    """Scores of both heads; pair_N2 is None without the pair head."""

    mlm_PV: Tensor
    pair_N2: Tensor | None


class PretrainingModel(nn.Module):
    """An encoder with the heads of the objectives that it is trained on.

    Its forward returns sums, not means: the caller divides by the counts of the whole global step.

    Args:
        config: the model section of the recipe.
        kernels: "auto", "triton" or "torch", see `fused_ops`.
        has_pair_head: without `objectives`: whether sentence pairs are one, beside masked words.
        activation_checkpointing: recompute each layer in the backward pass.
        init_seed: seed of the initial weights.
        objectives: what it is trained on, masked words among them.
        layer_drop: share of the layers that a step is taken without; who trains draws them.
        stochastic_depth: share of the sequences to which the last layer's blocks add nothing, see `kept_branches`.
    """

    predictions: MaskedWordHead
    """Brought by the objective of masked words."""

    def __init__(
        self,
        config: EncoderConfig,
        *,
        kernels: str = "auto",
        has_pair_head: bool = True,
        activation_checkpointing: bool = False,
        init_seed: int = 0,
        objectives: Sequence[Objective] | None = None,
        layer_drop: float = 0.0,
        stochastic_depth: float = 0.0,
    ) -> None:
        super().__init__()
        ops, family = fused_ops(kernels), family_of(config)
        self.config, self.layer_drop, self.stochastic_depth = config, layer_drop, stochastic_depth
        self.objectives = tuple(plain_objectives(has_pair_head=has_pair_head) if objectives is None else objectives)
        self.terms = ordered_terms(self.objectives)
        self.has_pair_head = any(isinstance(objective, SentencePair) for objective in self.objectives)
        has_front = any(objective.needs_front for objective in self.objectives)
        self.bert = family.make_encoder(
            config, ops, has_front=has_front, activation_checkpointing=activation_checkpointing
        )
        for objective in self.objectives:
            for name, head in objective.heads(config, ops).items():
                self.add_module(name, head)
        for encoder in self.encoders():
            encoder.activation_checkpointing = activation_checkpointing
            encoder.stochastic_depth = stochastic_depth
        family.initialise(self, config, seed=init_seed)

    def encoders(self) -> Iterator[Any]:
        """Yield the encoder and, where replaced tokens are learned, the generator."""
        yield self.bert
        if (generator := getattr(self, "generator", None)) is not None:
            yield generator

    def forward(
        self,
        *,
        input_ids_T: Tensor,
        token_type_ids_T: Tensor,
        position_ids_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        targets: Mapping[str, Tensor],
        kind_counts: tuple[int, ...] = (),
        fillings: Fillings = NO_FILLINGS,
        dropout_seed: Tensor | None = None,
        passed_over: frozenset[int] = frozenset(),
        branches: BranchDraws | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (loss_sums_L, metric_sums_M) of a packed micro-batch, see `objectives.objective.stacked`.

        Args:
            input_ids_T, token_type_ids_T, position_ids_T, cu_seqlens, max_seqlen: see `BertEncoder`.
            dropout_seed, passed_over, branches: see there too.
            targets: by name, those that the objectives read.
            kind_counts: in an evaluation, the number of words to predict of each kind, one kind behind the other.
            fillings: what lies at the end of the stream and of the targets and counts for nothing.
        """
        stream = {
            "input_ids_T": input_ids_T,
            "token_type_ids_T": token_type_ids_T,
            "position_ids_T": position_ids_T,
            "cu_seqlens": cu_seqlens,
            "max_seqlen": max_seqlen,
            "dropout_seed": dropout_seed,
            "passed_over": passed_over,
            "branches": branches,
        }
        seen = Seen(self.bert, stream, targets, kind_counts, fillings=fillings)
        seen.will_read([objective.tokens_read(self, seen) for objective in self.objectives])
        return stacked(self.terms, [objective.sums(self, seen) for objective in self.objectives])

    @torch.no_grad()
    def logits(self, *, masked_positions_P: Tensor, cu_seqlens: Tensor, **stream: Any) -> Logits:
        """Return the scores themselves (real vocabulary only), for checks and predictions; not under ZeRO-3.

        Args:
            masked_positions_P: int64 [P], the tokens of which word scores are wanted.
            cu_seqlens: int32 [N + 1].
            stream: the other arguments of `BertEncoder.forward`.
        """
        hidden_TD = self.bert(cu_seqlens=cu_seqlens, **stream)
        hidden_PD = hidden_TD.index_select(0, masked_positions_P)
        logits_PV = F.linear(*self.predictions.decoder(hidden_PD, self.bert.embeddings.word_weight))
        pair_N2 = pair_logits(self, hidden_TD, cu_seqlens) if self.has_pair_head else None
        return Logits(logits_PV[:, : self.config.vocab_size], pair_N2)


def plain_objectives(*, has_pair_head: bool) -> tuple[Objective, ...]:
    """Return masked words, and sentence pairs where they are wanted, each with weight 1."""
    return (MaskedWords(), SentencePair()) if has_pair_head else (MaskedWords(),)
