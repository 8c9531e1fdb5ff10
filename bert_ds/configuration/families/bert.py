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

    @property
    def family(self) -> str:
        """ "bert"."""
        return self.type

    def exported(self) -> BertConfig:
        """Return the settings with positions as a table like any other, of which config.json says no more."""
        return self.model_copy(update={"positions": "learned"})

    def count_parameters(self, *, has_pair_head: bool) -> int:
        """Return the trainable parameters; the decoder is tied and counts once.

        Args:
            has_pair_head: with pooler and two-class head, that is, with a sentence pair objective.
        """
        hidden = self.hidden_size
        # Of the embeddings behind the sum, or of the last layer: one LayerNorm either way.
        num_positions = self.max_position_embeddings if self.positions == "learned" else 0
        rows = self.padded_vocab_size + num_positions + self.type_vocab_size
        pair_head = hidden * hidden + hidden + 2 * hidden + 2 if has_pair_head else 0
        layers = self.num_hidden_layers * self.layer_parameters()
        return rows * hidden + 2 * hidden + layers + self.word_head_parameters() + pair_head
