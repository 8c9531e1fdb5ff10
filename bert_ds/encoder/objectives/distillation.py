"""A student that learns from a larger model while it pre-trains (Sanh et al. 2019, arXiv 1910.01108).

Beside the masked words the student is told what the teacher makes of the same input, t being the temperature:

    soft    t^2 KL(softmax(teacher / t) || softmax(student / t)), summed over the P masked tokens
    hidden  1 - cos(student, teacher) of the last hidden states, summed over all T tokens

The teacher is no submodule of the student: it is not trained, not sharded and in no checkpoint, and every rank holds it
whole, in the dtype of the student. Letters as in `encoder/families/bert.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bert_ds.basics.loss_term import LossTerm
from bert_ds.configuration.recipe.distillation_config import DistillationConfig
from bert_ds.encoder.objectives.masked_words import MaskedWords, tied_decoder
from bert_ds.encoder.objectives.objective import Seen, Sums
from bert_ds.encoder.word_head import Decoder

_ROWS_AT_ONCE = 512
"""Masked tokens whose (rows, V) scores exist at a time, in forward and in backward."""


class Teacher:
    """A model that is only asked; hidden from `nn.Module`, so that nobody trains, shards or saves it."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model.eval().requires_grad_(False)

    @torch.no_grad()
    def hidden_states(self, like: Tensor, **stream: Any) -> Tensor:
        """Return hidden_TD, on the device and in the dtype of `like`.

        Args:
            like: a tensor of the student; the teacher moves there when it is first asked.
            stream: see `BertEncoder.forward`.
        """
        self._model.to(device=like.device, dtype=like.dtype)
        return self._model.bert(**stream)

    @torch.no_grad()
    def decoder(self, hidden_PD: Tensor) -> Decoder:
        """Return what gives the scores of masked tokens."""
        return self._model.predictions.decoder(hidden_PD, self._model.bert.embeddings.word_weight)


class TaughtWords(MaskedWords):
    """Masked words with what a teacher adds; weights, names and export are those of `MaskedWords`.

    Args:
        teacher: a pre-trained model of the same vocabulary.
        settings: temperature and weights. Hidden states of weight 0 are not compared.
    """

    def __init__(self, teacher: nn.Module, settings: DistillationConfig) -> None:
        super().__init__(settings.mlm_weight)
        self.teacher = Teacher(teacher)
        self.temperature = settings.temperature
        self.terms += (LossTerm("soft", count="masked_words", weight=settings.soft_weight),)
        if settings.hidden_weight:
            self.terms += (LossTerm("hidden", count="tokens", weight=settings.hidden_weight),)

    def tokens_read(self, model: Any, seen: Seen) -> Tensor | None:
        """See `Objective.tokens_read`."""
        return None if len(self.terms) > 2 else super().tokens_read(model, seen)

    def sums(self, model: Any, seen: Seen) -> Sums:
        """See `Objective.sums`; the teacher drops nothing."""
        positions_P = seen.targets["masked_positions"]
        asked = {**seen.stream, "dropout_seed": None, "passed_over": frozenset(), "read_R": seen.read_R}
        taught_TD = self.teacher.hidden_states(seen.hidden_TD, **asked)
        taught_PD = taught_TD.index_select(0, seen.real_words(positions_P))

        def also(student: Decoder) -> Tensor:
            return soft_target_loss(
                student._replace(transformed_PD=seen.real_words(student.transformed_PD)),
                self.teacher.decoder(taught_PD),
                vocab_size=model.config.vocab_size,
                temperature=self.temperature,
            )

        loss, num_correct, soft_loss = model.predictions(
            seen.hidden_TD.index_select(0, positions_P),
            seen.targets["masked_labels"],
            tied_decoder(model),
            kind_counts=seen.kind_counts,
            also=also,
        )
        losses = {"mlm": loss, "soft": soft_loss}
        if len(self.terms) > 2:
            # A node of its own sums the cosine's gradients before those of other objectives are added: the last bits
            # then do not depend on whether those come before it or behind it.
            own_TD = seen.hidden_TD.view_as(seen.hidden_TD)
            losses["hidden"] = angle_loss(seen.real_tokens(own_TD), seen.real_tokens(taught_TD))
        return Sums(losses, {"mlm_correct": num_correct})


def angle_loss(hidden_TD: Tensor, taught_TD: Tensor) -> Tensor:
    """Return the sum over tokens of 1 - cosine, fp32."""
    return (1.0 - F.cosine_similarity(hidden_TD.float(), taught_TD.float(), dim=-1)).sum()


def soft_divergence(own_RL: Tensor, wanted_RL: Tensor, temperature: float) -> Tensor:
    """Return t^2 KL(softmax(wanted / t) || softmax(own / t)) at temperature t, summed over rows of fp32 scores."""
    log_p, log_q = ((scores_RL / temperature).log_softmax(dim=-1) for scores_RL in (own_RL, wanted_RL))
    return temperature**2 * F.kl_div(log_p, log_q, log_target=True, reduction="sum")


def soft_target_loss(student: Decoder, teacher: Decoder, *, vocab_size: int, temperature: float) -> Tensor:
    """Return t^2 KL(teacher || student) at temperature t, summed over the masked tokens, fp32.

    The scores exist for some rows at a time and are computed again in the backward pass.

    Args:
        student, teacher: rows of weight and bias from vocab_size on are padding and take no part.
        vocab_size: pieces of the vocabulary.
        temperature: t.
    """
    total = student.transformed_PD.new_zeros((), dtype=torch.float32)
    for first in range(0, student.transformed_PD.shape[0], _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        total = total + checkpoint(
            _soft_rows,
            student._replace(transformed_PD=student.transformed_PD[rows]),
            teacher._replace(transformed_PD=teacher.transformed_PD[rows]),
            vocab_size,
            temperature,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return total


def _soft_rows(student: Decoder, teacher: Decoder, vocab_size: int, temperature: float) -> Tensor:
    own, wanted = (
        F.linear(one.transformed_PD, one.weight_VD[:vocab_size], one.bias_V[:vocab_size]).float()
        for one in (student, teacher)
    )
    return soft_divergence(own, wanted, temperature)
