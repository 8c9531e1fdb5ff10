"""BERT (Devlin et al. 2019, arXiv 1810.04805), and with LayerNorm in front Megatron's form of it (arXiv 1909.08053)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bert_ds.configuration.families.bert_layers import BertNamesConfig
from bert_ds.configuration.reading.config_section import Size


class BertConfig(BertNamesConfig):
    """The BERT encoder, in Hugging Face's spelling; the defaults are BERT-base uncased."""

    TITLE = "BERT"
    HF_TYPES = {"bert": {"norm_position": "post"}, "megatron-bert": {"norm_position": "pre"}}

    type: Literal["bert"] = "bert"
    """Family of the encoder."""
    vocab_size: Annotated[int, Field(ge=8, le=2**24)] = 30522
    """Number of word pieces of the tokenizer, without padding rows."""
    hidden_size: Size = 768
    """Width of the residual stream."""
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)] = 12
    """Number of transformer layers."""
    num_attention_heads: Size = 12
    """Number of attention heads; divides hidden_size."""
    intermediate_size: Size = 3072
    """Width of the feed-forward layer."""
    norm_position: Literal["post", "pre"] = "post"
    """LayerNorm behind each block, as published, or in front of it and once at the end: transformers' MegatronBert."""

    positions: Literal["learned", "sinusoid"] = "learned"
    """A vector learned for each position, or fixed sinusoids, which are exported as the table that they are."""

    def exported(self) -> BertConfig:
        """Return the settings with positions as a table like any other, of which config.json says no more."""
        return self.model_copy(update={"positions": "learned"})

    def embedding_parameters(self) -> int:
        """Return those of words, positions unless they are fixed, segments and one LayerNorm."""
        fixed = 0 if self.positions == "learned" else self.position_rows * self.hidden_size
        return super().embedding_parameters() - fixed
