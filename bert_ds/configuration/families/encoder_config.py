"""What every family of encoders says of itself in a recipe. Standard library and pydantic only.

Names are Hugging Face's. Letters: D hidden size, F intermediate size, L layers, V padded vocabulary, S tokens of a
sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from bert_ds.configuration.families.marks import BERT_MARKS, Marks
from bert_ds.configuration.reading.config_section import PositiveFloat, Section, Size


class EncoderConfig(Section):
    """Base of the families' settings; never a section of a recipe itself."""

    TITLE: ClassVar[str]
    """Name of the family in a text."""
    HF_TYPES: ClassVar[Mapping[str, Mapping[str, Any]]]
    """Each `model_type` of config.json that is of this family -> the settings that it stands for."""
    SIZES: ClassVar[tuple[str, ...]] = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"),
    )
    """Settings that must be equal for weights of another model to fit."""
    HF_NAMES: ClassVar[Mapping[str, str]] = {}
    """Settings that have another name in config.json -> that name."""
    PAIR_HEAD: ClassVar[str] = "seq_relationship"
    """How names of the head for pairs begin in Hugging Face's files, or what they hold."""
    MARKS: ClassVar[Marks] = BERT_MARKS
    """Special pieces that its tokenizer has."""
    DROPOUTS: ClassVar[tuple[str, ...]]
    """Settings of dropout in every place; one that may be null is another's then."""
    CLASSIFIER_DROPOUTS: ClassVar[tuple[str, ...]] = ("classifier_dropout",)
    """Those of them in front of a task's classifier alone."""
    LAYERS: ClassVar[str]
    """What its layers are: a student may start from layers of a teacher of another family with the same."""

    if TYPE_CHECKING:  # each family has a field of its own name alone
        type: Any

    vocab_size: Annotated[int, Field(ge=8, le=2**24)]
    """Number of word pieces of the tokenizer, without padding rows."""
    pad_vocab_size_to_multiple_of: Size = 64
    """Rows of the word embedding are padded to this multiple for tensor cores; the export cuts them off."""
    hidden_size: Size
    """Width of the residual stream."""
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)]
    """Number of transformer layers."""
    num_attention_heads: Size
    """Number of attention heads; divides hidden_size."""
    intermediate_size: Size
    """Width of the feed-forward layer."""
    max_position_embeddings: Size
    """Longest sequence in tokens."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initialisation of weight matrices."""

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self

    @classmethod
    def from_hf_values(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that have another value in a config.json, as they are here."""
        return {}

    @property
    def family(self) -> str:
        """Name of the family, the `type` of the section."""
        return self.type

    @property
    def position_rows(self) -> int:
        """Rows of a learned position embedding."""
        return self.max_position_embeddings

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the word embedding: vocab_size rounded up to pad_vocab_size_to_multiple_of."""
        multiple = self.pad_vocab_size_to_multiple_of
        return -(-self.vocab_size // multiple) * multiple

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def embedding_width(self) -> int:
        """Width E of the embeddings."""
        return self.hidden_size

    @property
    def projection_weights(self) -> int:
        """Matrix weights between embeddings and layers that every token passes."""
        return 0

    def spelled_out(self) -> Self:
        """Return the settings in one spelling, where the same encoder can be said in several."""
        return self

    def exported(self) -> EncoderConfig:
        """Return what an export says of the encoder: where transformers cannot say it, another that computes the same.

        In one spelling, and perhaps of another family.
        """
        return self.spelled_out()

    def owner(self, layer: int, part: str) -> int:
        """Return the layer whose weights a part of a layer has, its own unless layers share: the first that uses them.

        Args:
            layer: counted from 0.
            part: "attention" or "feed_forward".
        """
        return layer

    @property
    def shares_layers(self) -> bool:
        """Whether a weight is used in more than one layer."""
        parts = ("attention", "feed_forward")
        return any(self.owner(layer, part) != layer for layer in range(self.num_hidden_layers) for part in parts)

    @property
    def num_segments(self) -> int:
        """How many segments of a sequence the network tells apart; 0 where it knows of none."""
        return 0

    @property
    def learned_pairs(self) -> tuple[str, ...]:
        """What a head for pairs of segments may learn in pre-training; nothing where there is none."""
        return ("nsp", "sop", "structure") if self.num_segments else ()

    @property
    def learns_replaced(self) -> bool:
        """Whether there are a generator and a detector of the tokens that it has replaced."""
        return False

    def generator(self, fraction: float) -> Self:
        """Return the encoder that replaces tokens, a fraction of this one; needs `learns_replaced`.

        Raises:
            ValueError: a size is not divided evenly.
        """
        raise NotImplementedError

    def count_with_generator(self, generator: EncoderConfig) -> int:
        """Return the trainable parameters of generator and detector, what both share counted once."""
        raise NotImplementedError

    def detector_weights(self) -> int:
        """Return the matrix weights that a token passes behind the encoder that looks for replaced ones."""
        raise NotImplementedError

    @property
    def longest_probe(self) -> int:
        """Tokens of the longest sequence on which an export is compared, whatever positions there are."""
        return 512

    @property
    def classifier_dropout_prob(self) -> float:
        """Dropout in front of a task's classifier."""
        raise NotImplementedError

    def with_dropout(self, probability: float, *, classifier: float | None = None) -> Self:
        """Return the settings with another dropout in every place; 0 switches it off.

        Args:
            probability: of all of them.
            classifier: in front of a task's classifier where it is another there.
        """
        fields = type(self).model_fields
        places = {name: None if fields[name].default is None else probability for name in self.DROPOUTS}
        last = {} if classifier is None else dict.fromkeys(self.CLASSIFIER_DROPOUTS, classifier)
        return self.model_copy(update={**places, **last})

    def with_layers(self, layers: Sequence[int]) -> Self:
        """Return the settings of the network of some layers alone.

        Args:
            layers: counted from 0, one behind the other.

        Raises:
            ValueError: there is no such layer, or no network of those.
        """
        if not layers or sorted({*layers}) != list(layers) or not {*layers} <= {*range(self.num_hidden_layers)}:
            raise ValueError(f"found {list(layers)}, wanted numbers from 0 to {self.num_hidden_layers - 1} that rise")
        return type(self)(**{**self.model_dump(), "num_hidden_layers": len(layers), **self._of_layers(layers)})

    def _of_layers(self, layers: Sequence[int]) -> dict[str, Any]:
        """Return what else changes with the layers; ValueError where those cannot be alone."""
        return {}

    def form(self) -> dict[str, str]:
        """Return what trained weights belong to, by field of a recipe: not dropout, nor how weights begin."""
        begin = self.spelled_out()
        settings = {
            name: str(getattr(begin, name))
            for name in type(self).model_fields
            if not name.startswith("initializer") and name not in self.DROPOUTS
        }
        return {"family": self.family} | {f"model.{name}": text for name, text in settings.items() if name != "type"}

    @property
    def drops(self) -> bool:
        """Whether there is a place with dropout."""
        return any(getattr(self, name) for name in self.DROPOUTS)

    def count_parameters(self, *, has_pair_head: bool) -> int:
        """Return the trainable parameters of pre-training, padded rows of the vocabulary included.

        Args:
            has_pair_head: with a two-class head over pairs of sentences and what it stands on.
        """
        raise NotImplementedError

    def layer_matrices(self) -> list[tuple[int, int]]:
        """Return rows and columns of the matrices of one layer, each as an optimizer may treat it whole."""
        raise NotImplementedError

    def own_matrices(self) -> list[tuple[int, int]]:
        """Return those of all layers, one that several layers share once."""
        return self.layer_matrices() * self.num_hidden_layers

    def attended_tokens(self, length: float) -> float:
        """Return how many keys a token sees in a sequence of `length` tokens, summed over all layers."""
        return self.num_hidden_layers * length

    @property
    def has_output_bias(self) -> bool:
        """Whether the word scores have a bias."""
        return True

    def word_head_weights(self) -> int:
        """Return the matrix weights that a predicted word passes: E D and V E."""
        return self.embedding_width * (self.hidden_size + self.padded_vocab_size)

    def kept_values(self) -> int:
        """Estimate the values per token and layer that the backward pass needs."""
        raise NotImplementedError


def other_marks_text(config: type[EncoderConfig], found: Sequence[str]) -> str:
    """Say that a tokenizer has other special pieces than a family wants."""
    wanted = config.MARKS
    made = "train_wordpiece, or train_tokenizer --marks bert" if wanted == BERT_MARKS else "train_tokenizer"
    return (
        f"the tokenizer has the special pieces {' '.join(found)}, {config.TITLE} wants {' '.join(wanted.pieces)}: "
        f"wanted one that {made} makes"
    )
