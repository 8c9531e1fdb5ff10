"""ELECTRA (Clark et al. 2020, arXiv 2003.10555): BERT's layers behind embeddings of a width of their own, no pooler."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal, Self

from pydantic import Field

from bert_ds.configuration.families.bert_layers import BertNamesConfig
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.reading.config_section import Size


class ElectraConfig(BertNamesConfig):
    """The ELECTRA encoder, in Hugging Face's spelling; the defaults are ELECTRA-small's discriminator."""

    TITLE = "ELECTRA"
    HF_TYPES = {"electra": {}}
    SIZES = (*BertNamesConfig.SIZES, "embedding_size")

    type: Literal["electra"] = "electra"
    """Family of the encoder."""
    vocab_size: Annotated[int, Field(ge=8, le=2**24)] = 30522
    """Number of word pieces of the tokenizer, without padding rows."""
    embedding_size: Size = 128
    """Width of the embeddings; where it is not hidden_size, a dense layer lies between."""
    hidden_size: Size = 256
    """Width of the residual stream."""
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)] = 12
    """Number of transformer layers."""
    num_attention_heads: Size = 4
    """Number of attention heads; divides hidden_size."""
    intermediate_size: Size = 1024
    """Width of the feed-forward layer."""

    @property
    def learned_pairs(self) -> tuple[str, ...]:
        """None: no class of transformers has a head for them."""
        return ()

    @property
    def learns_replaced(self) -> bool:
        """True."""
        return True

    def generator(self, fraction: float) -> Self:
        """Return the generator: a fraction of width, heads and feed-forward layer, as many layers, the same embeddings.

        The fraction is read as the nearest one with a denominator up to 64, so that 0.3333 is a third.
        """
        share, sizes = Fraction(fraction).limit_denominator(64), {}
        for name in ("num_attention_heads", "hidden_size", "intermediate_size"):
            size = getattr(self, name) * share
            if size.denominator != 1 or not size:
                raise ValueError(f"{fraction:g} of model.{name} {getattr(self, name)} is {float(size):g}")
            sizes[name] = int(size)
        return self.model_copy(update=sizes)

    def count_with_generator(self, generator: EncoderConfig) -> int:
        """Return those of both: the generator has the masked-word head, this one the head that detects."""
        both = self.count_parameters(has_pair_head=False) + generator.count_parameters(has_pair_head=False)
        detector = self.detector_weights() + self.hidden_size + 1
        return both - self.embedding_parameters() - self.word_head_parameters() + detector

    def detector_weights(self) -> int:
        """Return D D + D."""
        return self.hidden_size * (self.hidden_size + 1)

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
        """Return D E where the widths differ."""
        return self.hidden_size * self.embedding_size if self.embedding_size != self.hidden_size else 0
