"""Settings of the families that are made of BERT's layers (`encoder/bert_layers.py`)."""

from __future__ import annotations

from typing import Literal, Self

from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.reading.config_section import DropoutProbability, PositiveFloat, Size

Activation = Literal["gelu", "gelu_new", "relu", "silu"]
"""Between the two matrices of a feed-forward block, and in the masked-word head."""


class BertLayersConfig(EncoderConfig):
    """Base of all of them: what follows from the sizes."""

    LAYERS = "bert"

    def layer_parameters(self) -> int:
        """Return the parameters of one layer: weights and biases of its matrices, and two LayerNorms."""
        return self.attention_parameters() + self.feed_forward_parameters()

    def attention_parameters(self) -> int:
        """Return those of a layer's attention and the LayerNorm of it."""
        return 4 * (self.hidden_size * self.hidden_size + self.hidden_size) + 2 * self.hidden_size

    def feed_forward_parameters(self) -> int:
        """Return those of a layer's feed-forward block and the LayerNorm of it."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return 2 * hidden * inner + inner + hidden + 2 * hidden

    def word_head_parameters(self) -> int:
        """Return those of the masked-word head, whose decoder is the word embedding."""
        width = self.embedding_width
        return self.hidden_size * width + 3 * width + self.padded_vocab_size

    def layer_matrices(self) -> list[tuple[int, int]]:
        """Return query, key, value, output and the two of the feed-forward block."""
        return self.attention_matrices() + self.feed_forward_matrices()

    def attention_matrices(self) -> list[tuple[int, int]]:
        """Return query, key, value and output."""
        return [(self.hidden_size, self.hidden_size)] * 4

    def feed_forward_matrices(self) -> list[tuple[int, int]]:
        """Return the two of the feed-forward block."""
        return [(self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size)]

    def kept_values(self) -> int:
        """Return 8 D + 2 F: input, q, k, v, attention output, sum and output of the first LayerNorm, sum of the second;
        before and after GELU."""
        return 8 * self.hidden_size + 2 * self.intermediate_size


class BertNamesConfig(BertLayersConfig):
    """Base of those of them that have segments, and BERT's names for everything."""

    SIZES = (*BertLayersConfig.SIZES, "max_position_embeddings", "type_vocab_size")

    hidden_act: Activation = "gelu"
    """"gelu" is the published erf form, "gelu_new" the tanh approximation; or "relu" or "silu"."""
    hidden_dropout_prob: DropoutProbability = 0.1
    """Dropout after the embeddings, after both dense blocks of a layer, and in front of a classifier."""
    attention_probs_dropout_prob: DropoutProbability = 0.1
    """Dropout of the attention probabilities."""
    max_position_embeddings: Size = 512
    """Longest sequence in tokens."""
    type_vocab_size: Size = 2
    """Number of segment ids."""
    layer_norm_eps: PositiveFloat = 1e-12
    """Epsilon inside the square root of every LayerNorm."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the normal initialisation of every weight matrix."""

    @property
    def num_segments(self) -> int:
        """Number of segment ids."""
        return self.type_vocab_size

    @property
    def classifier_dropout_prob(self) -> float:
        """That of the hidden states."""
        return self.hidden_dropout_prob

    def with_dropout(self, probability: float) -> Self:
        """Return the settings with another dropout of hidden states and attention probabilities."""
        return self.model_copy(update={"hidden_dropout_prob": probability, "attention_probs_dropout_prob": probability})
