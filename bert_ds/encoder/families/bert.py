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
from bert_ds.encoder.bert_layers import (
    HF_LAYER_PARTS,
    LayeredEncoder,
    first_free_site,
    initialise_weights,
    layer_rows,
)
from bert_ds.encoder.blocks import first_rows
from bert_ds.encoder.families.embeddings import BertEmbeddings, EmbeddingSettings, sinusoids
from bert_ds.encoder.families.family import LAYER_MATRICES, Family, Role, RoleName, refused_settings
from bert_ds.encoder.fused_ops import FusedOps
from bert_ds.encoder.tensor_rows import TensorRow, linear_rows, same_row, without_tied
from bert_ds.encoder.word_head import MaskedWordHead


class BertEncoder(LayeredEncoder):
    """Token stream -> hidden states; the pooler belongs to it because downstream tasks start from it.

    Args:
        config: shape, dropout and LayerNorm settings.
        ops: the table of fused operations.
        has_front: whether the pooler (dense and tanh on [CLS]) exists.
        activation_checkpointing: keep only each layer's input and recompute the rest in the backward pass.
        embeddings: None for BERT's.
    """

    def __init__(
        self,
        config: EmbeddingSettings,
        ops: FusedOps,
        *,
        has_front: bool = True,
        activation_checkpointing: bool = False,
        embeddings: nn.Module | None = None,
    ) -> None:
        if embeddings is None:
            has_sinusoids = getattr(config, "positions", "learned") == "sinusoid"
            embeddings = BertEmbeddings(config, ops, width=config.hidden_size, has_sinusoids=has_sinusoids)
        super().__init__(config, ops, embeddings, activation_checkpointing=activation_checkpointing)
        self.pooler = BertPooler(config) if has_front else None

    def sequence_rows(self, hidden_TD: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return what a head of whole sequences reads, [N, D]: the pooled [CLS]."""
        assert self.pooler is not None, "the encoder was made without its front"
        return self.pooler(hidden_TD, cu_seqlens)


class BertPooler(nn.Module):
    """Dense and tanh on the [CLS] token of every sequence."""

    def __init__(self, config: EmbeddingSettings) -> None:
        super().__init__()
        self.dense_weight = nn.Parameter(torch.empty(config.hidden_size, config.hidden_size))
        self.dense_bias = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, hidden_TD: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return pooled_ND; the row of an empty sequence is some other token's and has no meaning."""
        return torch.tanh(F.linear(first_rows(hidden_TD, cu_seqlens), self.dense_weight, self.dense_bias))


class PairHead(nn.Module):
    """Two scores from the pooled [CLS]: index 0 means is next (NSP) or in order (SOP), as Hugging Face has it."""

    def __init__(self, config: EmbeddingSettings) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(2))

    def forward(self, pooled_ND: Tensor) -> Tensor:
        """Return logits_N2."""
        return F.linear(pooled_ND, self.weight, self.bias)


def _word_head(config: BertConfig, ops: FusedOps) -> MaskedWordHead:
    return MaskedWordHead(config, ops, eps=config.layer_norm_eps, act=config.hidden_act)


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
        yield from layer_rows(name, hf_name, config, parts=HF_LAYER_PARTS)
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
    return without_tied(result, _DECODER, words=_WORDS)


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
    return {key: content[key] for key in _SHARED_SETTINGS if key in content}, refused_settings(content, _WANTED)


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


def _fixed_tensors(config: BertConfig) -> dict[str, Tensor]:
    if config.positions == "learned":
        return {}
    return {"bert.embeddings.position_weight": sinusoids(config.max_position_embeddings, config.hidden_size)}


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
    fixed_tensors=_fixed_tensors,
)
