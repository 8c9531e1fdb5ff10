"""BERT's encoder (Devlin et al. 2019, arXiv 1810.04805) on token streams from which the padding is removed.

Learned positions, segment embeddings, GELU; LayerNorm behind each block, or in front of it as Megatron has it
(Shoeybi et al. 2019, arXiv 1909.08053). The sequences of a micro-batch lie one behind the other in one stream of T
tokens; `cu_seqlens` says where each begins. Nothing here ever sees a padding token.

Letters in names and shapes:
    N sequences, T tokens of all sequences, P masked tokens, D hidden, H heads, K head dim, F intermediate,
    V rows of the word embedding (vocabulary padded to a multiple), S positions, 3 query/key/value.

Every parameter is read in the forward of the module that owns it, because that is where ZeRO-3 gathers it. The fused
operations take raw weights, so the module that calls an operation owns all of that operation's weights.

Dropout draws no random state: each mask is a function of `dropout_seed`, the element and the integer of its place
("site"), so a recomputed layer sees the masks of its first pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.families.bert import BertConfig
from bert_ds.encoder.blocks import AddNorm, Dropout, first_rows, refuse_partitioned, require_seed, through_layers
from bert_ds.encoder.families.family import LAYER_MATRICES, Family, Role, RoleName
from bert_ds.encoder.fused_ops import FusedOps
from bert_ds.encoder.tensor_rows import TensorRow, linear_rows, same_row
from bert_ds.encoder.word_head import MaskedWordHead

EMBEDDING_SITE = 0
SITES_PER_LAYER = 3


class BertEncoder(nn.Module):
    """Token stream -> hidden states; the pooler belongs to it because downstream tasks start from it.

    Args:
        config: shape, dropout and LayerNorm settings.
        ops: the table of fused operations.
        has_front: whether the pooler (dense and tanh on [CLS]) exists.
        activation_checkpointing: keep only each layer's input and recompute the rest in the backward pass.
    """

    def __init__(
        self, config: BertConfig, ops: FusedOps, *, has_front: bool = True, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.dropout_is_used = config.hidden_dropout_prob > 0 or config.attention_probs_dropout_prob > 0
        self.embeddings = BertEmbeddings(config, ops)
        make_layer = BertLayer if config.norm_position == "post" else PreNormLayer
        self.layer = nn.ModuleList(make_layer(config, ops, layer=index) for index in range(config.num_hidden_layers))
        self.final_norm = None
        if config.norm_position == "pre":
            self.final_norm = _add_norm(config, ops, site=first_free_site(config) - 1)
        self.pooler = BertPooler(config) if has_front else None

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
        require_seed(self, dropout_seed, drops=self.dropout_is_used)
        hidden_TD = self.embeddings(input_ids_T, token_type_ids_T, position_ids_T, dropout_seed)
        recompute = self.activation_checkpointing and self.training
        stream = (cu_seqlens, max_seqlen, dropout_seed)
        if self.final_norm is None:
            return through_layers(self.layer, hidden_TD, *stream, recompute=recompute)
        x_TD, residual_TD = through_layers(self.layer, (None, hidden_TD), *stream, recompute=recompute)
        return self.final_norm(x_TD, residual_TD, dropout_seed)[0]

    def sequence_rows(self, hidden_TD: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return what a head of whole sequences reads, [N, D]: the pooled [CLS]."""
        assert self.pooler is not None, "the encoder was made without its front"
        return self.pooler(hidden_TD, cu_seqlens)

    def token_rows(self, hidden_TD: Tensor) -> Tensor:
        """Return what a head of tokens reads, [T, D]."""
        return hidden_TD


class BertEmbeddings(nn.Module):
    """Sum of word, position and segment embedding, LayerNorm where the layers have it behind them, dropout."""

    def __init__(self, config: BertConfig, ops: FusedOps) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.ops = ops
        self.eps = config.layer_norm_eps
        self.dropout_prob = config.hidden_dropout_prob
        self.has_norm = config.norm_position == "post"
        self.word_weight = nn.Parameter(torch.empty(config.padded_vocab_size, hidden_size))
        self.position_weight = nn.Parameter(torch.empty(config.max_position_embeddings, hidden_size))
        self.token_type_weight = nn.Parameter(torch.empty(config.type_vocab_size, hidden_size))
        if self.has_norm:
            self.layer_norm_weight = nn.Parameter(torch.empty(hidden_size))
            self.layer_norm_bias = nn.Parameter(torch.empty(hidden_size))

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


class BertLayer(nn.Module):
    """Attention block, then feed-forward block, each followed by dropout, residual and LayerNorm."""

    def __init__(self, config: BertConfig, ops: FusedOps, *, layer: int) -> None:
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


class PreNormLayer(nn.Module):
    """LayerNorm, attention, LayerNorm, feed-forward; what a block gives is added where the next one begins."""

    def __init__(self, config: BertConfig, ops: FusedOps, *, layer: int) -> None:
        super().__init__()
        first_site = EMBEDDING_SITE + 1 + SITES_PER_LAYER * layer
        self.attention_norm = _add_norm(config, ops, site=first_site - 1)
        self.attention = BertAttention(config, ops, first_site=first_site)
        self.feed_forward_norm = _add_norm(config, ops, site=first_site + 1)
        self.feed_forward = BertFeedForward(config, ops, site=first_site + 2)

    def forward(
        self,
        x_TD: Tensor | None,
        residual_TD: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout_seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what the feed-forward block gives, and the residual stream that it is not yet added to."""
        normed_TD, residual_TD = self.attention_norm(x_TD, residual_TD, dropout_seed)
        x_TD = self.attention(normed_TD, cu_seqlens, max_seqlen, dropout_seed)
        normed_TD, residual_TD = self.feed_forward_norm(x_TD, residual_TD, dropout_seed)
        return self.feed_forward(normed_TD, dropout_seed), residual_TD


class BertAttention(nn.Module):
    """Self-attention of every sequence over itself and output projection; then dropout, residual, LayerNorm if post."""

    def __init__(self, config: BertConfig, ops: FusedOps, *, first_site: int) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.ops = ops
        self.eps = config.layer_norm_eps
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.probs_dropout_prob = config.attention_probs_dropout_prob
        self.output_dropout_prob = config.hidden_dropout_prob
        self.probs_site, self.output_site = first_site, first_site + 1
        self.has_norm = config.norm_position == "post"
        self.qkv_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.qkv_bias = nn.Parameter(torch.empty(3 * hidden_size))
        self.output_weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.output_bias = nn.Parameter(torch.empty(hidden_size))
        if self.has_norm:
            self.layer_norm_weight = nn.Parameter(torch.empty(hidden_size))
            self.layer_norm_bias = nn.Parameter(torch.empty(hidden_size))

    def forward(
        self, hidden_TD: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_seed: Tensor | None = None
    ) -> Tensor:
        """Return the projection of the attention over hidden_TD; if post LayerNorm(hidden_TD + dropout(of it))."""
        qkv_T3HK = F.linear(hidden_TD, self.qkv_weight, self.qkv_bias).view(-1, 3, self.num_heads, self.head_dim)
        context_THK = self.ops.attention(
            qkv_T3HK,
            cu_seqlens,
            max_seqlen,
            dropout_p=self.probs_dropout_prob if self.training else 0.0,
            dropout_seed=dropout_seed,
            site=self.probs_site,
        )
        if not self.has_norm:
            return F.linear(context_THK.flatten(1), self.output_weight, self.output_bias)
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
    """Dense, GELU, dense; then dropout, residual, LayerNorm if post."""

    def __init__(self, config: BertConfig, ops: FusedOps, *, site: int) -> None:
        super().__init__()
        hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
        self.ops = ops
        self.eps = config.layer_norm_eps
        self.approximate = gelu_approximation(config)
        self.dropout_prob = config.hidden_dropout_prob
        self.site = site
        self.has_norm = config.norm_position == "post"
        self.intermediate_weight = nn.Parameter(torch.empty(intermediate_size, hidden_size))
        self.intermediate_bias = nn.Parameter(torch.empty(intermediate_size))
        self.output_weight = nn.Parameter(torch.empty(hidden_size, intermediate_size))
        self.output_bias = nn.Parameter(torch.empty(hidden_size))
        if self.has_norm:
            self.layer_norm_weight = nn.Parameter(torch.empty(hidden_size))
            self.layer_norm_bias = nn.Parameter(torch.empty(hidden_size))

    def forward(self, hidden_TD: Tensor, dropout_seed: Tensor | None = None) -> Tensor:
        """Return dense(gelu(dense(hidden_TD))); if post LayerNorm(hidden_TD + dropout(of it))."""
        intermediate_TF = self.ops.bias_gelu(
            F.linear(hidden_TD, self.intermediate_weight), self.intermediate_bias, approximate=self.approximate
        )
        if not self.has_norm:
            return F.linear(intermediate_TF, self.output_weight, self.output_bias)
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

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense_weight = nn.Parameter(torch.empty(config.hidden_size, config.hidden_size))
        self.dense_bias = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, hidden_TD: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return pooled_ND; the row of an empty sequence is some other token's and has no meaning."""
        return torch.tanh(F.linear(first_rows(hidden_TD, cu_seqlens), self.dense_weight, self.dense_bias))


class PairHead(nn.Module):
    """Two scores from the pooled [CLS]: index 0 means is next (NSP) or in order (SOP), as Hugging Face has it."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(2))

    def forward(self, pooled_ND: Tensor) -> Tensor:
        """Return logits_N2."""
        return F.linear(pooled_ND, self.weight, self.bias)


def gelu_approximation(config: BertConfig) -> str:
    """Torch's name for the GELU that config.hidden_act asks for."""
    return {"gelu": "none", "gelu_new": "tanh"}[config.hidden_act]


def first_free_site(config: BertConfig) -> int:
    """Return the number of the first dropout mask that no layer uses."""
    return EMBEDDING_SITE + 1 + SITES_PER_LAYER * config.num_hidden_layers


@torch.no_grad()
def initialise_weights(module: nn.Module, config: BertConfig, *, seed: int) -> None:
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


def _word_head(config: BertConfig, ops: FusedOps) -> MaskedWordHead:
    return MaskedWordHead(config, ops, eps=config.layer_norm_eps, approximate=gelu_approximation(config))


def _add_norm(config: BertConfig, ops: FusedOps, *, site: int) -> AddNorm:
    dropout = Dropout(config.hidden_dropout_prob, site)
    return AddNorm(config.hidden_size, eps=config.layer_norm_eps, dropout=dropout, ops=ops)


_DECODER = "cls.predictions.decoder.weight"
_WORDS = "bert.embeddings.word_embeddings.weight"
_BUFFERS = ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")
_SHARED_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "initializer_range",
)
_CLASSES = {"post": "Bert", "pre": "MegatronBert"}
_WANTED = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def encoder_rows(config: BertConfig, *, has_front: bool) -> Iterator[TensorRow]:
    """Yield every tensor of the encoder, in the model's order."""
    hidden, embeddings, is_post = config.hidden_size, "bert.embeddings", config.norm_position == "post"
    yield TensorRow(f"{embeddings}.word_weight", (config.padded_vocab_size, hidden), (_WORDS,), config.vocab_size)
    for name, hf_name, rows in (
        ("position_weight", "position_embeddings", config.max_position_embeddings),
        ("token_type_weight", "token_type_embeddings", config.type_vocab_size),
    ):
        yield same_row(f"{embeddings}.{name}", f"{embeddings}.{hf_name}.weight", rows, hidden)
    if is_post:
        yield from linear_rows(f"{embeddings}.layer_norm", f"{embeddings}.LayerNorm", hidden)
    for layer in range(config.num_hidden_layers):
        name, hf_name = f"bert.layer.{layer}", f"bert.encoder.layer.{layer}"
        yield from _layer_rows(name, hf_name, config)
        if not is_post:
            yield from linear_rows(f"{name}.attention_norm.layer_norm", f"{hf_name}.attention.ln", hidden)
            yield from linear_rows(f"{name}.feed_forward_norm.layer_norm", f"{hf_name}.ln", hidden)
    if not is_post:
        yield from linear_rows("bert.final_norm.layer_norm", "bert.encoder.ln", hidden)
    if has_front:
        yield from linear_rows("bert.pooler.dense", "bert.pooler.dense", hidden, hidden)


def word_head_rows(config: BertConfig) -> Iterator[TensorRow]:
    """Yield the tensors of the masked-word head."""
    hidden = config.hidden_size
    yield from linear_rows("predictions.transform", "cls.predictions.transform.dense", hidden, hidden)
    yield from linear_rows("predictions.layer_norm", "cls.predictions.transform.LayerNorm", hidden)
    yield TensorRow("predictions.bias", (config.padded_vocab_size,), ("cls.predictions.bias",), config.vocab_size)


def pair_head_rows(config: BertConfig) -> Iterator[TensorRow]:
    """Yield the tensors of the pair head."""
    yield same_row("seq_relationship.weight", "cls.seq_relationship.weight", 2, config.hidden_size)
    yield same_row("seq_relationship.bias", "cls.seq_relationship.bias", 2)


def _layer_rows(name: str, hf_name: str, config: BertConfig) -> Iterator[TensorRow]:
    """Yield the tensors of one layer, but for LayerNorms in front of its blocks."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    qkv: tuple[tuple[str, tuple[int, ...]], ...] = (("weight", (hidden,)), ("bias", ()))
    for kind, columns in qkv:
        parts = tuple(f"{hf_name}.attention.self.{part}.{kind}" for part in ("query", "key", "value"))
        yield TensorRow(f"{name}.attention.qkv_{kind}", (3 * hidden, *columns), parts, hidden)
    is_post = config.norm_position == "post"
    for ours, theirs, shape in (
        ("attention.output", "attention.output.dense", (hidden, hidden)),
        *([("attention.layer_norm", "attention.output.LayerNorm", (hidden,))] if is_post else []),
        ("feed_forward.intermediate", "intermediate.dense", (intermediate, hidden)),
        ("feed_forward.output", "output.dense", (hidden, intermediate)),
        *([("feed_forward.layer_norm", "output.LayerNorm", (hidden,))] if is_post else []),
    ):
        yield from linear_rows(f"{name}.{ours}", f"{hf_name}.{theirs}", *shape)


def modern_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under today's names, without buffers and without the tied decoder.

    Old names are `gamma` and `beta` of a LayerNorm, no `bert.` in front, the decoder's bias under
    `cls.predictions.decoder`.
    """
    result: dict[str, Tensor] = {}
    for old_name, tensor in tensors.items():
        name = old_name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        name = name.replace("cls.predictions.decoder.bias", "cls.predictions.bias")
        if name.startswith(("embeddings.", "encoder.", "pooler.")):
            name = f"bert.{name}"
        if name in result and not torch.equal(result[name], tensor):
            raise CheckpointError(f"tensor {old_name} is a second {name} with other values")
        if name not in _BUFFERS:
            result[name] = tensor
    decoder = result.pop(_DECODER, None)
    if decoder is not None and _WORDS in result and not torch.equal(decoder, result[_WORDS]):
        raise CheckpointError(f"{_DECODER} differs from {_WORDS}, but this model ties the two")
    return result


def hf_settings(config: BertConfig, special_ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the content of config.json."""
    return {
        "model_type": next(
            name for name, fixed in config.HF_TYPES.items() if fixed["norm_position"] == config.norm_position
        ),
        **{key: getattr(config, key) for key in _SHARED_SETTINGS},
        "pad_token_id": special_ids["pad"],
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def from_hf_settings(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return our settings of a config.json, and what this encoder cannot be."""
    problems = [
        f"{key} is {repr(content[key])[:60]}, wanted {value!r}"
        for key, value in _WANTED.items()
        if content.get(key, value) != value
    ]
    return {key: content[key] for key in _SHARED_SETTINGS if key in content}, problems


def _roles(config: BertConfig) -> dict[RoleName, Role]:
    name = _CLASSES[config.norm_position]
    return {
        "masked words": Role(f"{name}ForMaskedLM"),
        "pre-training": Role(f"{name}ForPreTraining"),
        "encoder": Role(f"{name}Model", without_front={"add_pooling_layer": False}),
        "sequence classification": Role(f"{name}ForSequenceClassification", "classifier", reads_front=True),
        "token tags": Role(f"{name}ForTokenClassification", "classifier"),
        "question answering": Role(f"{name}ForQuestionAnswering", "qa_outputs", has_dropout=False),
        "multiple choice": Role(f"{name}ForMultipleChoice", "classifier", reads_front=True),
    }


BERT = Family(
    make_encoder=BertEncoder,
    word_head=_word_head,
    pair_head=PairHead,
    initialise=initialise_weights,
    no_decay_patterns=lambda config: ("*bias", "*layer_norm_weight"),
    equal_parts=lambda config: dict.fromkeys(("*qkv_weight", "*qkv_bias"), ("query", "key", "value")),
    matrix_patterns=LAYER_MATRICES,
    roles=_roles,
    encoder_rows=encoder_rows,
    word_head_rows=word_head_rows,
    pair_head_rows=pair_head_rows,
    hf_head_prefixes=("cls.", "classifier.", "qa_outputs."),
    hf_settings=hf_settings,
    from_hf_settings=from_hf_settings,
    modern_names=modern_names,
    first_free_site=first_free_site,
)
