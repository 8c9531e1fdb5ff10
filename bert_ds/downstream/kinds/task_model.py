"""An encoder with the head of a task. Letters as in `encoder/families/bert.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bert_ds.basics.loss_term import LossTerm
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.corpus.batches.few_shapes import filled_tokens
from bert_ds.encoder.blocks import first_tokens, kept_outputs
from bert_ds.encoder.families.family import SEQUENCE_ROLES, Role, RoleName
from bert_ds.encoder.families.table import family_of
from bert_ds.encoder.fused_ops import FusedOps

_FILLED_DTYPE = torch.bfloat16
"""On a CPU code is made and kept for every shape of a product of these: batches are filled up to few of them."""


class HeadOutput(NamedTuple):
    """What a head makes of a packed micro-batch."""

    loss_sums_L: Tensor
    """fp32, one sum per loss term; zeros where there are no targets."""
    metric_sums_M: Tensor
    """fp32, one sum for each loss term that has a metric; without gradient."""
    scores: dict[str, Tensor]
    """[N, ...] by name; [T, ...] where the name starts with "token_"."""


class Head(Protocol):
    """What `TaskModel` and the training loop need of the head of a task, which is a module that owns its weights."""

    terms: tuple[LossTerm, ...]
    roles: tuple[RoleName, ...]
    """What it does, in the words of `Family.roles`."""

    def __call__(self, stream: HeadInput, targets: Mapping[str, Tensor]) -> HeadOutput:
        """Return loss sums, metric sums and scores."""
        ...


class HeadInput(NamedTuple):
    """What a head gets of the encoder."""

    token_TD: Tensor
    """Of every token; has no meaning for a head that has roles with sequences alone."""
    sequence_ND: Tensor | None
    """Of every sequence; None for a head that has no role with one."""
    cu_seqlens: Tensor
    dropout_seed: Tensor | None
    """None outside of training."""


class TaskModel(nn.Module):
    """Encoder and head; its forward returns sums, as that of pre-training does, and scores where they are wanted.

    Args:
        config: shape of the encoder, with the dropout of the task.
        head: of the task's kind.
        ops: the table of fused operations.
        activation_checkpointing: recompute each layer in the backward pass.
        init_seed: seed of the weights that no pre-trained folder brings.
    """

    def __init__(
        self,
        config: EncoderConfig,
        head: Any,
        *,
        ops: FusedOps,
        activation_checkpointing: bool = False,
        init_seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.terms = head.terms
        self._num_layers_read = getattr(head, "num_layers_read", 1)
        self.whole_step_loss = getattr(head, "whole_step_loss", None)
        family = family_of(config)
        roles = {name: family.roles(config)[name] for name in head.roles}
        self._reads_sequences = any(name in SEQUENCE_ROLES for name in roles)
        self._reads_tokens = any(name not in SEQUENCE_ROLES for name in roles)
        self._tokens_pass_front = any(role.reads_front for name, role in roles.items() if name not in SEQUENCE_ROLES)
        self._front_drops = any(role.front_drops for role in roles.values())
        has_front = any(role.reads_front for role in roles.values())
        self.bert = family.make_encoder(
            config, ops, has_front=has_front, activation_checkpointing=activation_checkpointing
        )
        self.head = head
        family.initialise(self, config, seed=init_seed)

    def forward(
        self,
        *,
        input_ids_T: Tensor,
        token_type_ids_T: Tensor,
        position_ids_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        targets: Mapping[str, Tensor],
        dropout_seed: Tensor | None = None,
        with_scores: bool = False,
    ) -> Any:
        """Return (loss_sums_L, metric_sums_M), with_scores also the head's scores by name.

        Args:
            input_ids_T, token_type_ids_T, position_ids_T, cu_seqlens, max_seqlen, dropout_seed: see `BertEncoder`.
            targets: by name, as the head's kind makes them; {} for rows without labels.
            with_scores: for evaluation.
        """
        read_R = None
        if self.bert.reads_first_tokens and not self._reads_tokens:
            read_R = first_tokens(cu_seqlens, num_tokens=len(input_ids_T))
        stream = (input_ids_T, token_type_ids_T, position_ids_T, cu_seqlens)
        if input_ids_T.device.type == "cpu" and next(self.bert.parameters()).dtype == _FILLED_DTYPE:
            stream = filled_tokens(*stream, longest=max_seqlen)
        ids_T, types_T, positions_T, starts = stream
        with kept_outputs(list(self.bert.layer)[-self._num_layers_read : -1]) as earlier:
            filled_TD = self.bert(
                ids_T,
                types_T,
                position_ids_T=positions_T,
                cu_seqlens=starts,
                max_seqlen=max_seqlen,
                dropout_seed=dropout_seed,
                read_R=read_R,
            )
        if earlier:
            filled_TD = torch.stack([*earlier, filled_TD]).float().mean(dim=0)
        hidden_TD = filled_TD[: len(input_ids_T)]
        sequence_ND = None
        if self._reads_sequences:
            seed = (dropout_seed,) if self._front_drops else ()
            sequence_ND = self.bert.sequence_rows(hidden_TD, cu_seqlens, *seed)
        token_TD = self.bert.token_rows(hidden_TD) if self._tokens_pass_front else hidden_TD
        found: HeadOutput = self.head(HeadInput(token_TD, sequence_ND, cu_seqlens, dropout_seed), targets)
        sums = found.loss_sums_L, found.metric_sums_M.detach()
        return (*sums, found.scores) if with_scores else sums


def head_site(config: EncoderConfig) -> int:
    """Return the number of the first dropout mask that no layer of the encoder uses."""
    return family_of(config).first_free_site(config)


def role_of(config: EncoderConfig, name: RoleName) -> Role:
    """Return how transformers' class of an encoder's family plays a role."""
    return family_of(config).roles(config)[name]
