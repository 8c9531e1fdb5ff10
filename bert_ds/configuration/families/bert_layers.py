"""Settings of the families that are made of BERT's layers (`encoder/bert_layers.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.reading.config_section import DropoutProbability, PositiveFloat, Size

Activation = Literal["gelu", "gelu_new", "relu", "silu"]
"""Between the two matrices of a feed-forward block, and in the masked-word head."""
HiddenPlace = Literal["embedding", "attention_output", "feed_forward"]
"""Where hidden states are dropped in pre-training."""


class BertLayersConfig(EncoderConfig):
    """Base of all of them: what follows from the sizes."""

    LAYERS = "bert"
    DROPOUTS = tuple(f"{place}_dropout_prob" for place in get_args(HiddenPlace))

    if TYPE_CHECKING:  # a field of some families, fixed in others

        @property
        def hidden_act(self) -> str: ...
        @property
        def hidden_dropout_prob(self) -> float: ...
        @property
        def attention_probs_dropout_prob(self) -> float: ...
        @property
        def layer_norm_eps(self) -> float: ...
        @property
        def norm_position(self) -> str: ...

    embedding_dropout_prob: DropoutProbability | None = None
    """Dropout after the embeddings; null: as of the other hidden states."""
    attention_output_dropout_prob: DropoutProbability | None = None
    """Dropout of what the attention writes; null: as of the other hidden states."""
    feed_forward_dropout_prob: DropoutProbability | None = None
    """Dropout of what the feed-forward block writes; null: as of the other hidden states."""

    def dropout_of(self, place: HiddenPlace) -> float:
        """Return the dropout of hidden states in a place."""
        found: float | None = getattr(self, f"{place}_dropout_prob")
        return self.hidden_dropout_prob if found is None else found

    @property
    def segment_rows(self) -> int:
        """Rows of the segment embedding."""
        return 0

    def count_parameters(self, *, has_pair_head: bool) -> int:
        """Return the trainable parameters; the decoder is tied and counts once, and so does what layers share.

        Args:
            has_pair_head: with pooler and two-class head, that is, with a sentence pair objective.
        """
        hidden = self.hidden_size
        projection = self.projection_weights + hidden if self.projection_weights else 0
        layers = self.num_owners("attention") * self.attention_parameters()
        layers += self.num_owners("feed_forward") * self.feed_forward_parameters()
        pair_head = hidden * hidden + hidden + 2 * hidden + 2 if has_pair_head else 0
        return self.embedding_parameters() + projection + layers + self.word_head_parameters() + pair_head

    def embedding_parameters(self) -> int:
        """Return those of words, positions, segments and one LayerNorm: theirs, or that of the last layer."""
        return (self.padded_vocab_size + self.position_rows + self.segment_rows + 2) * self.embedding_width

    def num_owners(self, part: str) -> int:
        """Return how many layers have weights of their own for a part, "attention" or "feed_forward"."""
        return len({self.owner(layer, part) for layer in range(self.num_hidden_layers)})

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
    DROPOUTS = (
        *(*BertLayersConfig.DROPOUTS, "hidden_dropout_prob", "attention_probs_dropout_prob"),
        "classifier_dropout",
    )

    hidden_act: Activation = "gelu"
    """"gelu" is the published erf form, "gelu_new" the tanh approximation; or "relu" or "silu"."""
    hidden_dropout_prob: DropoutProbability = 0.1
    """Dropout after the embeddings, after both dense blocks of a layer, and in front of a classifier."""
    attention_probs_dropout_prob: DropoutProbability = 0.1
    """Dropout of the attention probabilities."""
    classifier_dropout: DropoutProbability | None = None
    """Dropout in front of a task's classifier; null: hidden_dropout_prob."""
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
    def segment_rows(self) -> int:
        """Number of segment ids."""
        return self.type_vocab_size

    @property
    def classifier_dropout_prob(self) -> float:
        """That of the settings, or that of the hidden states."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout
