"""Stages of a recipe: parts of the run in which batch, length or masks differ from what the recipe says itself."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bert_ds.configuration.reading.config_section import Section


class StageConfig(Section):
    """A part of the run, which begins where the one before it ends."""

    until: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Share of the run's steps at which the stage ends; ascending. After the last one the recipe's own values hold."""
    max_seq_length: Annotated[int, Field(ge=8, le=2**20)] | None = None
    """In place of sequences.max_seq_length, which is the longest; null keeps it."""
    train_batch_size: Annotated[int, Field(ge=1, le=2**24)] | None = None
    """In place of training.train_batch_size, in as many micro-steps; null keeps it."""
    mlm_probability: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """In place of masking.mlm_probability; null keeps it."""
