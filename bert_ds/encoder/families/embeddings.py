"""Embeddings that several families begin with: words, positions and segments, as BERT has them.

Letters as in `families/bert.py`, and E for the width of the embeddings.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_ds.encoder.bert_layers import EMBEDDING_SITE, LayerSettings
from bert_ds.encoder.fused_ops import FusedOps


class EmbeddingSettings(LayerSettings, Protocol):
    """What word, position and segment embeddings ask besides."""

    @property
    def padded_vocab_size(self) -> int: ...
    @property
    def position_rows(self) -> int: ...
    @property
    def type_vocab_size(self) -> int: ...


class ProjectedSettings(EmbeddingSettings, Protocol):
    """What a width of their own asks besides."""

    @property
    def embedding_size(self) -> int: ...


class BertEmbeddings(nn.Module):
    """Sum of word, position and segment embedding, LayerNorm where the layers have it behind them, dropout.

    Args:
        config: sizes, dropout and LayerNorm settings.
        ops: the table of fused operations.
        width: of the embeddings.
        has_sinusoids: whether positions are those of `sinusoids`, and no weights.
    """

    def __init__(self, config: EmbeddingSettings, ops: FusedOps, *, width: int, has_sinusoids: bool = False) -> None:
        super().__init__()
        self.ops = ops
        self.eps = config.layer_norm_eps
        self.dropout_prob = config.dropout_of("embedding")
        self.has_norm = config.norm_position == "post"
        self.word_weight = nn.Parameter(torch.empty(config.padded_vocab_size, width))
        if has_sinusoids:
            table_SD = sinusoids(config.position_rows, width)
            self.register_buffer("position_weight", table_SD, persistent=False)
        else:
            self.position_weight = nn.Parameter(torch.empty(config.position_rows, width))
        self.token_type_weight = nn.Parameter(torch.empty(config.type_vocab_size, width))
        if self.has_norm:
            self.layer_norm_weight = nn.Parameter(torch.empty(width))
            self.layer_norm_bias = nn.Parameter(torch.empty(width))

    def forward(
        self, input_ids_T: Tensor, token_type_ids_T: Tensor, position_ids_T: Tensor, dropout_seed: Tensor | None
    ) -> Tensor:
        """Return hidden_TD of three int64 [T] id vectors."""
        dropout = {
            "dropout_p": self.dropout_prob if self.training else 0.0,
            "dropout_seed": dropout_seed,
            "site": EMBEDDING_SITE,
        }
        if not self.has_norm:
            hidden_TD = F.embedding(input_ids_T, self.word_weight) + F.embedding(position_ids_T, self.position_weight)
            return self.ops.dropout(hidden_TD + F.embedding(token_type_ids_T, self.token_type_weight), **dropout)
        return self.ops.embedding(
            input_ids_T,
            token_type_ids_T,
            position_ids_T,
            self.word_weight,
            self.position_weight,
            self.token_type_weight,
            self.layer_norm_weight,
            self.layer_norm_bias,
            self.eps,
            **dropout,
        )


def sinusoids(num_positions: int, width: int) -> Tensor:
    """Return the positions of Vaswani et al. (2017, arXiv 1706.03762, section 3.5), fp32 [S, D].

    Column 2i is sin(s / 10000^(2i / D)), column 2i + 1 its cosine.
    """
    columns = torch.arange(width, dtype=torch.float64)
    angles_SD = torch.arange(num_positions, dtype=torch.float64)[:, None] / 10_000.0 ** (columns // 2 * 2 / width)
    return torch.where(columns % 2 == 0, angles_SD.sin(), angles_SD.cos()).float()


class ProjectedEmbeddings(BertEmbeddings):
    """BERT's embeddings of a width E of their own, and a dense layer to D where there is one."""

    projection_weight: nn.Parameter
    projection_bias: nn.Parameter

    def __init__(self, config: ProjectedSettings, ops: FusedOps, *, has_projection: bool) -> None:
        super().__init__(config, ops, width=config.embedding_size)
        self.has_projection = has_projection
        if has_projection:
            add_projection(self, config)

    def forward(
        self,
        input_ids_T: Tensor,
        token_type_ids_T: Tensor,
        position_ids_T: Tensor,
        dropout_seed: Tensor | None,
        *,
        is_projected: bool = True,
    ) -> Tensor:
        """Return hidden_TD of three int64 [T] id vectors; not projected, what a generator shares, [T, E]."""
        embedded_TE = super().forward(input_ids_T, token_type_ids_T, position_ids_T, dropout_seed)
        if not self.has_projection or not is_projected:
            return embedded_TE
        return F.linear(embedded_TE, self.projection_weight, self.projection_bias)


def add_projection(module: nn.Module, config: ProjectedSettings) -> None:
    """Give a module the dense layer from E to D."""
    module.projection_weight = nn.Parameter(torch.empty(config.hidden_size, config.embedding_size))
    module.projection_bias = nn.Parameter(torch.empty(config.hidden_size))
