"""The families that the `model` section of a recipe may be of, told apart by its `type`: a row each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import Discriminator, Tag

from bert_ds.configuration.families.albert import AlbertConfig
from bert_ds.configuration.families.bert import BertConfig
from bert_ds.configuration.families.distilbert import DistilBertConfig
from bert_ds.configuration.families.electra import ElectraConfig
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.families.modernbert import ModernBertConfig
from bert_ds.configuration.families.roberta import RobertaConfig


def _family(section: Any) -> str | None:
    """Return the tag of a section: its type, "bert" where it is left out."""
    found = section.get("type", "bert") if isinstance(section, Mapping) else getattr(section, "type", "bert")
    return found if isinstance(found, str) else ""


ModelSection = Annotated[
    Annotated[AlbertConfig, Tag("albert")]
    | Annotated[BertConfig, Tag("bert")]
    | Annotated[DistilBertConfig, Tag("distilbert")]
    | Annotated[ElectraConfig, Tag("electra")]
    | Annotated[ModernBertConfig, Tag("modernbert")]
    | Annotated[RobertaConfig, Tag("roberta")],
    Discriminator(_family),
]
"""What a recipe may hold."""

FAMILY_CONFIGS: dict[str, type[EncoderConfig]] = {
    "albert": AlbertConfig,
    "bert": BertConfig,
    "distilbert": DistilBertConfig,
    "electra": ElectraConfig,
    "modernbert": ModernBertConfig,
    "roberta": RobertaConfig,
}
"""By the type that a recipe names; without one it is "bert"."""

HF_FAMILIES = {model_type: name for name, config in FAMILY_CONFIGS.items() for model_type in config.HF_TYPES}
"""`model_type` of config.json -> family."""


class Described(NamedTuple):
    """What a config.json or the model section of a recipe says of its family."""

    config: type[EncoderConfig]
    given: Mapping[str, Any]
    """Its settings under our names, with those that its `model_type` stands for."""


def described(content: Mapping[str, Any]) -> Described | None:
    """Return the family of a config.json, or of a recipe's model section; None where it is of none."""
    model_type = content.get("model_type")
    name = HF_FAMILIES.get(str(model_type)) if "model_type" in content else content.get("type", "bert")
    config = FAMILY_CONFIGS.get(str(name))
    if config is None:
        return None
    names = config.HF_NAMES if "model_type" in content else {}
    renamed = {ours: content[theirs] for ours, theirs in names.items() if theirs in content}
    renamed |= config.from_hf_values(content) if "model_type" in content else {}
    return Described(config, {**content, **renamed, **config.HF_TYPES.get(str(model_type), {})})
