"""The batches that a plan asks of a corpus: to train on, to evaluate on, and the largest that can come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.basics.ranks import DataError, Ranks
from bert_ds.configuration.recipe.run_config import RunConfig
from bert_ds.configuration.run_checks import drawn_weights
from bert_ds.configuration.run_plan import RunPlan
from bert_ds.corpus.batches.loader import PretrainingData, Source
from bert_ds.corpus.shards.embedded import embedded_folders


def corpus_of(run: RunConfig, embedded_in: Path) -> tuple[Path, list[Source]]:
    """Return the tokenizer and the sources of a recipe.

    Args:
        run: the recipe.
        embedded_in: folder in which the corpus lies where it is the embedded one.
    """
    if run.corpus.type == "embedded":
        folders = embedded_folders(run.corpus, embedded_in)
        return folders.tokenizer, [Source(folders.shards, "docstrings")]
    weights = drawn_weights(run.corpus)
    sources = [Source(Path(one.path), one.path, by) for one, by in zip(run.corpus.sources, weights, strict=True)]
    return Path(run.corpus.tokenizer), sources


def training_batches(plan: RunPlan, data: PretrainingData, ranks: Ranks, *, start: int) -> Iterator[list[MicroBatch]]:
    """Yield this rank's micro-batches of every step's place in the order of the data, from `start`, counted from 0."""
    return data.step_batches(
        start,
        rank=ranks.rank,
        split=plan.split,
        num_workers=plan.run.training.num_workers,
    )


def evaluated_batches(
    run: RunConfig, data: PretrainingData, ranks: Ranks
) -> Iterator[tuple[str, Iterator[MicroBatch]]]:
    """Yield this rank's held-out batches, the same at every evaluation, under "", and then those of each of several
    sources under its name, together about as many again. A source with fewer of them than ranks is left out."""
    settings = run.evaluation
    spread: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
    }
    yield "", data.evaluation_batches(settings.num_examples, **spread)
    of_each = max(settings.num_examples // len(data.names), ranks.world_size)
    for name in data.names if len(data.names) > 1 else ():
        try:
            batches = data.evaluation_batches(of_each, source=name, **spread)
        except DataError:
            continue
        yield name, batches


def held_out_batches(run: RunConfig, data: PretrainingData, ranks: Ranks) -> list[MicroBatch]:
    """Return all batches that this rank has in an evaluation."""
    return [batch for _, batches in evaluated_batches(run, data, ranks) for batch in batches]


def longest_batches(plan: RunPlan, data: PretrainingData) -> Callable[[int], MicroBatch]:
    """Return what makes the largest micro-batch that can come, of the stage that needs most, for one of the recipe."""
    index, own = plan.largest_stage, plan.split.micro_batch_size
    there = plan.stages[index].split.micro_batch_size
    return lambda size: data.longest_batch(-(-size * there // own), stage=index)


def source_facts(data: PretrainingData, place: int) -> dict[str, Any]:
    """Return what each of several sources gave to the batch in a place of their order, for the row of its step."""
    counts = data.source_counts(place, place + 1) if len(data.names) > 1 else {}
    return {"sources": {name: count._asdict() for name, count in counts.items()}} if counts else {}
