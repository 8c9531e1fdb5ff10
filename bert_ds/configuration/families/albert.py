"""ALBERT (Lan et al. 2020, arXiv 1909.11942): BERT's layers with weights that they share, behind narrow embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from bert_ds.configuration.families.bert import BertConfig
from bert_ds.configuration.families.bert_layers import Activation, BertNamesConfig
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.reading.config_section import DropoutProbability, Size


class AlbertConfig(BertNamesConfig):
    """The ALBERT encoder, in Hugging Face's spelling; the defaults are ALBERT-base v2."""

    TITLE = "ALBERT"
    HF_TYPES = {"albert": {"shared_parts": "all"}}
    HF_NAMES = {"classifier_dropout": "classifier_dropout_prob"}
    SIZES = (*BertNamesConfig.SIZES, "embedding_size", "num_hidden_groups", "shared_parts")
    PAIR_HEAD = "sop_classifier"
    LAYERS = "albert"

    type: Literal["albert"] = "albert"
    """Family of the encoder."""
    vocab_size: Annotated[int, Field(ge=8, le=2**24)] = 30000
    """Number of word pieces of the tokenizer, without padding rows."""
    embedding_size: Size = 128
    """Width of the embeddings, at most hidden_size; a dense layer lies between."""
    hidden_size: Size = 768
    """Width of the residual stream."""
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)] = 12
    """Number of transformer layers that a token passes."""
    num_hidden_groups: Annotated[int, Field(ge=1, le=1000)] = 1
    """Groups of layers, one behind the other, of equally many; those of a group share weights."""
    shared_parts: Literal["all", "attention", "feed_forward"] = "all"
    """What the layers of a group share; a part alone wants embedding_size hidden_size, and is exported as BERT."""
    num_attention_heads: Size = 12
    """Number of attention heads; divides hidden_size."""
    intermediate_size: Size = 3072
    """Width of the feed-forward layer."""
    hidden_act: Activation = "gelu_new"
    """"gelu" is the erf form, "gelu_new" the tanh approximation, which is the published one; or "relu" or "silu"."""
    hidden_dropout_prob: DropoutProbability = 0.0
    """Dropout after the embeddings and after both dense blocks of a layer."""
    attention_probs_dropout_prob: DropoutProbability = 0.0
    """Dropout of the attention probabilities."""
    classifier_dropout: DropoutProbability = 0.1
    """Dropout in front of a task's classifier; `classifier_dropout_prob` in config.json."""

    @model_validator(mode="after")
    def _check_sharing(self) -> Self:
        layers, groups = self.num_hidden_layers, self.num_hidden_groups
        if layers % groups:
            raise ValueError(f"num_hidden_groups {groups} does not divide num_hidden_layers {layers}")
        width, hidden = self.embedding_size, self.hidden_size
        if width > hidden:
            raise ValueError(f"embedding_size {width} is more than hidden_size {hidden}, wanted at most that")
        if self.shared_parts != "all" and width != hidden:
            raise ValueError(
                f'shared_parts "{self.shared_parts}" wants embedding_size {hidden}, the hidden_size, and not {width}: '
                "no class of transformers has layers of which a part is shared behind a projection"
            )
        return self

    @classmethod
    def from_hf_values(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return what transformers takes where config.json is silent: ALBERT-xxlarge."""
        largest = {"hidden_size": 4096, "num_attention_heads": 64, "intermediate_size": 16384}
        return {name: size for name, size in largest.items() if name not in content}

    @property
    def learned_pairs(self) -> tuple[str, ...]:
        """The order of segments, after which its head is called; all where it is exported as BERT."""
        return ("sop", "structure") if self.shared_parts == "all" else super().learned_pairs

    @property
    def norm_position(self) -> str:
        """ "post": LayerNorm behind each block."""
        return "post"

    @property
    def embedding_width(self) -> int:
        """That of the settings."""
        return self.embedding_size

    @property
    def projection_weights(self) -> int:
        """Return D E, also where both are one; 0 where a part alone is shared."""
        return self.hidden_size * self.embedding_size if self.shared_parts == "all" else 0

    def owner(self, layer: int, part: str) -> int:
        """Return the first layer of the group, where it is a part that is shared."""
        size = self.num_hidden_layers // self.num_hidden_groups
        return layer // size * size if self.shared_parts in ("all", part) else layer

    def _of_layers(self, layers: Sequence[int]) -> dict[str, Any]:
        """Return nothing more where all layers are one; parts of groups are no groups."""
        if self.num_hidden_groups > 1 or self.shared_parts != "all":
            raise ValueError(f"found {list(layers)}, but some of the layers share weights, and none of those is alone")
        return {}

    def own_matrices(self) -> list[tuple[int, int]]:
        """Return those of all layers, one that several layers share once."""
        attention, feed_forward = self.num_owners("attention"), self.num_owners("feed_forward")
        return self.attention_matrices() * attention + self.feed_forward_matrices() * feed_forward

    def exported(self) -> EncoderConfig:
        """Return the BERT that computes the same where a part alone is shared: each layer has a copy of it."""
        if self.shared_parts == "all":
            return self
        names = (BertConfig.model_fields.keys() & type(self).model_fields.keys()) - {"type"}
        return BertConfig(**{name: getattr(self, name) for name in names})
