"""BERT's encoder (Devlin et al. 2019, arXiv 1810.04805) on token streams from which the padding is removed.

Post-LayerNorm, learned positions, segment embeddings, erf GELU. The sequences of a micro-batch lie one behind the
other in one stream of T tokens; `cu_seqlens` says where each begins. Nothing here ever sees a padding token.

Letters in names and shapes:
    N sequences, T tokens of all sequences, P masked tokens, D hidden, H heads, K head dim, F intermediate,
    V rows of the word embedding (vocabulary padded to a multiple), S positions, 3 query/key/value.

Every parameter is read in the forward of the module that owns it, because that is where ZeRO-3 gathers it. The fused
operations take raw weights, so the module that calls an operation owns all of that operation's weights.

Dropout draws no random state: each mask is a function of `dropout_seed`, the element and the integer of its place
("site"), so a recomputed layer sees the masks of its first pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bert_ds.configuration.recipe.run_config import ModelConfig
from bert_ds.encoder.fused_ops import FusedOps

EMBEDDING_SITE = 0
SITES_PER_LAYER = 3


class BertEncoder(nn.Module):
    """Token stream -> hidden states; the pooler belongs to it because downstream tasks start from it.

    Args:
        config: shape, dropout and LayerNorm settings.
        ops: the table of fused operations.
        has_pooler: whether the pooler (dense and tanh on [CLS]) exists.
        activation_checkpointing: keep only each layer's input and recompute the rest in the backward pass.
    """

    matrix_patterns = (
        "*.attention.qkv_weight",
        "*.attention.output_weight",
        "*.feed_forward.intermediate_weight",
        "*.feed_forward.output_weight",
    )
    """The weights of the layers, which an optimizer may treat as matrices; query, key and value are one each."""

    def __init__(
        self, config: ModelConfig, ops: FusedOps, *, has_pooler: bool = True, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.dropout_is_used = config.hidden_dropout_prob > 0 or config.attention_probs_dropout_prob > 0
        self.embeddings = BertEmbeddings(config, ops)
        self.layer = nn.ModuleList(BertLayer(config, ops, layer=index) for index in range(config.num_hidden_layers))
        self.pooler = BertPooler(config) if has_pooler else None

    def forward(
        self,
        input_ids_T: Tensor,
        token_type_ids_T: Tensor,
        *,
        position_ids_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout_seed: Tensor | None = None,
    ) -> Tensor:
        """Encode a packed micro-batch.

        Args:
            input_ids_T, token_type_ids_T, position_ids_T: int64 [T]; positions count from 0 in each sequence.
            cu_seqlens: int32 [N + 1], cu_seqlens[n] is the first token of sequence n; a sequence may be empty.
            max_seqlen: tokens of the longest sequence.
            dropout_seed: int64 [1], on the device of the ids; needed in training mode when the config has dropout.

        Returns:
            hidden_TD in the dtype of the parameters.
        """
        if self.training and self.dropout_is_used and dropout_seed is None:
            raise ValueError("dropout_seed is None, but the model is in training mode and its config has dropout")
        hidden_TD = self.embeddings(input_ids_T, token_type_ids_T, position_ids_T, dropout_seed)
        for layer in self.layer:
            if self.activation_checkpointing and self.training:
                hidden_TD = checkpoint(
                    layer,
                    hidden_TD,
                    cu_seqlens,
                    max_seqlen,
                    dropout_seed,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                hidden_TD = layer(hidden_TD, cu_seqlens, max_seqlen, dropout_seed)
        return hidden_TD


class BertEmbeddings(nn.Module):
    """Sum of word, position and segment embedding, LayerNorm, dropout."""

    def __init__(self, config: ModelConfig, ops: FusedOps) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.ops = ops
        self.eps = config.layer_norm_eps
        self.dropout_prob = config.hidden_dropout_prob
        self.word_weight = nn.Parameter(torch.empty(config.padded_vocab_size, hidden_size))
        self.position_weight = nn.Parameter(torch.empty(config.max_position_embeddings, hidden_size))
        self.token_type_weight = nn.Parameter(torch.empty(config.type_vocab_size, hidden_size))
        self.layer_norm_weight = nn.Parameter(torch.empty(hidden_size))
        self.layer_norm_bias = nn.Parameter(torch.empty(hidden_size))

    def forward(
        self, input_ids_T: Tensor, token_type_ids_T: Tensor, position_ids_T: Tensor, dropout_seed: Tensor | None
    ) -> Tensor:
        """Return hidden_TD of three int64 [T] id vectors."""
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
            dropout_p=self.dropout_prob if self.training else 0.0,
            dropout_seed=dropout_seed,
            site=EMBEDDING_SITE,
        )


class BertLayer(nn.Module):
    """Attention block, then feed-forward block, each followed by dropout, residual and LayerNorm."""

    def __init__(self, config: ModelConfig, ops: FusedOps, *, layer: int) -> None:
        super().__init__()
        first_site = EMBEDDING_SITE + 1 + SITES_PER_LAYER * layer
        self.attention = BertAttention(config, ops, first_site=first_site)
        self.feed_forward = BertFeedForward(config, ops, site=first_site + 2)

    def forward(
        self, hidden_TD: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_seed: Tensor | None = None
    ) -> Tensor:
        """Return hidden_TD of the next layer."""
        hidden_TD = self.attention(hidden_TD, cu_seqlens, max_seqlen, dropout_seed)
        return self.feed_forward(hidden_TD, dropout_seed)


class BertAttention(nn.Module):
    """Self-attention of every sequence over itself, output projection, dropout, residual, LayerNorm."""

    def __init__(self, config: ModelConfig, ops: FusedOps, *, first_site: int) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.ops = ops
        self.eps = config.layer_norm_eps
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.probs_dropout_prob = config.attention_probs_dropout_prob
        self.output_dropout_prob = config.hidden_dropout_prob
        self.probs_site, self.output_site = first_site, first_site + 1
        self.qkv_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.qkv_bias = nn.Parameter(torch.empty(3 * hidden_size))
        self.output_weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.output_bias = nn.Parameter(torch.empty(hidden_size))
        self.layer_norm_weight = nn.Parameter(torch.empty(hidden_size))
        self.layer_norm_bias = nn.Parameter(torch.empty(hidden_size))

    def forward(
        self, hidden_TD: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_seed: Tensor | None = None
    ) -> Tensor:
        """Return LayerNorm(hidden_TD + dropout(projection of the attention over hidden_TD))."""
        qkv_T3HK = F.linear(hidden_TD, self.qkv_weight, self.qkv_bias).view(-1, 3, self.num_heads, self.head_dim)
        context_THK = self.ops.attention(
            qkv_T3HK,
            cu_seqlens,
            max_seqlen,
            dropout_p=self.probs_dropout_prob if self.training else 0.0,
            dropout_seed=dropout_seed,
            site=self.probs_site,
        )
        return self.ops.dropout_add_layer_norm(
            F.linear(context_THK.flatten(1), self.output_weight),
            hidden_TD,
            self.layer_norm_weight,
            self.layer_norm_bias,
            self.eps,
            x_bias_D=self.output_bias,
            dropout_p=self.output_dropout_prob if self.training else 0.0,
            dropout_seed=dropout_seed,
            site=self.output_site,
        )


class BertFeedForward(nn.Module):
    """Dense, GELU, dense, dropout, residual, LayerNorm."""

    def __init__(self, config: ModelConfig, ops: FusedOps, *, site: int) -> None:
        super().__init__()
        hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
        self.ops = ops
        self.eps = config.layer_norm_eps
        self.approximate = gelu_approximation(config)
        self.dropout_prob = config.hidden_dropout_prob
        self.site = site
        self.intermediate_weight = nn.Parameter(torch.empty(intermediate_size, hidden_size))
        self.intermediate_bias = nn.Parameter(torch.empty(intermediate_size))
        self.output_weight = nn.Parameter(torch.empty(hidden_size, intermediate_size))
        self.output_bias = nn.Parameter(torch.empty(hidden_size))
        self.layer_norm_weight = nn.Parameter(torch.empty(hidden_size))
        self.layer_norm_bias = nn.Parameter(torch.empty(hidden_size))

    def forward(self, hidden_TD: Tensor, dropout_seed: Tensor | None = None) -> Tensor:
        """Return LayerNorm(hidden_TD + dropout(dense(gelu(dense(hidden_TD)))))."""
        intermediate_TF = self.ops.bias_gelu(
            F.linear(hidden_TD, self.intermediate_weight), self.intermediate_bias, approximate=self.approximate
        )
        return self.ops.dropout_add_layer_norm(
            F.linear(intermediate_TF, self.output_weight),
            hidden_TD,
            self.layer_norm_weight,
            self.layer_norm_bias,
            self.eps,
            x_bias_D=self.output_bias,
            dropout_p=self.dropout_prob if self.training else 0.0,
            dropout_seed=dropout_seed,
            site=self.site,
        )


class BertPooler(nn.Module):
    """Dense and tanh on the [CLS] token of every sequence."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense_weight = nn.Parameter(torch.empty(config.hidden_size, config.hidden_size))
        self.dense_bias = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, hidden_TD: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return pooled_ND; the row of an empty sequence is some other token's and has no meaning."""
        first_tokens_N = cu_seqlens[:-1].clamp(max=hidden_TD.shape[0] - 1)
        cls_ND = hidden_TD.index_select(0, first_tokens_N)
        return torch.tanh(F.linear(cls_ND, self.dense_weight, self.dense_bias))


def gelu_approximation(config: ModelConfig) -> str:
    """Torch's name for the GELU that config.hidden_act asks for."""
    return {"gelu": "none", "gelu_new": "tanh"}[config.hidden_act]


@torch.no_grad()
def initialise_weights(module: nn.Module, config: ModelConfig, *, seed: int) -> None:
    """Fill every parameter as published: normal(0, initializer_range), biases 0, LayerNorm 1 and 0.

    Google's code cuts the normal at two standard deviations and Hugging Face's does not: this is the latter, but
    without its zero row for [PAD], as Google has it. Rows of the word embedding beyond vocab_size are zero and stay so.

    Args:
        module: a BertEncoder or a model that holds one.
        config: gives initializer_range and vocab_size.
        seed: of a generator of its own; torch's global random state is neither read nor changed.

    Raises:
        ValueError: the parameters are partitioned already (`deepspeed.zero.Init`), so there is nothing here to fill.
    """
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        raise ValueError("the model is built under deepspeed.zero.Init; wanted a whole model, partitioned afterwards")
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
