"""RoBERTa's encoder (Liu et al. 2019, arXiv 1907.11692): BERT's layers behind embeddings without segments.

Positions are counted from behind the id of the padding, and every token has the one segment vector. There is no pooler:
between the encoder and a classifier of whole sequences lies a dense layer with tanh, which pre-training does not have.
Letters as in `families/bert.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.families.roberta import RobertaConfig
from bert_ds.encoder import bert_layers
from bert_ds.encoder.bert_layers import HF_LAYER_PARTS, LayeredEncoder, layer_rows
from bert_ds.encoder.blocks import Dropout, DroppingFront, first_rows
from bert_ds.encoder.families.embeddings import BertEmbeddings
from bert_ds.encoder.families.family import LAYER_MATRICES, Family, Role, RoleName, refused_settings
from bert_ds.encoder.fused_ops import FusedOps
from bert_ds.encoder.tensor_rows import TensorRow, linear_rows, same_row, without_tied
from bert_ds.encoder.word_head import MaskedWordHead


class RobertaEncoder(LayeredEncoder):
    """Token stream -> hidden states; segments have no meaning.

    Args:
        config: shape, dropout and LayerNorm settings.
        ops: the table of fused operations.
        has_front: whether the dense layer in front of a classifier of sequences exists.
        activation_checkpointing: keep only each layer's input and recompute the rest in the backward pass.
    """

    def __init__(
        self, config: RobertaConfig, ops: FusedOps, *, has_front: bool = True, activation_checkpointing: bool = False
    ) -> None:
        embeddings = RobertaEmbeddings(config, ops)
        super().__init__(config, ops, embeddings, activation_checkpointing=activation_checkpointing)
        dropout = Dropout(config.hidden_dropout_prob, bert_layers.first_free_site(config))
        self.front = DroppingFront(config.hidden_size, ops, dropout=dropout, act=torch.tanh) if has_front else None

    def sequence_rows(self, hidden_TD: Tensor, cu_seqlens: Tensor, dropout_seed: Tensor | None = None) -> Tensor:
        """Return what a head of whole sequences reads, [N, D]: <s> through the front, which drops with a seed."""
        assert self.front is not None, "the encoder was made without its front"
        return self.front(first_rows(hidden_TD, cu_seqlens), dropout_seed)


class RobertaEmbeddings(BertEmbeddings):
    """BERT's embeddings with positions from behind the padding's and the same segment everywhere."""

    def __init__(self, config: RobertaConfig, ops: FusedOps) -> None:
        super().__init__(config, ops, width=config.hidden_size)
        self.first_position = config.first_position

    def forward(
        self, input_ids_T: Tensor, token_type_ids_T: Tensor, position_ids_T: Tensor, dropout_seed: Tensor | None
    ) -> Tensor:
        """Return hidden_TD of int64 [T] ids and positions, which count from 0 here."""
        same_T = torch.zeros_like(token_type_ids_T)
        return super().forward(input_ids_T, same_T, position_ids_T + self.first_position, dropout_seed)


def first_free_site(config: RobertaConfig) -> int:
    """Return the number of the first dropout mask behind those of the layers and of the front."""
    return bert_layers.first_free_site(config) + 1


@torch.no_grad()
def initialise_weights(module: nn.Module, config: RobertaConfig, *, seed: int) -> None:
    """As BERT's, with zeros for the positions that no token has."""
    bert_layers.initialise_weights(module, config, seed=seed)
    for name, parameter in module.named_parameters():
        if name.endswith("position_weight"):
            parameter[: config.first_position] = 0.0


def _word_head(config: RobertaConfig, ops: FusedOps) -> MaskedWordHead:
    # transformers' head has the erf form of GELU whatever hidden_act is.
    return MaskedWordHead(config, ops, eps=config.layer_norm_eps)


_DECODER = "lm_head.decoder.weight"
_WORDS = "roberta.embeddings.word_embeddings.weight"
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
_POOLER = "roberta.pooler.dense"
_NOT_WRITTEN = ("type", "pad_vocab_size_to_multiple_of")
_SETTINGS = tuple(name for name in RobertaConfig.model_fields if name not in _NOT_WRITTEN)
_WANTED = {
    "type_vocab_size": 1,
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "position_embedding_type": "absolute",
}


def encoder_rows(config: RobertaConfig, *, has_front: bool) -> Iterator[TensorRow]:
    """Yield every tensor of the encoder, in the model's order."""
    hidden, name, hf_name = config.hidden_size, "bert.embeddings", "roberta.embeddings"
    yield TensorRow(f"{name}.word_weight", (config.padded_vocab_size, hidden), (_WORDS,), config.vocab_size)
    for ours, theirs, rows in (
        ("position_weight", "position_embeddings", config.position_rows),
        ("token_type_weight", "token_type_embeddings", config.type_vocab_size),
    ):
        yield same_row(f"{name}.{ours}", f"{hf_name}.{theirs}.weight", rows, hidden)
    yield from linear_rows(f"{name}.layer_norm", f"{hf_name}.LayerNorm", hidden)
    for layer in range(config.num_hidden_layers):
        yield from layer_rows(f"bert.layer.{layer}", f"roberta.encoder.layer.{layer}", config, parts=HF_LAYER_PARTS)
    if has_front:
        yield from linear_rows("bert.front.dense", "classifier.dense", hidden, hidden)


def word_head_rows(config: RobertaConfig) -> Iterator[TensorRow]:
    """Yield the tensors of the masked-word head."""
    hidden = config.hidden_size
    yield from linear_rows("predictions.transform", "lm_head.dense", hidden, hidden)
    yield from linear_rows("predictions.layer_norm", "lm_head.layer_norm", hidden)
    yield TensorRow("predictions.bias", (config.padded_vocab_size,), ("lm_head.bias",), config.vocab_size)


def modern_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without buffers, without the tied decoder, and without a pooler that nothing is behind.

    An encoder alone has no `roberta.` in front of its names. Published folders of masked words hold a pooler that was
    never trained.
    """
    named = {
        f"roberta.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(_BUFFERS)
    }
    bias = named.pop("lm_head.decoder.bias", None)
    if bias is not None and not torch.equal(named.setdefault("lm_head.bias", bias), bias):
        raise CheckpointError("lm_head.decoder.bias differs from lm_head.bias, which is the same tensor")
    if "lm_head.dense.weight" in named:
        named = {name: tensor for name, tensor in named.items() if not name.startswith(_POOLER)}
    return without_tied(named, _DECODER, words=_WORDS)


def hf_settings(config: RobertaConfig, special_ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the content of config.json."""
    return {
        "model_type": "roberta",
        **{name: getattr(config, name) for name in _SETTINGS},
        "max_position_embeddings": config.position_rows,
        "bos_token_id": special_ids["cls"],
        "eos_token_id": special_ids["sep"],
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def from_hf_settings(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return our settings of a config.json, and what this encoder cannot be."""
    settings = {name: content[name] for name in _SETTINGS if name in content}
    return {"type": "roberta", **settings, **RobertaConfig.from_hf_values(content)}, refused_settings(content, _WANTED)


def _roles(config: RobertaConfig) -> dict[RoleName, Role]:
    pooler = ("classifier.dense", _POOLER)
    return {
        "masked words": Role("RobertaForMaskedLM"),
        "encoder": Role("RobertaModel", without_front={"add_pooling_layer": False}),
        "sequence classification": Role(
            "RobertaForSequenceClassification", "classifier.out_proj", reads_front=True, front_drops=True
        ),
        "token tags": Role("RobertaForTokenClassification", "classifier"),
        "question answering": Role("RobertaForQuestionAnswering", "qa_outputs", has_dropout=False),
        "multiple choice": Role("RobertaForMultipleChoice", "classifier", reads_front=True, front_renamed=pooler),
    }


ROBERTA = Family(
    make_encoder=RobertaEncoder,
    word_head=_word_head,
    pair_head=None,
    initialise=initialise_weights,
    no_decay_patterns=lambda config: ("*bias", "*layer_norm_weight"),
    equal_parts=lambda config: dict.fromkeys(("*qkv_weight", "*qkv_bias"), ("query", "key", "value")),
    matrix_patterns=LAYER_MATRICES,
    roles=_roles,
    encoder_rows=encoder_rows,
    word_head_rows=word_head_rows,
    pair_head_rows=lambda config: iter(()),
    hf_head_prefixes=(
        *("lm_head.", "qa_outputs.", _POOLER),
        *("classifier.out_proj.", "classifier.weight", "classifier.bias"),
    ),
    hf_settings=hf_settings,
    from_hf_settings=from_hf_settings,
    modern_names=modern_names,
    first_free_site=first_free_site,
)
