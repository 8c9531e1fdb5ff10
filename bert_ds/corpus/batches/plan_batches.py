"""The batches that a plan asks of a corpus: to train on, to evaluate on, and the largest that can come."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.basics.ranks import Ranks
from bert_ds.configuration.recipe.run_config import RunConfig
from bert_ds.configuration.run_plan import RunPlan
from bert_ds.corpus.batches.loader import PretrainingData


def training_batches(plan: RunPlan, data: PretrainingData, ranks: Ranks, *, start: int) -> Iterator[list[MicroBatch]]:
    """Yield this rank's micro-batches of every step's place in the order of the data, from `start`, counted from 0."""
    return data.step_batches(
        start,
        rank=ranks.rank,
        split=plan.split,
        num_workers=plan.run.training.num_workers,
    )


def validation_batches(run: RunConfig, data: PretrainingData, ranks: Ranks) -> Iterator[MicroBatch]:
    """Yield this rank's held-out batches, the same at every evaluation."""
    settings = run.evaluation
    return data.evaluation_batches(
        settings.num_examples, batch_size=settings.batch_size, rank=ranks.rank, world_size=ranks.world_size
    )


def longest_batches(plan: RunPlan, data: PretrainingData) -> Callable[[int], MicroBatch]:
    """Return what makes the largest micro-batch that can come, of the stage that needs most, for one of the recipe."""
    index, own = plan.largest_stage, plan.split.micro_batch_size
    there = plan.stages[index].split.micro_batch_size
    return lambda size: data.longest_batch(-(-size * there // own), stage=index)
