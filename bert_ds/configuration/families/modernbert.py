"""ModernBERT (Warner et al. 2024, arXiv 2412.13663): rotary positions, GeGLU, LayerNorm in front, windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.reading.config_section import DropoutProbability, PositiveFloat, PositiveInt, Size

LayerType = Literal["full_attention", "sliding_attention"]
Theta = Annotated[float, Field(gt=1.0, le=1e9, allow_inf_nan=False)]


class ModernBertConfig(EncoderConfig):
    """The ModernBERT encoder, in Hugging Face's spelling; the defaults are ModernBERT-base."""

    TITLE = "ModernBERT"
    HF_TYPES = {"modernbert": {}}
    LAYERS = "modernbert"
    DROPOUTS = (
        *("attention_dropout", "attention_output_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout"),
    )
    SIZES = (
        *(*EncoderConfig.SIZES, "norm_bias", "attention_bias", "mlp_bias", "decoder_bias", "classifier_bias"),
        "tie_word_embeddings",
    )

    type: Literal["modernbert"] = "modernbert"
    """Family of the encoder."""
    vocab_size: Annotated[int, Field(ge=8, le=2**24)] = 50368
    """Number of word pieces of the tokenizer, without padding rows."""
    hidden_size: Size = 768
    """Width of the residual stream."""
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)] = 22
    """Number of transformer layers."""
    num_attention_heads: Size = 12
    """Number of attention heads; divides hidden_size, into heads of even width."""
    intermediate_size: Size = 1152
    """Width of each half of the gated feed-forward layer."""
    hidden_activation: Literal["gelu", "gelu_pytorch_tanh"] = "gelu"
    """Gate of the feed-forward layer: "gelu" is the erf form, "gelu_pytorch_tanh" the tanh approximation."""
    max_position_embeddings: Size = 8192
    """Longest sequence in tokens; no weight depends on it."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initialisation; of matrices that write to the residual stream over sqrt(2 layers)."""
    initializer_cutoff_factor: PositiveFloat = 2.0
    """The normal is cut off at so many standard deviations."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon inside the square root of every LayerNorm."""
    norm_bias: bool = False
    """Whether LayerNorms have a bias."""
    attention_bias: bool = False
    """Whether the projections of the attention have a bias."""
    mlp_bias: bool = False
    """Whether the projections of the feed-forward block have a bias."""
    decoder_bias: bool = True
    """Whether the decoder of the masked words has a bias."""
    classifier_bias: bool = False
    """Whether the dense layer between the encoder and a head has a bias."""
    tie_word_embeddings: bool = True
    """Whether the decoder of the masked words is the word embedding."""
    layer_types: Annotated[tuple[LayerType, ...], Field(min_length=1)] | None = None
    """What each layer sees: everything, or a window; null goes by global_attn_every_n_layers."""
    global_attn_every_n_layers: PositiveInt = 3
    """Without layer_types: layers 0, n, 2 n and so on see everything, the others a window."""
    local_attention: Annotated[int, Field(ge=2, le=2**20)] = 128
    """Width of the window: a token sees half of it to each side, rounded down, and itself."""
    global_rope_theta: Theta = 160_000.0
    """Base of the rotary frequencies in layers that see everything."""
    local_rope_theta: Theta = 10_000.0
    """Base of the rotary frequencies in layers with a window."""
    attention_dropout: DropoutProbability = 0.0
    """Dropout of the attention probabilities, and of what the attention writes."""
    attention_output_dropout: DropoutProbability | None = None
    """Dropout of what the attention writes; null: attention_dropout."""
    embedding_dropout: DropoutProbability = 0.0
    """Dropout after the embedding."""
    mlp_dropout: DropoutProbability = 0.0
    """Dropout between the two matrices of the feed-forward block."""
    classifier_pooling: Literal["cls", "mean"] = "cls"
    """What a head of whole sequences reads: their first token, or the mean over their tokens."""
    classifier_dropout: DropoutProbability = 0.0
    """Dropout in front of a task's classifier."""
    classifier_activation: Literal["gelu", "gelu_pytorch_tanh"] = "gelu"
    """Activation of the dense layer between the encoder and a head."""

    @model_validator(mode="after")
    def _check(self) -> ModernBertConfig:
        if self.head_dim % 2:
            raise ValueError(
                f"heads are {self.head_dim} wide (hidden_size {self.hidden_size} over num_attention_heads "
                f"{self.num_attention_heads}), wanted an even number: rotary positions turn pairs"
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(self.layer_types)} layers, num_hidden_layers is {self.num_hidden_layers}"
            )
        return self

    @property
    def written_dropout(self) -> float:
        """Dropout of what the attention writes."""
        return self.attention_dropout if self.attention_output_dropout is None else self.attention_output_dropout

    @property
    def has_output_bias(self) -> bool:
        """Whether the word scores have a bias."""
        return self.decoder_bias

    @property
    def window(self) -> int:
        """Positions that a token sees to each side in a layer with a window."""
        return self.local_attention // 2

    @property
    def has_window(self) -> tuple[bool, ...]:
        """Of every layer, whether it has a window."""
        if self.layer_types is not None:
            return tuple(kind == "sliding_attention" for kind in self.layer_types)
        return tuple(layer % self.global_attn_every_n_layers != 0 for layer in range(self.num_hidden_layers))

    def _of_layers(self, layers: Sequence[int]) -> dict[str, Any]:
        """Return what each of them sees; the first has no LayerNorm in front of it, which the others have."""
        if layers[0] != 0:
            raise ValueError(f"found {list(layers)}, wanted 0 among them: no other can be ModernBERT's first layer")
        kinds = self.spelled_out().layer_types
        assert kinds is not None
        return {"layer_types": tuple(kinds[layer] for layer in layers)}

    def spelled_out(self) -> ModernBertConfig:
        """Return the settings with the type of every layer, and without the number that it may follow from."""
        kinds = tuple("sliding_attention" if has_window else "full_attention" for has_window in self.has_window)
        fixed = {"layer_types": kinds, "global_attn_every_n_layers": 3}
        return self.model_copy(update=fixed)

    @property
    def longest_probe(self) -> int:
        """Two windows and some, so that a probe crosses their edges."""
        return max(128, 2 * self.local_attention + 8)

    @property
    def classifier_dropout_prob(self) -> float:
        """That of the settings."""
        return self.classifier_dropout

    def count_parameters(self, *, has_pair_head: bool) -> int:
        """Return the trainable parameters; a tied decoder counts once.

        Args:
            has_pair_head: there is none, for no segment tells the texts of a pair apart.
        """
        hidden, inner, vocab, layers = (
            self.hidden_size,
            self.intermediate_size,
            self.padded_vocab_size,
            self.num_hidden_layers,
        )
        norm = hidden * (1 + self.norm_bias)
        attention = 4 * hidden * hidden + 4 * hidden * self.attention_bias
        feed_forward = 3 * hidden * inner + (2 * inner + hidden) * self.mlp_bias
        # The first layer has no LayerNorm in front of its attention; embedding and last layer have one behind them.
        norms = (2 * layers - 1 + 2) * norm
        head = hidden * hidden + hidden * self.classifier_bias + norm + vocab * self.decoder_bias
        decoder = 0 if self.tie_word_embeddings else vocab * hidden
        return vocab * hidden + layers * (attention + feed_forward) + norms + head + decoder

    def layer_matrices(self) -> list[tuple[int, int]]:
        """Return query, key, value, output, the two halves of the gated layer and the one behind it."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]

    def attended_tokens(self, length: float) -> float:
        """Return how many keys a token sees, summed over all layers; a window's edges are left out of account."""
        near = min(length, 2 * self.window + 1)
        return sum(near if has_window else length for has_window in self.has_window)

    def kept_values(self) -> int:
        """Return 9 D + 3 F: two sums, what is normalised of them, q, k, v, q and k turned; halves and their product."""
        return 9 * self.hidden_size + 3 * self.intermediate_size
