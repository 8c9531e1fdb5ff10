"""The distillation section of a recipe: a larger model teaches the one that is trained."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bert_ds.configuration.reading.config_section import NonNegativeFloat, NonNegativeInt, PositiveFloat, Section


class DistillationConfig(Section):
    """What a student learns from a teacher beside masked words; the defaults are DistilBERT's (arXiv 1910.01108)."""

    teacher: Annotated[str, Field(min_length=1)]
    """Folder of an exported or Hugging Face encoder with its masked-word head, of the same vocabulary."""
    temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 2.0
    """Scores of both are divided by this before they become probabilities."""
    mlm_weight: NonNegativeFloat = 2.0
    """Weight of the masked words themselves."""
    soft_weight: PositiveFloat = 5.0
    """Weight of the teacher's probabilities of all pieces at the masked words."""
    hidden_weight: NonNegativeFloat = 1.0
    """Weight of the angle between the last hidden states; needs the teacher's hidden_size, 0 does without."""
    init_layers: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None
    """Teacher's layers, counted from 0, whose weights the student's layers start from; null starts at random."""
