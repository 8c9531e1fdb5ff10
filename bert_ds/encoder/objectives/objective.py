"""What a pre-training objective is. One more objective is one more file here.

Letters as in `encoder/families/bert.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bert_ds.basics.loss_term import LossTerm, metric_names
from bert_ds.basics.micro_batch import NO_FILLINGS, Fillings
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.encoder.fused_ops import FusedOps


class Seen:
    """A packed micro-batch in front of a model.

    Args:
        encoder: of the model.
        stream: arguments of its forward, the dropout seed among them.
        targets: of the batch, by name.
        kind_counts: in an evaluation, the number of words to predict of each kind, one kind behind the other.
        fillings: what lies at the end of the stream and of the targets. Labels there are IGNORE_INDEX; an objective
            that has a target without a label leaves them out, see `real_tokens` and `real_words`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        stream: dict[str, Any],
        targets: Mapping[str, Tensor],
        kind_counts: tuple[int, ...],
        *,
        fillings: Fillings = NO_FILLINGS,
    ) -> None:
        self._encoder, self._fillings = encoder, fillings
        self.stream, self.targets, self.kind_counts = stream, targets, kind_counts
        self.read_R: Tensor | None = None
        self._hidden_TD: Tensor | None = None

    @property
    def hidden_TD(self) -> Tensor:
        """What the encoder makes of the stream as it is, computed when it is first asked for.

        An objective that shows the encoder other pieces calls `model.bert` with a stream of its own.
        """
        if self._hidden_TD is None:  # a cached property takes a lock, which torch.compile cannot see through
            self._hidden_TD = self._encoder(**self.stream, read_R=self.read_R)
        return self._hidden_TD

    def real_tokens(self, rows: Tensor) -> Tensor:
        """Return the rows, one for each token, without those of fillings."""
        return rows[: rows.shape[0] - self._fillings.tokens]

    def real_words(self, rows: Tensor) -> Tensor:
        """Return the rows, one for each word to predict, without those of fillings."""
        return rows[: rows.shape[0] - self._fillings.words]

    def will_read(self, tokens: Sequence[Tensor | None]) -> None:
        """Say what each objective reads of `hidden_TD`, before that is asked for: other rows are not computed.

        Args:
            tokens: int64 indices into the stream, None for all.
        """
        if any(tokens_R is None for tokens_R in tokens):
            return
        read_R = torch.cat([tokens_R for tokens_R in tokens if tokens_R is not None])
        if 0 < len(read_R) < len(self.stream["input_ids_T"]):
            self.read_R = read_R


class Sums(NamedTuple):
    """What an objective makes of a micro-batch; fp32 scalars, not means: the loop knows the counts of the whole step.

    Those of words are [K] where `Seen.kind_counts` tells K kinds apart.
    """

    losses: dict[str, Tensor]
    """One by the name of each of its terms, in nats."""
    metrics: dict[str, Tensor]
    """One for each of `metric_names` of its terms."""


class Objective(Protocol):
    """Something that an encoder is trained on."""

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """Its loss terms, at least one. Their counts are those that a batch brings."""
        ...

    @property
    def needs_front(self) -> bool:
        """Whether the encoder has to bring the pooled [CLS]."""
        ...

    def heads(self, config: EncoderConfig, ops: FusedOps) -> dict[str, nn.Module]:
        """Return the modules that it adds to a model, by the names that they have in its state dict."""
        ...

    def tokens_read(self, model: Any, seen: Seen) -> Tensor | None:
        """Return the tokens whose rows of `Seen.hidden_TD` it reads, int64; None for all."""
        ...

    def sums(self, model: Any, seen: Seen) -> Sums:
        """Return the sums of a micro-batch.

        Args:
            model: `PretrainingModel`, which holds the heads under their names. Under ZeRO-3 a weight is read in the
                forward of the module that owns it.
            seen: the micro-batch.
        """
        ...


def ordered_terms(objectives: Sequence[Objective]) -> tuple[LossTerm, ...]:
    """Return the terms of a model: the first one of each objective, then the second ones, and so on.

    So what an objective adds to its main term stands behind all main terms. The order decides the last bit of a loss.
    """
    rounds = zip_longest(*(objective.terms for objective in objectives))
    return tuple(term for term in chain.from_iterable(rounds) if term is not None)


def stacked(terms: Sequence[LossTerm], found: Sequence[Sums]) -> tuple[Tensor, Tensor]:
    """Return the sums of all objectives as a model gives them.

    Returns:
        loss_sums_L: fp32, one sum per term.
        metric_sums_M: fp32, one sum for each of `metric_names`, without gradient. Where kinds are told apart the
            losses and then the metrics of every kind follow.
    """
    losses = {name: loss for sums in found for name, loss in sums.losses.items()}
    metrics = {name: metric for sums in found for name, metric in sums.metrics.items()}
    by_term = [losses[term.name] for term in terms]
    measured = [metrics[name] for name in metric_names(terms)]
    by_kind = [sums_K for sums_K in (*by_term, *measured) if sums_K.dim()]
    totals = [metric.sum()[None] for metric in measured]
    return torch.stack([loss.sum() for loss in by_term]), torch.cat((*totals, *by_kind)).detach()
