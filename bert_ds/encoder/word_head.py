"""The masked-word head of every family.

It runs on the P masked tokens only; (T, V) scores never exist. Letters as in `families/bert.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.encoder.blocks import activated
from bert_ds.encoder.fused_ops import FusedOps


class Decoder(NamedTuple):
    """What word scores are made of: transformed_PD weight_VD^T + bias_V."""

    transformed_PD: Tensor
    weight_VD: Tensor
    bias_V: Tensor


class MaskedWordHead(nn.Module):
    """Dense to the width of the embeddings, activation, LayerNorm, then a decoder: the word embedding, or its weight.

    Args:
        config: sizes.
        ops: the table of fused operations.
        eps: of the LayerNorm.
        act: the activation, by Hugging Face's names.
        biases: which of "transform", "layer_norm" and "decoder" have a bias.
        is_tied: whether the decoder is the word embedding.
    """

    def __init__(
        self,
        config: EncoderConfig,
        ops: FusedOps,
        *,
        eps: float,
        act: str = "gelu",
        biases: tuple[str, ...] = ("transform", "layer_norm", "decoder"),
        is_tied: bool = True,
    ) -> None:
        super().__init__()
        width, vocab_size = config.embedding_width, config.padded_vocab_size
        self.ops, self.eps, self.act = ops, eps, act
        self.vocab_size = config.vocab_size
        self.transform_weight = nn.Parameter(torch.empty(width, config.hidden_size))
        self.transform_bias = nn.Parameter(torch.empty(width)) if "transform" in biases else None
        self.layer_norm_weight = nn.Parameter(torch.empty(width))
        self.layer_norm_bias = nn.Parameter(torch.empty(width)) if "layer_norm" in biases else None
        self.decoder_weight = None if is_tied else nn.Parameter(torch.empty(vocab_size, width))
        self.bias = nn.Parameter(torch.empty(vocab_size)) if "decoder" in biases else None

    def forward(
        self,
        hidden_PD: Tensor,
        labels_P: Tensor,
        word_weight_VD: Tensor,
        *,
        kind_counts: tuple[int, ...] = (),
        also: Callable[[Decoder], Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Return sum of cross-entropies and number of right predictions, see `word_sums`, and what `also` makes.

        Args:
            hidden_PD: hidden states of the masked tokens.
            labels_P: int64, the pieces to predict; IGNORE_INDEX counts for nothing.
            word_weight_VD: the word embedding.
            kind_counts: in an evaluation, the number of rows of each kind, one kind behind the other.
            also: something else to make of the scores, in here, where ZeRO-3 has gathered the weights.
        """
        decoder = self.decoder(hidden_PD, word_weight_VD)
        sums = self.word_sums(decoder, labels_P, kind_counts)
        return sums if also is None else (*sums, also(decoder))

    def word_sums(self, decoder: Decoder, labels_P: Tensor, kind_counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return (sum of cross-entropies, number of right predictions), fp32; rows >= vocab_size never win.

        Both are scalars, or [K] with `kind_counts`, one for each of these runs of rows.
        """
        if kind_counts:
            runs = zip(decoder.transformed_PD.split(kind_counts), labels_P.split(kind_counts), strict=True)
            sums = [
                self.word_sums(decoder._replace(transformed_PD=rows_RD), labels_R, ()) for rows_RD, labels_R in runs
            ]
            return torch.stack([loss for loss, _ in sums]), torch.stack([correct for _, correct in sums])
        return self.ops.mlm_cross_entropy(*decoder, labels_P, vocab_size=self.vocab_size)

    def transform(self, hidden_PD: Tensor) -> Tensor:
        """Return what the decoder is applied to, [P, D]."""
        dense_PD = F.linear(hidden_PD, self.transform_weight)
        active_PD = activated(self.ops, dense_PD, self.transform_bias, self.act)
        return self.ops.layer_norm(active_PD, self.layer_norm_weight, self.layer_norm_bias, self.eps)

    def decoder(self, hidden_PD: Tensor, word_weight_VD: Tensor) -> Decoder:
        """Return what gives the scores of masked tokens; the bias is zeros where there is none.

        Args:
            hidden_PD: their hidden states.
            word_weight_VD: the word embedding.
        """
        weight_VD = word_weight_VD if self.decoder_weight is None else self.decoder_weight
        bias_V = weight_VD.new_zeros(weight_VD.shape[0]) if self.bias is None else self.bias
        return Decoder(self.transform(hidden_PD), weight_VD, bias_V)
