"""What is known of each family of transformers: which classes pack, which heads read what, which layers can be fused.

Classes are known by module and name, so nothing of transformers is imported for a family that is not there. A name in
a row stands for the class and for a person's subclasses of it, except for the encoder itself: of that a subclass is
refused, since its forward may do anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

from bert_kernels.hf.class_swap import original_class

ENCODER = "Model"
POOLER = "Pooler"
TOKEN_LABELS = "ForTokenClassification"
ANSWERS = "ForQuestionAnswering"
DECODERS = ("ForCausalLM", "LMHeadModel")
SUMMARY = "SequenceSummary"

Needs = Literal["first", "any"]
"""What a head reads of every row of a batch: its first place, or its first token wherever that stands."""


@dataclass(frozen=True)
class Family:
    """A row of the table; names of classes without the prefix of the family."""

    prefix: str
    attention: str
    """The class that calls the attention function."""
    layer: str | None = None
    """The layer that the fused operators know; None: transformers' own layers everywhere."""
    pooled_from: str | None = None
    """The submodule whose output the encoder's own pooler reads."""
    word_labels: tuple[tuple[str, tuple[str, ...]], ...] = (("ForMaskedLM", ("labels",)),)
    """Heads over the vocabulary, with the labels that a training call must bring for a loss."""
    needs: tuple[tuple[str, Needs], ...] = ()
    """Heads that read one place of a row."""


FAMILIES = {
    "bert": Family(
        "Bert",
        attention="SelfAttention",
        layer="Layer",
        pooled_from="encoder",
        word_labels=(("ForMaskedLM", ("labels",)), ("ForPreTraining", ("labels", "next_sentence_label"))),
        needs=((POOLER, "first"),),
    ),
    "roberta": Family(
        "Roberta",
        attention="SelfAttention",
        layer="Layer",
        pooled_from="encoder",
        needs=((POOLER, "first"), ("ClassificationHead", "first")),
    ),
    "electra": Family(
        "Electra",
        attention="SelfAttention",
        layer="Layer",
        needs=(("ClassificationHead", "first"), (SUMMARY, "first")),
    ),
    "distilbert": Family(
        "DistilBert",
        attention="SelfAttention",
        needs=(("ForSequenceClassification", "first"), ("ForMultipleChoice", "first")),
    ),
    "modernbert": Family(
        "ModernBert",
        attention="Attention",
        needs=(("ForSequenceClassification", "first"), ("ForMultipleChoice", "any")),
    ),
}
"""By the name of transformers' module, which is the model_type of config.json too."""


class Part(NamedTuple):
    """A module whose class is one of the table, or a person's subclass of one."""

    module: Any
    family: Family
    name: str
    """Of the class of transformers, without the prefix of its family."""
    is_own: bool
    """Whether the forward is that of transformers."""


def parts_of(model: nn.Module) -> list[Part]:
    """Return the modules of a model that the table knows, outer ones first."""
    found = [(module, _row_of(original_class(module))) for module in model.modules()]
    return [Part(module, FAMILIES[row[0]], row[1], row[2]) for module, row in found if row is not None]


def _row_of(cls: type) -> tuple[str, str, bool] | None:
    for base in cls.__mro__:
        package, _, path = base.__module__.partition(".models.")
        family = path.partition(".")[0]
        if package == "transformers" and path == f"{family}.modeling_{family}" and family in FAMILIES:
            is_own = cls.forward is base.forward  # type: ignore[attr-defined]
            return family, base.__name__.removeprefix(FAMILIES[family].prefix), is_own
    return None
