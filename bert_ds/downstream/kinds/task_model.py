"""An encoder with the head of a task. Letters as in `encoder/modeling_bert.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from bert_ds.basics.loss_term import LossTerm
from bert_ds.configuration.recipe.run_config import ModelConfig
from bert_ds.encoder.fused_ops import FusedOps
from bert_ds.encoder.modeling_bert import EMBEDDING_SITE, SITES_PER_LAYER, BertEncoder, initialise_weights


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
    needs_pooler: bool

    def __call__(self, stream: HeadInput, targets: Mapping[str, Tensor]) -> HeadOutput:
        """Return loss sums, metric sums and scores."""
        ...


class HeadInput(NamedTuple):
    """What a head gets of the encoder."""

    hidden_TD: Tensor
    pooled_ND: Tensor | None
    """Of [CLS]; None for a head that needs none."""
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

    no_decay_patterns = ("*bias", "*layer_norm_weight")
    equal_parts = {"*qkv_weight": ("query", "key", "value"), "*qkv_bias": ("query", "key", "value")}
    matrix_patterns = BertEncoder.matrix_patterns

    def __init__(
        self,
        config: ModelConfig,
        head: Any,
        *,
        ops: FusedOps,
        activation_checkpointing: bool = False,
        init_seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.terms = head.terms
        self.bert = BertEncoder(
            config, ops, has_pooler=head.needs_pooler, activation_checkpointing=activation_checkpointing
        )
        self.head = head
        initialise_weights(self, config, seed=init_seed)

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
        hidden_TD = self.bert(
            input_ids_T,
            token_type_ids_T,
            position_ids_T=position_ids_T,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            dropout_seed=dropout_seed,
        )
        pooled_ND = None if self.bert.pooler is None else self.bert.pooler(hidden_TD, cu_seqlens)
        found: HeadOutput = self.head(HeadInput(hidden_TD, pooled_ND, cu_seqlens, dropout_seed), targets)
        sums = found.loss_sums_L, found.metric_sums_M.detach()
        return (*sums, found.scores) if with_scores else sums


def head_site(config: ModelConfig) -> int:
    """Return the number of the first dropout mask that no layer of the encoder uses."""
    return EMBEDDING_SITE + 1 + SITES_PER_LAYER * config.num_hidden_layers
