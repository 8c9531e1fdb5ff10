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

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_ds.configuration.families.bert import BertConfig
from bert_ds.encoder.bert_layers import LayeredEncoder
from bert_ds.encoder.blocks import first_rows
from bert_ds.encoder.families.bert_form import BertForm, common_roles
from bert_ds.encoder.families.embeddings import BertEmbeddings, EmbeddingSettings, sinusoids
from bert_ds.encoder.families.family import Role, RoleName
from bert_ds.encoder.fused_ops import FusedOps
from bert_ds.encoder.tensor_rows import TensorRow, same_row


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
    """A score per kind of pair from the pooled [CLS]: index 0 is next (NSP) or in order (SOP), as Hugging Face's."""

    def __init__(self, config: EmbeddingSettings, num_classes: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(num_classes))

    def forward(self, pooled_ND: Tensor) -> Tensor:
        """Return logits_NC."""
        return F.linear(pooled_ND, self.weight, self.bias)


_SETTINGS = (
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
    "classifier_dropout",
)
_FORM = BertForm(
    config=BertConfig,
    encoder="bert",
    front=("bert.pooler.dense", "bert.pooler.dense"),
    word_head=("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions"),
    decoder="cls.predictions.decoder",
    settings={name: name for name in _SETTINGS},
    wanted={
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
)


def pair_head_rows(config: EmbeddingSettings) -> Iterator[TensorRow]:
    """Yield the tensors of the pair head."""
    yield same_row("seq_relationship.weight", "cls.seq_relationship.weight", 2, config.hidden_size)
    yield same_row("seq_relationship.bias", "cls.seq_relationship.bias", 2)


def _roles(config: EmbeddingSettings) -> dict[RoleName, Role]:
    name = {"post": "Bert", "pre": "MegatronBert"}[config.norm_position]
    return {**common_roles(name, has_pooler=True), "pre-training": Role(f"{name}ForPreTraining")}


def _fixed_tensors(config: BertConfig) -> dict[str, Tensor]:
    if config.positions == "learned":
        return {}
    return {"bert.embeddings.position_weight": sinusoids(config.max_position_embeddings, config.hidden_size)}


BERT = _FORM.family(
    make_encoder=BertEncoder,
    pair_head=PairHead,
    roles=_roles,
    pair_head_rows=pair_head_rows,
    hf_head_prefixes=("cls.", "classifier.", "qa_outputs."),
    fixed_tensors=_fixed_tensors,
)
