"""What families of BERT's form have in common: transformers' names of tensors and settings, roles, front and row.

They have the layers of `bert_layers` behind embeddings of words, positions and perhaps segments, and the masked-word
head. A family's file says in a `BertForm` what transformers calls these, and then what else is its own. Letters as in
`families/bert.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.families.bert_layers import BertLayersConfig
from bert_ds.encoder.bert_layers import HF_LAYER_PARTS, LayeredEncoder, first_free_site, initialise_weights, layer_rows
from bert_ds.encoder.blocks import Dropout, DroppingFront, first_rows
from bert_ds.encoder.families.family import LAYER_MATRICES, Family, Role, RoleName, refused_settings
from bert_ds.encoder.fused_ops import FusedOps
from bert_ds.encoder.tensor_rows import TensorRow, linear_rows, same_row, without_tied
from bert_ds.encoder.word_head import MaskedWordHead

_NOT_WRITTEN = ("type", "pad_vocab_size_to_multiple_of", *BertLayersConfig.DROPOUTS)
_ENCODER_PARTS = ("embeddings", "encoder.", "transformer.", "pooler.")
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class FrontedEncoder(LayeredEncoder):
    """Token stream -> hidden states, and a dense layer in front of a classifier of sequences.

    Args:
        config: shape, dropout and LayerNorm settings.
        ops: the table of fused operations.
        embeddings: see `LayeredEncoder`.
        act: activation of the front.
        has_front: whether the front exists.
        activation_checkpointing: keep only each layer's input and recompute the rest in the backward pass.
    """

    def __init__(
        self,
        config: BertLayersConfig,
        ops: FusedOps,
        embeddings: nn.Module,
        *,
        act: Callable[[Tensor], Tensor],
        has_front: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(config, ops, embeddings, activation_checkpointing=activation_checkpointing)
        dropout = Dropout(config.classifier_dropout_prob, first_free_site(config))
        self.front = DroppingFront(config.hidden_size, ops, dropout=dropout, act=act) if has_front else None

    def sequence_rows(self, hidden_TD: Tensor, cu_seqlens: Tensor, dropout_seed: Tensor | None = None) -> Tensor:
        """Return what a head of whole sequences reads, [N, D]: the first token through the front, which drops with a
        seed."""
        assert self.front is not None, "the encoder was made without its front"
        return self.front(first_rows(hidden_TD, cu_seqlens), dropout_seed)


def site_behind_front(config: BertLayersConfig) -> int:
    """Return the number of the first dropout mask behind those of the layers and of a front that drops."""
    return first_free_site(config) + 1


def written_settings(config: type[BertLayersConfig], *without: str) -> dict[str, str]:
    """Return the settings that stand in config.json, but for some, with their names there."""
    names = [name for name in config.model_fields if name not in (*_NOT_WRITTEN, *without)]
    return {name: config.HF_NAMES.get(name, name) for name in names}


def common_roles(name: str, *, has_pooler: bool = False) -> dict[RoleName, Role]:
    """Return the roles of transformers' classes of a name, as most families have them."""
    without = {"add_pooling_layer": False} if has_pooler else {}
    return {
        "masked words": Role(f"{name}ForMaskedLM"),
        "encoder": Role(f"{name}Model", without_front=without),
        "sequence classification": Role(f"{name}ForSequenceClassification", "classifier", reads_front=True),
        "token tags": Role(f"{name}ForTokenClassification", "classifier"),
        "question answering": Role(f"{name}ForQuestionAnswering", "qa_outputs", has_dropout=False),
        "multiple choice": Role(f"{name}ForMultipleChoice", "classifier", reads_front=True),
    }


@dataclass(frozen=True, kw_only=True)
class BertForm:
    """What transformers calls the parts of a family of BERT's form."""

    config: type[BertLayersConfig]
    encoder: str
    """How names of the encoder begin."""
    front: tuple[str, str]
    """Our name of the dense layer in front of a classifier of sequences, and theirs."""
    word_head: tuple[str, str, str]
    """Of the masked-word head the dense layer, the LayerNorm, and what holds the bias of the decoder."""
    decoder: str
    settings: Mapping[str, str]
    """Settings that config.json has -> its names."""
    wanted: Mapping[str, Any]
    """Settings of config.json that the family can be alone."""
    more_settings: Callable[[Any, Mapping[str, int]], dict[str, Any]] = lambda config, special_ids: {}
    """(config, ids of "pad", "cls", "sep") -> what config.json says besides."""
    layer: str = "encoder.layer.{}"
    """A layer, by its number among those with weights of their own."""
    parts: Mapping[str, str] = field(default_factory=lambda: HF_LAYER_PARTS)
    projection: str = ""
    """The dense layer between embeddings and layers, of families that have one."""
    word_head_act: str = ""
    """Activation of the masked-word head where it does not go by hidden_act."""

    def family(self, **others: Any) -> Family:
        """Return the row; `others` are its fields that are not as in most families of BERT's form."""
        row = {
            "word_head": self.make_word_head,
            "pair_head": None,
            "initialise": initialise_weights,
            "no_decay_patterns": lambda config: ("*bias", "*layer_norm_weight"),
            "equal_parts": lambda config: dict.fromkeys(("*qkv_weight", "*qkv_bias"), ("query", "key", "value")),
            "matrix_patterns": LAYER_MATRICES,
            "encoder_rows": self.encoder_rows,
            "word_head_rows": self.word_head_rows,
            "pair_head_rows": lambda config: iter(()),
            "hf_settings": self.hf_settings,
            "from_hf_settings": self.from_hf_settings,
            "modern_names": self.modern_names,
            "first_free_site": first_free_site,
        }
        return Family(**{**row, **others})

    def make_word_head(self, config: BertLayersConfig, ops: FusedOps) -> MaskedWordHead:
        """Return the masked-word head."""
        return MaskedWordHead(config, ops, eps=config.layer_norm_eps, act=self.word_head_act or config.hidden_act)

    def encoder_rows(self, config: BertLayersConfig, *, has_front: bool) -> Iterator[TensorRow]:
        """Yield every tensor of the encoder, in the model's order."""
        hidden, width, name, hf_name = config.hidden_size, config.embedding_width, "bert.embeddings", self.encoder
        words = f"{hf_name}.embeddings.word_embeddings.weight"
        yield TensorRow(f"{name}.word_weight", (config.padded_vocab_size, width), (words,), config.vocab_size)
        for ours, theirs, rows in (
            ("position_weight", "position_embeddings", config.position_rows),
            ("token_type_weight", "token_type_embeddings", config.segment_rows),
        ):
            if rows:
                yield same_row(f"{name}.{ours}", f"{hf_name}.embeddings.{theirs}.weight", rows, width)
        if config.norm_position == "post":
            yield from linear_rows(f"{name}.layer_norm", f"{hf_name}.embeddings.LayerNorm", width)
        if config.projection_weights:
            yield from linear_rows(f"{name}.projection", f"{hf_name}.{self.projection}", hidden, width)
        own = [layer for layer in range(config.num_hidden_layers) if config.owner(layer, "attention") == layer]
        for number, layer in enumerate(own):
            theirs = f"{hf_name}.{self.layer.format(number)}"
            yield from layer_rows(f"bert.layer.{layer}", theirs, config, parts=self.parts)
        if config.norm_position == "pre":
            yield from linear_rows("bert.final_norm.layer_norm", f"{hf_name}.encoder.ln", hidden)
        if has_front:
            yield from linear_rows(*self.front, hidden, hidden)

    def word_head_rows(self, config: BertLayersConfig) -> Iterator[TensorRow]:
        """Yield the tensors of the masked-word head."""
        dense, norm, bias = self.word_head
        yield from linear_rows("predictions.transform", dense, config.embedding_width, config.hidden_size)
        yield from linear_rows("predictions.layer_norm", norm, config.embedding_width)
        yield TensorRow("predictions.bias", (config.padded_vocab_size,), (f"{bias}.bias",), config.vocab_size)

    def modern_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors under today's names, without buffers and without the tied decoder.

        Old names are `gamma` and `beta` of a LayerNorm, and the decoder's bias beside its weight; an encoder alone has
        nothing in front of its names.
        """
        result: dict[str, Tensor] = {}
        for old_name, tensor in tensors.items():
            name = old_name
            for old, new in {**_OLD_NAMES, f"{self.decoder}.bias": f"{self.word_head[2]}.bias"}.items():
                name = name.replace(old, new)
            if name.startswith(_ENCODER_PARTS):
                name = f"{self.encoder}.{name}"
            if name in result and not torch.equal(result[name], tensor):
                raise CheckpointError(f"tensor {old_name} is a second {name} with other values")
            if not name.endswith(_BUFFERS):
                result[name] = tensor
        words = f"{self.encoder}.embeddings.word_embeddings.weight"
        return without_tied(result, f"{self.decoder}.weight", words=words)

    def hf_settings(self, config: BertLayersConfig, special_ids: Mapping[str, int]) -> dict[str, Any]:
        """Return the content of config.json."""
        said = config.exported()
        settings = {
            "model_type": next(
                name
                for name, fixed in said.HF_TYPES.items()
                if all(getattr(said, setting) == value for setting, value in fixed.items())
            ),
            **{theirs: value for ours, theirs in self.settings.items() if (value := getattr(said, ours)) is not None},
            **self.more_settings(said, special_ids),
        }
        settings.setdefault("pad_token_id", special_ids["pad"])
        return {**settings, "tie_word_embeddings": True, "dtype": "float32"}

    def from_hf_settings(self, content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Return our settings of a config.json, and what this encoder cannot be."""
        settings = {ours: content[theirs] for ours, theirs in self.settings.items() if theirs in content}
        return {**settings, **self.config.from_hf_values(content)}, refused_settings(content, self.wanted)
