"""Masked words (Devlin et al. 2019, arXiv 1810.04805): the head runs on the P masked tokens only.

(T, V) scores never exist. Letters as in `encoder/families/bert.py`; V is the padded vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bert_ds.basics.loss_term import LossTerm
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.encoder.families.table import family_of
from bert_ds.encoder.fused_ops import FusedOps
from bert_ds.encoder.objectives.objective import Seen, Sums


class MaskedWords:
    """Reads targets["masked_positions"], int64 [P], P may be 0, and targets["masked_labels"], int64 [P].

    A label of IGNORE_INDEX counts for nothing.

    Args:
        weight: of the loss.
    """

    needs_front = False

    def __init__(self, weight: float = 1.0) -> None:
        self.terms: tuple[LossTerm, ...] = (
            LossTerm("mlm", count="masked_words", metric="mlm_correct", weight=weight, of_words=True),
        )

    def heads(self, config: EncoderConfig, ops: FusedOps) -> dict[str, nn.Module]:
        """Return the masked-word head."""
        return {"predictions": family_of(config).word_head(config, ops)}

    def tokens_read(self, model: Any, seen: Seen) -> Tensor | None:
        """See `Objective.tokens_read`."""
        return seen.targets["masked_positions"]

    def sums(self, model: Any, seen: Seen) -> Sums:
        """See `Objective.sums`."""
        hidden_PD = seen.hidden_TD.index_select(0, seen.targets["masked_positions"])
        loss, num_correct = model.predictions(
            hidden_PD, seen.targets["masked_labels"], tied_decoder(model), kind_counts=seen.kind_counts
        )
        return Sums({"mlm": loss}, {"mlm_correct": num_correct})


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
