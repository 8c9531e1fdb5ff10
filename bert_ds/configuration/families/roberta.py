"""RoBERTa (Liu et al. 2019, arXiv 1907.11692): BERT's layers without segments, on byte-level BPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from bert_ds.configuration.families.bert_layers import BertNamesConfig
from bert_ds.configuration.families.marks import ROBERTA_MARKS
from bert_ds.configuration.reading.config_section import PositiveFloat, Size


class RobertaConfig(BertNamesConfig):
    """The RoBERTa encoder; the defaults are RoBERTa-base.

    transformers counts positions from behind `pad_token_id`, so that its max_position_embeddings is by one more than
    that id larger than ours.
    """

    TITLE = "RoBERTa"
    HF_TYPES = {"roberta": {}}
    MARKS = ROBERTA_MARKS
    SIZES = (*BertNamesConfig.SIZES, "pad_token_id")

    type: Literal["roberta"] = "roberta"
    """Family of the encoder."""
    vocab_size: Annotated[int, Field(ge=8, le=2**24)] = 50265
    """Number of pieces of the tokenizer, without padding rows."""
    pad_token_id: Annotated[int, Field(ge=0, le=2**24)] = 1
    """Id of <pad> in the tokenizer; positions of text begin behind it."""
    hidden_size: Size = 768
    """Width of the residual stream."""
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)] = 12
    """Number of transformer layers."""
    num_attention_heads: Size = 12
    """Number of attention heads; divides hidden_size."""
    intermediate_size: Size = 3072
    """Width of the feed-forward layer."""
    max_position_embeddings: Size = 512
    """Longest sequence in tokens; config.json says pad_token_id + 1 more."""
    type_vocab_size: Annotated[int, Field(ge=1, le=1)] = 1
    """One: every token has the same segment vector, and the texts of a pair are told apart by </s></s> alone."""
    layer_norm_eps: PositiveFloat = 1e-5
    """Epsilon inside the square root of every LayerNorm."""

    @model_validator(mode="after")
    def _check_padding(self) -> Self:
        if self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is no piece of a vocabulary of {self.vocab_size}")
        return self

    @classmethod
    def from_hf_values(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return max_position_embeddings as it is counted here."""
        pad = content.get("pad_token_id", cls.model_fields["pad_token_id"].default)
        # Without the name it is the 512 of transformers' settings.
        positions = content.get("max_position_embeddings", 512)
        return {"max_position_embeddings": positions - pad - 1} if type(positions) is type(pad) is int else {}

    @property
    def num_segments(self) -> int:
        """0: the one that there is tells nothing apart."""
        return 0

    @property
    def norm_position(self) -> str:
        """ "post": LayerNorm behind each block."""
        return "post"

    @property
    def first_position(self) -> int:
        """Row of the position embedding that the first token of a sequence has."""
        return self.pad_token_id + 1

    @property
    def position_rows(self) -> int:
        """Those of text, and those up to the padding's, which no token has."""
        return self.max_position_embeddings + self.first_position
