"""The stages of a run as the loader knows them: which examples, batch and masks at which place of the order.

Stages whose examples have the same boundaries go through one endless order of them, each from where the one before it
stopped, so that none is read twice before all have been. Examples of another length are other examples, with an order
of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bert_ds.configuration.recipe.run_config import MaskingConfig, RunConfig, SequenceConfig
from bert_ds.configuration.run_stages import RunStage
from bert_ds.corpus.batches.batch_examples import BatchExamples
from bert_ds.corpus.batches.batch_order import Mixture, global_batch
from bert_ds.corpus.batches.mlm_masking import Masker
from bert_ds.corpus.batches.sequences import ExampleTable


@dataclass(frozen=True)
class DataStage:
    """What of a recipe decides which batches are seen from a place of the order on."""

    first_step: int
    """The place, from 0."""
    sequences: SequenceConfig
    masking: MaskingConfig
    train_batch_size: int


@dataclass(frozen=True)
class DataSettings:
    """What of a recipe decides which batches a run sees."""

    sequences: SequenceConfig
    masking: MaskingConfig
    seed: int
    train_batch_size: int
    first_step: int = 0
    """Place of the order, from 0, from which on the fields above hold."""
    earlier: tuple[DataStage, ...] = ()
    """What holds before that place, in turn, from place 0 on."""
    few_shapes: bool = False
    """Whether micro-batches are filled up to a few sizes, which makes no difference to what is trained."""

    @property
    def stages(self) -> tuple[DataStage, ...]:
        """All stages in turn, at least one."""
        last = DataStage(self.first_step, self.sequences, self.masking, self.train_batch_size)
        return (*self.earlier, last)


@dataclass(frozen=True)
class OpenStage:
    """A stage with its examples: what is read in it is a pure function of (seed, place)."""

    settings: DataStage
    seed: int
    tables: list[ExampleTable]
    mixture: Mixture
    masker: Masker
    first_position: int
    """Examples of these tables that the stages before have read."""

    def examples(self, step: int) -> BatchExamples:
        """Return the global batch at a place of the order, which lies in this stage or after it."""
        size = self.settings.train_batch_size
        triples = global_batch(
            step - self.settings.first_step,
            seed=self.seed,
            mixture=self.mixture,
            train_batch_size=size,
            first_position=self.first_position,
        )
        return BatchExamples(self.tables, triples, seed=self.seed)


def data_settings(run: RunConfig, stages: Sequence[RunStage]) -> DataSettings:
    """Return what decides the batches of a recipe with these stages."""
    *earlier, last = [
        DataStage(one.first_step, one.run.sequences, one.run.masking, one.run.training.train_batch_size)
        for one in stages
    ]
    return DataSettings(
        last.sequences,
        last.masking,
        run.seed,
        last.train_batch_size,
        last.first_step,
        earlier=tuple(earlier),
        few_shapes=run.training.few_shapes,
    )


def open_stages(
    settings: DataSettings,
    weights: tuple[float, ...],
    *,
    tables_of: Callable[[SequenceConfig], list[ExampleTable]],
    masker_of: Callable[[MaskingConfig], Masker],
) -> list[OpenStage]:
    """Find the examples of every stage; equal sections of settings are opened once.

    Args:
        settings: of the recipe.
        weights: of the sources.
        tables_of: finds the training examples of every source.
        masker_of: makes what masks them.
    """
    opened: list[OpenStage] = []
    tables: dict[SequenceConfig, list[ExampleTable]] = {}
    maskers: dict[MaskingConfig, Masker] = {}
    read: dict[SequenceConfig, int] = {}
    stages = settings.stages
    ends = [*(stage.first_step for stage in stages[1:]), None]
    for stage, end in zip(stages, ends, strict=True):
        sequences, masking = stage.sequences, stage.masking
        found = tables[sequences] = tables.get(sequences) or tables_of(sequences)
        masker = maskers[masking] = maskers.get(masking) or masker_of(masking)
        mixture = Mixture(tuple(table.num_examples for table in found), weights)
        position = read.get(sequences, 0)
        opened.append(OpenStage(stage, settings.seed, found, mixture, masker, position))
        if end is not None:
            read[sequences] = position + (end - stage.first_step) * stage.train_batch_size
    return opened


def stage_facts(settings: DataSettings) -> list[dict[str, Any]]:
    """Return what tells the order of a run with stages from any other, as plain JSON values; nothing without them."""
    return [
        {
            "until": end.first_step,
            "max_seq_length": stage.sequences.max_seq_length,
            "train_batch_size": stage.train_batch_size,
            "mlm_probability": stage.masking.mlm_probability,
        }
        for stage, end in zip(settings.earlier, settings.stages[1:], strict=True)
    ]
