"""What the rest of the project asks of a family of encoders: a row of `table`.

Every family's encoder is called `bert` in a model, has `embeddings`, a list `layer` and perhaps a `final_norm`, and its
weights are named after them: layer-wise rates, frozen layers and a student's first layers go by these names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor

from bert_ds.encoder.tensor_rows import TensorRow

RoleName = Literal[
    "masked words",
    "pre-training",
    "encoder",
    "sequence classification",
    "token tags",
    "question answering",
    "multiple choice",
    "replaced tokens",
]
LAYER_MATRICES = (
    "*.attention.qkv_weight",
    "*.attention.output_weight",
    "*.feed_forward.intermediate_weight",
    "*.feed_forward.output_weight",
)
"""The weights of a layer of attention and feed-forward, by the names that the families' modules share."""
SEQUENCE_ROLES: tuple[RoleName, ...] = ("sequence classification", "multiple choice")
"""Roles whose head reads a row per sequence; the others read one per token."""


class Role(NamedTuple):
    """How a class of transformers plays a role."""

    architecture: str
    """Its name."""
    classifier: str = ""
    """Its name of the linear layer on top; "" where there is none."""
    reads_front: bool = False
    """Whether the family's front (a pooler, a prediction head) lies between the encoder and that layer."""
    has_dropout: bool = True
    """Whether there is dropout in front of that layer."""
    front_drops: bool = False
    """Whether there is dropout in front of the front too."""
    front_renamed: tuple[str, str] = ("", "")
    """How `encoder_rows` names the front's dense layer, and how this class does, where that is another name."""
    pair_scores: str = "seq_relationship_logits"
    """In pre-training, its name for what the head for pairs gives."""
    without_front: Mapping[str, Any] = {}
    """Arguments that keep the class from making up a front which the weights do not have."""


class Family(NamedTuple):
    """A family of encoders; `config` is always of its own settings."""

    make_encoder: Callable[..., Any]
    """(config, ops, has_front=, activation_checkpointing=) -> token ids to hidden states, with `sequence_rows` and
    `token_rows`, see `bert.BertEncoder`; with a front that drops, `sequence_rows` takes a seed."""
    word_head: Callable[..., Any]
    """(config, ops) -> the masked-word head."""
    pair_head: Callable[..., Any] | None
    """(config, number of classes) -> their scores from the rows of sequences; None where nothing tells the segments of
    a pair apart."""
    initialise: Callable[..., None]
    """(module, config, seed=) fills every parameter."""
    no_decay_patterns: Callable[[Any], tuple[str, ...]]
    """`fnmatch` patterns of the names of weights without decay."""
    equal_parts: Callable[[Any], Mapping[str, Sequence[str]]]
    """Patterns of tensors that hold several weights of one size side by side -> names of these."""
    matrix_patterns: tuple[str, ...]
    """Weights of the layers, which an optimizer may treat as matrices."""
    roles: Callable[[Any], Mapping[RoleName, Role]]
    encoder_rows: Callable[..., Iterator[TensorRow]]
    """(config, has_front=) -> every tensor of the encoder, in the model's order."""
    word_head_rows: Callable[[Any], Iterator[TensorRow]]
    pair_head_rows: Callable[[Any], Iterator[TensorRow]]
    hf_head_prefixes: tuple[str, ...]
    """How names begin of what stands on top of an encoder in transformers' classes, its front left out."""
    hf_settings: Callable[[Any, Mapping[str, int]], dict[str, Any]]
    """(config, ids of "pad", "cls", "sep") -> content of config.json without `architectures`."""
    from_hf_settings: Callable[[Mapping[str, Any]], tuple[dict[str, Any], list[str]]]
    """Content of config.json -> our settings, and a line for each that this family cannot be."""
    modern_names: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """Hugging Face's tensors under today's names, without buffers and without a tied decoder."""
    first_free_site: Callable[[Any], int]
    """Number of the first dropout mask that the encoder does not use."""
    fixed_tensors: Callable[[Any], Mapping[str, Tensor]] = lambda config: {}
    """Tensors of `encoder_rows` that are no weights but follow from the settings: they are in exports alone."""
    other_form: Callable[[Any], Family | None] = lambda config: None
    """The row of settings of this family for which transformers has other names; None where it is this one."""
    make_generator: Callable[..., Any] | None = None
    """(config of the generator, ops) -> an encoder; its ids are what `embeddings` gives with is_projected False."""
    detector: Callable[..., Any] | None = None
    """(config, ops) -> the head that says of hidden_TD which tokens were replaced, scores [T]."""
    detector_rows: Callable[[Any], Iterator[TensorRow]] = lambda config: iter(())


def refused_settings(content: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting of a config.json that is not what a family can be alone."""
    return [
        f"{name} is {repr(content[name])[:60]}, wanted {value!r}"
        for name, value in wanted.items()
        if content.get(name, value) != value
    ]
