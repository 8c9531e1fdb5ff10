"""BERT's layer, of which several families are made: what differs between them stands around it.

Attention, then feed-forward, with biases everywhere; LayerNorm behind each block (Devlin et al. 2019, arXiv
1810.04805), or in front of it as Megatron has it (Shoeybi et al. 2019, arXiv 1909.08053). Letters, where a parameter is
read, and what dropout is a function of: `families/bert.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_ds.basics.micro_batch import BranchDraws
from bert_ds.configuration.families.bert_layers import HiddenPlace
from bert_ds.encoder.blocks import (
    AddNorm,
    Dropout,
    Kept,
    PassedOver,
    activated,
    at_their_tokens,
    kept_branches,
    read_rows,
    refuse_partitioned,
    require_seed,
    scaled,
    through_layers,
    where_nothing_drops,
)
from bert_ds.encoder.fused_ops import FusedOps
from bert_ds.encoder.tensor_rows import TensorRow, linear_rows

EMBEDDING_SITE = 0
SITES_PER_LAYER = 3
HF_LAYER_PARTS = {
    **{part: f"attention.self.{part}" for part in ("query", "key", "value")},
    "attention.output": "attention.output.dense",
    "attention.layer_norm": "attention.output.LayerNorm",
    "feed_forward.intermediate": "intermediate.dense",
    "feed_forward.output": "output.dense",
    "feed_forward.layer_norm": "output.LayerNorm",
    "attention_norm.layer_norm": "attention.ln",
    "feed_forward_norm.layer_norm": "ln",
}
"""Of a part of a layer its name in transformers, for BERT and the families that copy it there."""


class LayerSettings(Protocol):
    """What the layers ask of a family's settings, by BERT's names."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def attention_probs_dropout_prob(self) -> float: ...
    @property
    def layer_norm_eps(self) -> float: ...
    @property
    def norm_position(self) -> str: ...
    @property
    def initializer_range(self) -> float: ...
    @property
    def vocab_size(self) -> int: ...
    def owner(self, layer: int, part: str) -> int: ...
    def dropout_of(self, place: HiddenPlace) -> float: ...


class LayeredEncoder(nn.Module):
    """Token stream -> hidden states: a family's embeddings, then the layers.

    Args:
        config: shape, dropout and LayerNorm settings.
        ops: the table of fused operations.
        embeddings: called with input_ids_T, token_type_ids_T, position_ids_T and dropout_seed.
        activation_checkpointing: keep only each layer's input and recompute the rest in the backward pass.
    """

    stochastic_depth = 0.0
    """How often the last layer's blocks add nothing to a sequence, see `kept_branches`."""
    reads_first_tokens = True
    """Whether `sequence_rows` looks at nothing but the first token of every sequence."""

    def __init__(
        self, config: LayerSettings, ops: FusedOps, embeddings: nn.Module, *, activation_checkpointing: bool
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        places = (config.dropout_of(place) for place in get_args(HiddenPlace))
        self.dropout_is_used = max(config.attention_probs_dropout_prob, *places) > 0
        self.embeddings = embeddings
        make_layer = BertLayer if config.norm_position == "post" else PreNormLayer
        self.layer = nn.ModuleList(make_layer(config, ops, layer=index) for index in range(config.num_hidden_layers))
        share_parts(self.layer, config)
        self.final_norm = None
        if config.norm_position == "pre":
            self.final_norm = _add_norm(config, ops, dropped="feed_forward", site=first_free_site(config) - 1)

    def forward(
        self,
        input_ids_T: Tensor,
        token_type_ids_T: Tensor,
        *,
        position_ids_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout_seed: Tensor | None = None,
        read_R: Tensor | None = None,
        passed_over: frozenset[int] = frozenset(),
        branches: BranchDraws | None = None,
    ) -> Tensor:
        """Encode a packed micro-batch.

        Args:
            input_ids_T, token_type_ids_T, position_ids_T: int64 [T]; positions count from 0 in each sequence.
            cu_seqlens: int32 [N + 1], cu_seqlens[n] is the first token of sequence n; a sequence may be empty.
            max_seqlen: tokens of the longest sequence.
            dropout_seed: int64 [1], on the device of the ids; needed in training mode when the config has dropout.
            read_R: int64 [R], the tokens whose hidden states are read, where it is not all, see `through_layers`.
            passed_over: layers that have no effect, counted from 0.
            branches: what decides of a stochastic depth, needed in training mode where there is one.

        Returns:
            hidden_TD in the dtype of the parameters; rows that are not read have no meaning.
        """
        require_seed(self, dropout_seed, drops=self.dropout_is_used)
        read_R = where_nothing_drops(self, read_R, drops=self.dropout_is_used)
        hidden_TD = self.embeddings(input_ids_T, token_type_ids_T, position_ids_T, dropout_seed)
        stream = (cu_seqlens, max_seqlen, dropout_seed)
        past = PassedOver(passed_over, (torch.zeros_like(cu_seqlens), 0, dropout_seed)) if passed_over else None
        recompute = self.activation_checkpointing and self.training
        kept = kept_branches(self, branches, cu_seqlens, num_tokens=len(input_ids_T))
        how: dict[str, Any] = {"recompute": recompute, "read_R": read_R, "passed_over": past, "kept": kept}
        if self.final_norm is None:
            hidden_RD = through_layers(self.layer, hidden_TD, *stream, **how)
        else:
            x_RD, residual_RD = through_layers(self.layer, (None, hidden_TD), *stream, **how)
            hidden_RD = self.final_norm(x_RD, residual_RD, dropout_seed)[0]
        return at_their_tokens(hidden_RD, read_R, num_tokens=len(input_ids_T))

    def token_rows(self, hidden_TD: Tensor) -> Tensor:
        """Return what a head of tokens reads, [T, D]."""
        return hidden_TD


class BertLayer(nn.Module):
    """Attention block, then feed-forward block, each followed by dropout, residual and LayerNorm."""

    def __init__(self, config: LayerSettings, ops: FusedOps, *, layer: int) -> None:
        super().__init__()
        first_site = EMBEDDING_SITE + 1 + SITES_PER_LAYER * layer
        self.first_site = first_site
        self.attention = BertAttention(config, ops)
        self.feed_forward = BertFeedForward(config, ops)

    def forward(
        self,
        hidden_TD: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout_seed: Tensor | None = None,
        read_R: Tensor | None = None,
        *,
        kept: Kept | None = None,
    ) -> Tensor:
        """Return hidden_TD of the next layer, or [R, D] of the tokens that are read."""
        site, stream = self.first_site, (cu_seqlens, max_seqlen, dropout_seed, read_R)
        first_T1, second_T1 = (None, None) if kept is None else kept
        hidden_RD = self.attention(hidden_TD, *stream, first_site=site, kept_T1=first_T1)
        kept_R1 = None if second_T1 is None else read_rows(second_T1, read_R)
        return self.feed_forward(hidden_RD, dropout_seed, site=site + 2, kept_T1=kept_R1)


class PreNormLayer(nn.Module):
    """LayerNorm, attention, LayerNorm, feed-forward; what a block gives is added where the next one begins."""

    def __init__(self, config: LayerSettings, ops: FusedOps, *, layer: int) -> None:
        super().__init__()
        first_site = EMBEDDING_SITE + 1 + SITES_PER_LAYER * layer
        self.first_site = first_site
        self.attention_norm = _add_norm(config, ops, dropped="feed_forward", site=first_site - 1)
        self.attention = BertAttention(config, ops)
        self.feed_forward_norm = _add_norm(config, ops, dropped="attention_output", site=first_site + 1)
        self.feed_forward = BertFeedForward(config, ops)

    def forward(
        self,
        x_TD: Tensor | None,
        residual_TD: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout_seed: Tensor | None = None,
        read_R: Tensor | None = None,
        *,
        kept: Kept | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what the feed-forward block gives, and the residual stream that it is to be added to, [R, D] both."""
        normed_TD, residual_TD = self.attention_norm(x_TD, residual_TD, dropout_seed)
        site, stream = self.first_site, (cu_seqlens, max_seqlen, dropout_seed, read_R)
        first_T1, second_T1 = (None, None) if kept is None else kept
        x_RD = scaled(self.attention(normed_TD, *stream, first_site=site), first_T1, read_R)
        normed_RD, residual_RD = self.feed_forward_norm(x_RD, read_rows(residual_TD, read_R), dropout_seed)
        return scaled(self.feed_forward(normed_RD, dropout_seed, site=site + 2), second_T1, read_R), residual_RD


class BertAttention(nn.Module):
    """Self-attention of every sequence over itself and output projection; then dropout, residual, LayerNorm if post."""

    def __init__(self, config: LayerSettings, ops: FusedOps) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.ops = ops
        self.eps = config.layer_norm_eps
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.probs_dropout_prob = config.attention_probs_dropout_prob
        self.output_dropout_prob = config.dropout_of("attention_output")
        self.has_norm = config.norm_position == "post"
        self.qkv_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.qkv_bias = nn.Parameter(torch.empty(3 * hidden_size))
        self.output_weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.output_bias = nn.Parameter(torch.empty(hidden_size))
        if self.has_norm:
            self.layer_norm_weight = nn.Parameter(torch.empty(hidden_size))
            self.layer_norm_bias = nn.Parameter(torch.empty(hidden_size))

    def forward(
        self,
        hidden_TD: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout_seed: Tensor | None = None,
        read_R: Tensor | None = None,
        *,
        first_site: int,
        kept_T1: Tensor | None = None,
    ) -> Tensor:
        """Return the projection of the attention, [R, D]; if post LayerNorm(hidden + dropout(kept * projection))."""
        qkv_T3HK = F.linear(hidden_TD, self.qkv_weight, self.qkv_bias).view(-1, 3, self.num_heads, self.head_dim)
        context_THK = self.ops.attention(
            qkv_T3HK,
            cu_seqlens,
            max_seqlen,
            dropout_p=self.probs_dropout_prob if self.training else 0.0,
            dropout_seed=dropout_seed,
            site=first_site,
        )
        context_RD = read_rows(context_THK.flatten(1), read_R)
        if not self.has_norm:
            return F.linear(context_RD, self.output_weight, self.output_bias)
        is_whole = kept_T1 is None
        return self.ops.dropout_add_layer_norm(
            scaled(F.linear(context_RD, self.output_weight, None if is_whole else self.output_bias), kept_T1, read_R),
            read_rows(hidden_TD, read_R),
            self.layer_norm_weight,
            self.layer_norm_bias,
            self.eps,
            x_bias_D=self.output_bias if is_whole else None,
            dropout_p=self.output_dropout_prob if self.training else 0.0,
            dropout_seed=dropout_seed,
            site=first_site + 1,
        )


class BertFeedForward(nn.Module):
    """Dense, activation, dense; then dropout, residual, LayerNorm if post."""

    def __init__(self, config: LayerSettings, ops: FusedOps) -> None:
        super().__init__()
        hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
        self.ops = ops
        self.eps = config.layer_norm_eps
        self.act = config.hidden_act
        self.dropout_prob = config.dropout_of("feed_forward")
        self.has_norm = config.norm_position == "post"
        self.intermediate_weight = nn.Parameter(torch.empty(intermediate_size, hidden_size))
        self.intermediate_bias = nn.Parameter(torch.empty(intermediate_size))
        self.output_weight = nn.Parameter(torch.empty(hidden_size, intermediate_size))
        self.output_bias = nn.Parameter(torch.empty(hidden_size))
        if self.has_norm:
            self.layer_norm_weight = nn.Parameter(torch.empty(hidden_size))
            self.layer_norm_bias = nn.Parameter(torch.empty(hidden_size))

    def forward(
        self, hidden_TD: Tensor, dropout_seed: Tensor | None = None, *, site: int, kept_T1: Tensor | None = None
    ) -> Tensor:
        """Return dense(act(dense(hidden_TD))); if post LayerNorm(hidden_TD + dropout(kept * of it))."""
        inner_TF = F.linear(hidden_TD, self.intermediate_weight)
        intermediate_TF = activated(self.ops, inner_TF, self.intermediate_bias, self.act)
        if not self.has_norm:
            return F.linear(intermediate_TF, self.output_weight, self.output_bias)
        is_whole = kept_T1 is None
        return self.ops.dropout_add_layer_norm(
            scaled(F.linear(intermediate_TF, self.output_weight, None if is_whole else self.output_bias), kept_T1),
            hidden_TD,
            self.layer_norm_weight,
            self.layer_norm_bias,
            self.eps,
            x_bias_D=self.output_bias if is_whole else None,
            dropout_p=self.dropout_prob if self.training else 0.0,
            dropout_seed=dropout_seed,
            site=site,
        )


def share_parts(layers: nn.ModuleList, config: LayerSettings) -> None:
    """Let each layer call the attention and the feed-forward block that the settings say it has in common with another.

    A part is a child of its owner alone: its weights have one name, in checkpoints and for an optimizer, and ZeRO-3
    gathers them in each call of it.
    """
    for number, layer in enumerate(layers):
        for part in ("attention", "feed_forward"):
            if (owner := config.owner(number, part)) != number:
                delattr(layer, part)
                object.__setattr__(layer, part, getattr(layers[owner], part))


def first_free_site(config: LayerSettings) -> int:
    """Return the number of the first dropout mask that no layer uses."""
    return EMBEDDING_SITE + 1 + SITES_PER_LAYER * config.num_hidden_layers


@torch.no_grad()
def initialise_weights(module: nn.Module, config: LayerSettings, *, seed: int) -> None:
    """Fill every parameter as published: normal(0, initializer_range), biases 0, LayerNorm 1 and 0.

    Google's code cuts the normal at two standard deviations and Hugging Face's does not: this is the latter, but
    without its zero row for [PAD], as Google has it. Rows of the word embedding beyond vocab_size are zero and stay so.

    Args:
        module: an encoder or a model that holds one.
        config: gives initializer_range and vocab_size.
        seed: of a generator of its own; torch's global random state is neither read nor changed.

    Raises:
        ValueError: the parameters are partitioned already (`deepspeed.zero.Init`), so there is nothing here to fill.
    """
    refuse_partitioned(module)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.endswith("layer_norm_weight"):
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(0.0, config.initializer_range, generator=generator)
        if name.endswith("word_weight"):
            parameter[config.vocab_size :] = 0.0


def layer_rows(name: str, hf_name: str, config: LayerSettings, *, parts: Mapping[str, str]) -> Iterator[TensorRow]:
    """Yield the tensors of one layer.

    Args:
        name, hf_name: of the layer, ours and transformers'.
        config: sizes.
        parts: by our name of a part of the layer, or "query", "key" and "value", the name of it there.
    """
    hidden, intermediate = config.hidden_size, config.intermediate_size
    qkv: tuple[tuple[str, tuple[int, ...]], ...] = (("weight", (hidden,)), ("bias", ()))
    for kind, columns in qkv:
        theirs = tuple(f"{hf_name}.{parts[part]}.{kind}" for part in ("query", "key", "value"))
        yield TensorRow(f"{name}.attention.qkv_{kind}", (3 * hidden, *columns), theirs, hidden)
    is_post = config.norm_position == "post"
    for part, shape in (
        ("attention.output", (hidden, hidden)),
        *([("attention.layer_norm", (hidden,))] if is_post else []),
        ("feed_forward.intermediate", (intermediate, hidden)),
        ("feed_forward.output", (hidden, intermediate)),
        *([("feed_forward.layer_norm", (hidden,))] if is_post else []),
        *([] if is_post else [("attention_norm.layer_norm", (hidden,)), ("feed_forward_norm.layer_norm", (hidden,))]),
    ):
        yield from linear_rows(f"{name}.{part}", f"{hf_name}.{parts[part]}", *shape)


def _add_norm(config: LayerSettings, ops: FusedOps, *, dropped: HiddenPlace, site: int) -> AddNorm:
    dropout = Dropout(config.dropout_of(dropped), site)
    return AddNorm(config.hidden_size, eps=config.layer_norm_eps, dropout=dropout, ops=ops)
