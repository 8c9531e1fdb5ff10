"""BERT with its pre-training heads: masked words, and next sentence (NSP) or sentence order (SOP).

The masked-word head runs on the P masked tokens only; (T, V) scores never exist. Letters as in `modeling_bert.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_ds.configuration.recipe.run_config import IGNORE_INDEX, ModelConfig
from bert_ds.encoder.fused_ops import FusedOps, fused_ops
from bert_ds.encoder.modeling_bert import BertEncoder, gelu_approximation, initialise_weights


class Logits(NamedTuple):
    """Scores of both heads; pair_N2 is None without the pair head."""

    mlm_PV: Tensor
    pair_N2: Tensor | None


class MaskedWordHead(nn.Module):
    """Dense, GELU, LayerNorm, then the word embedding as decoder with a bias of its own."""

    def __init__(self, config: ModelConfig, ops: FusedOps) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.ops = ops
        self.vocab_size = config.vocab_size
        self.eps = config.layer_norm_eps
        self.approximate = gelu_approximation(config)
        self.transform_weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.transform_bias = nn.Parameter(torch.empty(hidden_size))
        self.layer_norm_weight = nn.Parameter(torch.empty(hidden_size))
        self.layer_norm_bias = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(config.padded_vocab_size))

    def forward(
        self, hidden_PD: Tensor, labels_P: Tensor, word_weight_VD: Tensor, *, kind_counts: tuple[int, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """Return sum of cross-entropies and number of right predictions, see `word_sums`."""
        return self.word_sums(self.transform(hidden_PD), labels_P, word_weight_VD, kind_counts)

    def word_sums(
        self, transformed_PD: Tensor, labels_P: Tensor, word_weight_VD: Tensor, kind_counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Return (sum of cross-entropies, number of right predictions), fp32; rows >= vocab_size never win.

        Both are scalars, or [K] with `kind_counts`, one for each of these runs of rows.
        """
        if kind_counts:
            runs = zip(transformed_PD.split(kind_counts), labels_P.split(kind_counts), strict=True)
            sums = [self.word_sums(rows_RD, labels_R, word_weight_VD, ()) for rows_RD, labels_R in runs]
            return torch.stack([loss for loss, _ in sums]), torch.stack([correct for _, correct in sums])
        return self.ops.mlm_cross_entropy(
            transformed_PD, word_weight_VD, self.bias, labels_P, vocab_size=self.vocab_size
        )

    def transform(self, hidden_PD: Tensor) -> Tensor:
        """Return what the decoder is applied to, [P, D]."""
        hidden_PD = self.ops.bias_gelu(
            F.linear(hidden_PD, self.transform_weight), self.transform_bias, approximate=self.approximate
        )
        return self.ops.layer_norm(hidden_PD, self.layer_norm_weight, self.layer_norm_bias, self.eps)


class PairHead(nn.Module):
    """Two scores from the pooled [CLS]: index 0 means is next (NSP) or in order (SOP), as Hugging Face has it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(2))

    def forward(self, pooled_ND: Tensor) -> Tensor:
        """Return logits_N2."""
        return F.linear(pooled_ND, self.weight, self.bias)


class BertForPreTraining(nn.Module):
    """Encoder, masked-word head with the tied decoder, and optionally the pair head.

    Its forward returns sums, not means: the caller divides by the counts of the whole global step.

    Args:
        config: the model section of the recipe.
        kernels: "auto", "triton" or "torch", see `fused_ops`.
        has_pair_head: whether pooler and NSP/SOP classifier exist.
        activation_checkpointing: recompute each layer in the backward pass.
        init_seed: seed of the initial weights.
    """

    loss_names: tuple[str, ...] = ("mlm", "pair")
    metric_names = ("mlm_correct", "pair_correct")
    kind_names = ("masked", "random", "kept")
    """What stands at a target of an evaluation: [MASK], another piece, or the piece itself."""
    loss_weights: tuple[float, ...] = (1.0, 1.0)
    no_decay_patterns = ("*bias", "*layer_norm_weight")
    equal_parts = {"*qkv_weight": ("query", "key", "value"), "*qkv_bias": ("query", "key", "value")}
    matrix_patterns = BertEncoder.matrix_patterns
    word_head: type[MaskedWordHead] = MaskedWordHead

    def __init__(
        self,
        config: ModelConfig,
        *,
        kernels: str = "auto",
        has_pair_head: bool = True,
        activation_checkpointing: bool = False,
        init_seed: int = 0,
    ) -> None:
        super().__init__()
        ops = fused_ops(kernels)
        self.config = config
        self.has_pair_head = has_pair_head
        self.bert = BertEncoder(
            config, ops, has_pooler=has_pair_head, activation_checkpointing=activation_checkpointing
        )
        self.predictions = self.word_head(config, ops)
        self.seq_relationship = PairHead(config) if has_pair_head else None
        initialise_weights(self, config, seed=init_seed)

    def forward(
        self,
        *,
        input_ids_T: Tensor,
        token_type_ids_T: Tensor,
        position_ids_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        masked_positions_P: Tensor,
        masked_labels_P: Tensor,
        pair_labels_N: Tensor,
        kind_counts: tuple[int, ...] = (),
        dropout_seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss sums and the metric sums of a packed micro-batch.

        Args:
            input_ids_T, token_type_ids_T, position_ids_T, cu_seqlens, max_seqlen, dropout_seed: see `BertEncoder`.
            masked_positions_P: int64 [P], indices into T; P may be 0.
            masked_labels_P: int64 [P], the original ids; IGNORE_INDEX counts for nothing.
            pair_labels_N: int64 [N] in {0, 1, IGNORE_INDEX}; 0 means is next (NSP) or in order (SOP).
            kind_counts: in an evaluation, the number of targets of each kind, which lie one kind behind the other.

        Returns:
            loss_sums_L: fp32 [2], sum of the cross-entropies of masked words and of pairs, in nats.
            metric_sums_M: fp32 [2], number of right predictions of both, without gradient. With `kind_counts` the sums
                of cross-entropies and the numbers of right predictions of every kind follow, [2 + 2 K].
        """
        hidden_TD = self.bert(
            input_ids_T,
            token_type_ids_T,
            position_ids_T=position_ids_T,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            dropout_seed=dropout_seed,
        )
        word_weight_VD = self._tied_decoder()
        hidden_PD = hidden_TD.index_select(0, masked_positions_P)
        words = self.predictions(hidden_PD, masked_labels_P, word_weight_VD, kind_counts=kind_counts)
        return stacked_sums(*words, *self._pair_sums(hidden_TD, cu_seqlens, pair_labels_N))

    @torch.no_grad()
    def logits(self, *, masked_positions_P: Tensor, cu_seqlens: Tensor, **stream: Any) -> Logits:
        """Return the scores themselves (real vocabulary only), for checks and predictions; not under ZeRO-3.

        Args:
            masked_positions_P: int64 [P], the tokens of which word scores are wanted.
            cu_seqlens: int32 [N + 1].
            stream: the other arguments of `BertEncoder.forward`.
        """
        hidden_TD = self.bert(cu_seqlens=cu_seqlens, **stream)
        transformed_PD = self.predictions.transform(hidden_TD.index_select(0, masked_positions_P))
        logits_PV = F.linear(transformed_PD, self.bert.embeddings.word_weight, self.predictions.bias)
        pair_N2 = self._pair_logits(hidden_TD, cu_seqlens) if self.has_pair_head else None
        return Logits(logits_PV[:, : self.config.vocab_size], pair_N2)

    def _pair_sums(self, hidden_TD: Tensor, cu_seqlens: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return (sum of cross-entropies, number of right predictions) of pairs, fp32 scalars; zeros without a head."""
        if not self.has_pair_head:
            return hidden_TD.new_zeros((), dtype=torch.float32), hidden_TD.new_zeros((), dtype=torch.float32)
        logits_N2 = self._pair_logits(hidden_TD, cu_seqlens).float()
        loss = F.cross_entropy(logits_N2, labels_N, ignore_index=IGNORE_INDEX, reduction="sum")
        return loss, (logits_N2.argmax(dim=-1) == labels_N).sum().float()

    def _pair_logits(self, hidden_TD: Tensor, cu_seqlens: Tensor) -> Tensor:
        assert self.bert.pooler is not None and self.seq_relationship is not None
        return self.seq_relationship(self.bert.pooler(hidden_TD, cu_seqlens))

    def _tied_decoder(self) -> Tensor:
        """Return the word embedding, which the masked-word head reads although another module owns it.

        Under ZeRO-3 (the parameter carries a `ds_id`) it is registered with the head, so that DeepSpeed gathers it for
        the head's forward and backward too. Registering again changes nothing. It is not read as an attribute: that
        would gather it here and now, and register it with the whole model.
        """
        word_weight_VD = dict(self.bert.embeddings.named_parameters(recurse=False))["word_weight"]
        if hasattr(word_weight_VD, "ds_id"):
            import deepspeed

            deepspeed.zero.register_external_parameter(self.predictions, word_weight_VD)
        return word_weight_VD


def stacked_sums(
    mlm_loss: Tensor, mlm_correct: Tensor, pair_loss: Tensor, pair_correct: Tensor, *more_losses: Tensor
) -> tuple[Tensor, Tensor]:
    """Return loss sums and metric sums as a model gives them.

    Args:
        mlm_loss, mlm_correct: scalars, or [K] by kind of target in an evaluation.
        pair_loss, pair_correct: scalars.
        more_losses: scalars of further loss terms.
    """
    if not mlm_loss.dim():
        return torch.stack((mlm_loss, pair_loss, *more_losses)), torch.stack((mlm_correct, pair_correct)).detach()
    losses, correct = stacked_sums(mlm_loss.sum(), mlm_correct.sum(), pair_loss, pair_correct, *more_losses)
    return losses, torch.cat((correct, mlm_loss, mlm_correct)).detach()
