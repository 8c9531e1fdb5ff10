"""ModernBERT's embedding and layer: rotary positions, a window or none, GeGLU, LayerNorm in front of each block.

Letters, where a parameter is read, and what dropout is a function of: `families/bert.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_ds.configuration.families.modernbert import ModernBertConfig
from bert_ds.encoder.blocks import APPROXIMATIONS, AddNorm, Dropout, Kept, read_rows, scaled
from bert_ds.encoder.fused_ops import FusedOps

EMBEDDING_SITE = 0
SITES_PER_LAYER = 3


def add_norm(config: ModernBertConfig, ops: FusedOps, *, dropout: Dropout) -> AddNorm:
    """Return the LayerNorm of a block, or the final one."""
    return AddNorm(config.hidden_size, eps=config.norm_eps, dropout=dropout, ops=ops, has_bias=config.norm_bias)


class ModernBertEmbeddings(nn.Module):
    """Word embedding, LayerNorm, dropout."""

    def __init__(self, config: ModernBertConfig, ops: FusedOps) -> None:
        super().__init__()
        self.ops, self.eps, self.dropout_prob = ops, config.norm_eps, config.embedding_dropout
        self.word_weight = nn.Parameter(torch.empty(config.padded_vocab_size, config.hidden_size))
        self.layer_norm_weight = nn.Parameter(torch.empty(config.hidden_size))
        self.layer_norm_bias = nn.Parameter(torch.empty(config.hidden_size)) if config.norm_bias else None

    def forward(self, input_ids_T: Tensor, dropout_seed: Tensor | None) -> Tensor:
        """Return hidden_TD of int64 [T] ids."""
        words_TD = F.embedding(input_ids_T, self.word_weight)
        return self.ops.dropout(
            self.ops.layer_norm(words_TD, self.layer_norm_weight, self.layer_norm_bias, self.eps),
            dropout_p=self.dropout_prob if self.training else 0.0,
            dropout_seed=dropout_seed,
            site=EMBEDDING_SITE,
        )


class ModernBertLayer(nn.Module):
    """LayerNorm, attention, LayerNorm, feed-forward; what a block gives is added where the next one begins.

    The first layer has no LayerNorm in front of its attention: the embedding ends with one.
    """

    def __init__(self, config: ModernBertConfig, ops: FusedOps, *, layer: int) -> None:
        super().__init__()
        first_site = EMBEDDING_SITE + 1 + SITES_PER_LAYER * layer
        none, written = Dropout(0.0, 0), Dropout(config.written_dropout, first_site + 1)
        self.attention_norm = add_norm(config, ops, dropout=none) if layer else None
        self.attention = ModernBertAttention(config, ops, has_window=config.has_window[layer], site=first_site)
        self.feed_forward_norm = add_norm(config, ops, dropout=written)
        self.feed_forward = ModernBertFeedForward(config, ops, site=first_site + 2)

    def forward(
        self,
        x_TD: Tensor | None,
        residual_TD: Tensor,
        position_ids_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout_seed: Tensor | None = None,
        read_R: Tensor | None = None,
        *,
        kept: Kept | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what the feed-forward block gives, and the residual stream that it is not yet added to.

        Both are of the tokens that are read, [R, D], where that is not all.
        """
        normed_TD = residual_TD
        if self.attention_norm is not None:
            normed_TD, residual_TD = self.attention_norm(x_TD, residual_TD, dropout_seed)
        first_T1, second_T1 = (None, None) if kept is None else kept
        x_RD = self.attention(normed_TD, position_ids_T, cu_seqlens, max_seqlen, dropout_seed, read_R)
        x_RD, residual_RD = scaled(x_RD, first_T1, read_R), read_rows(residual_TD, read_R)
        normed_RD, residual_RD = self.feed_forward_norm(x_RD, residual_RD, dropout_seed)
        return scaled(self.feed_forward(normed_RD, dropout_seed), second_T1, read_R), residual_RD


class ModernBertAttention(nn.Module):
    """Self-attention of every sequence over itself or over a window, positions by rotation, output projection."""

    def __init__(self, config: ModernBertConfig, ops: FusedOps, *, has_window: bool, site: int) -> None:
        super().__init__()
        hidden_size, has_bias = config.hidden_size, config.attention_bias
        self.ops, self.site, self.probs_dropout_prob = ops, site, config.attention_dropout
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.window = config.window if has_window else None
        self.theta = config.local_rope_theta if has_window else config.global_rope_theta
        self.qkv_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.qkv_bias = nn.Parameter(torch.empty(3 * hidden_size)) if has_bias else None
        self.output_weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.output_bias = nn.Parameter(torch.empty(hidden_size)) if has_bias else None

    def forward(
        self,
        normed_TD: Tensor,
        position_ids_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout_seed: Tensor | None = None,
        read_R: Tensor | None = None,
    ) -> Tensor:
        """Return the projection of the attention over normed_TD, [T, D], or [R, D] of the tokens that are read."""
        qkv_T3HK = F.linear(normed_TD, self.qkv_weight, self.qkv_bias).view(-1, 3, self.num_heads, self.head_dim)
        context_THK = self.ops.attention(
            self.ops.rotary(qkv_T3HK, position_ids_T, theta=self.theta),
            cu_seqlens,
            max_seqlen,
            window=self.window,
            dropout_p=self.probs_dropout_prob if self.training else 0.0,
            dropout_seed=dropout_seed,
            site=self.site,
        )
        return F.linear(read_rows(context_THK.flatten(1), read_R), self.output_weight, self.output_bias)


class ModernBertFeedForward(nn.Module):
    """Dense to both halves, gelu of the first times the second, dropout, dense."""

    def __init__(self, config: ModernBertConfig, ops: FusedOps, *, site: int) -> None:
        super().__init__()
        hidden_size, inner, has_bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.ops, self.site, self.dropout_prob = ops, site, config.mlp_dropout
        self.approximate = APPROXIMATIONS[config.hidden_activation]
        self.intermediate_weight = nn.Parameter(torch.empty(2 * inner, hidden_size))
        self.intermediate_bias = nn.Parameter(torch.empty(2 * inner)) if has_bias else None
        self.output_weight = nn.Parameter(torch.empty(hidden_size, inner))
        self.output_bias = nn.Parameter(torch.empty(hidden_size)) if has_bias else None

    def forward(self, normed_TD: Tensor, dropout_seed: Tensor | None = None) -> Tensor:
        """Return what is added to the residual stream, [T, D]."""
        halves_TG = F.linear(normed_TD, self.intermediate_weight)
        gated_TF = self.ops.geglu(halves_TG, self.intermediate_bias, approximate=self.approximate)
        dropped_TF = self.ops.dropout(
            gated_TF,
            dropout_p=self.dropout_prob if self.training else 0.0,
            dropout_seed=dropout_seed,
            site=self.site,
        )
        return F.linear(dropped_TF, self.output_weight, self.output_bias)
