"""Masked words (Devlin et al. 2019, arXiv 1810.04805): the head runs on the P masked tokens only.

(T, V) scores never exist. Letters as in `encoder/modeling_bert.py`; V is the padded vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_ds.basics.loss_term import LossTerm
from bert_ds.configuration.recipe.run_config import ModelConfig
from bert_ds.encoder.fused_ops import FusedOps
from bert_ds.encoder.modeling_bert import gelu_approximation
from bert_ds.encoder.objectives.objective import Seen, Sums


class MaskedWords:
    """Reads targets["masked_positions"], int64 [P], P may be 0, and targets["masked_labels"], int64 [P].

    A label of IGNORE_INDEX counts for nothing.

    Args:
        weight: of the loss.
    """

    needs_pooler = False

    def __init__(self, weight: float = 1.0) -> None:
        self.terms: tuple[LossTerm, ...] = (
            LossTerm("mlm", count="masked_words", metric="mlm_correct", weight=weight, of_words=True),
        )

    def heads(self, config: ModelConfig, ops: FusedOps) -> dict[str, nn.Module]:
        """Return the masked-word head."""
        return {"predictions": MaskedWordHead(config, ops)}

    def sums(self, model: Any, seen: Seen) -> Sums:
        """See `Objective.sums`."""
        hidden_PD = seen.hidden_TD.index_select(0, seen.targets["masked_positions"])
        loss, num_correct = model.predictions(
            hidden_PD, seen.targets["masked_labels"], tied_decoder(model), kind_counts=seen.kind_counts
        )
        return Sums({"mlm": loss}, {"mlm_correct": num_correct})


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


def tied_decoder(model: Any) -> Tensor:
    """Return the word embedding, which the masked-word head reads although another module owns it.

    Under ZeRO-3 (the parameter carries a `ds_id`) it is registered with the head, so that DeepSpeed gathers it for the
    head's forward and backward too. Registering again changes nothing. It is not read as an attribute: that would
    gather it here and now, and register it with the whole model.
    """
    word_weight_VD = dict(model.bert.embeddings.named_parameters(recurse=False))["word_weight"]
    if hasattr(word_weight_VD, "ds_id"):
        import deepspeed

        deepspeed.zero.register_external_parameter(model.predictions, word_weight_VD)
    return word_weight_VD
