"""What changes around the loop when a run passes from one stage to the next: the engine's batch, the meter, the log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from deepspeed import DeepSpeedEngine

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.configuration.run_stages import RunStage, values_text
from bert_ds.reporting.run_log import RunLog
from bert_ds.training.loop.throughput import Throughput

Batches = Iterator[list[MicroBatch]]


class StageChanges:
    """Follows the batches of a run and tells everyone else which stage they are of; the loop itself need not know.

    Args:
        stages: of the plan, in turn.
        flops_per_token: of each stage.
        engine: its micro-batch, hence its global batch, becomes that of the stage.
        throughput: is told the stage's FLOPs.
        log: says when a stage begins.
    """

    def __init__(
        self,
        stages: Sequence[RunStage],
        flops_per_token: Sequence[float],
        *,
        engine: DeepSpeedEngine,
        throughput: Throughput,
        log: RunLog,
    ) -> None:
        self._stages, self._flops = list(stages), list(flops_per_token)
        self.throughput, self._engine, self._log = throughput, engine, log
        self._entered: int | None = None
        self._said: int | None = None

    @property
    def starts(self) -> tuple[int, ...]:
        """Places of the order, from 0, at which the stages after the first begin."""
        return tuple(stage.first_step for stage in self._stages[1:])

    def follow(self, batches: Batches, start: int) -> Batches:
        """Return the batches of the places from `start` on; the stage of each is entered before it is trained on."""
        if len(self._stages) > 1:
            return self._followed(batches, start)
        self._enter(0, start)
        return batches

    def row(self, place: int) -> dict[str, Any]:
        """Return what the row of a step at this place says: the values of its stage, where the last row's differed."""
        index = self._stage_at(place)
        if len(self._stages) == 1 or index == self._said:
            return {}
        self._said = index
        return {"stage": {"number": index + 1, **self._stages[index].values}}

    def _followed(self, batches: Batches, start: int) -> Batches:
        for place, micro_batches in enumerate(batches, start):
            self._enter(self._stage_at(place), place)
            yield micro_batches

    def _enter(self, index: int, place: int) -> None:
        if index == self._entered:
            return
        self._entered, stage = index, self._stages[index]
        self.throughput.flops_per_token = self._flops[index]
        self._engine.set_train_micro_batch_size(stage.split.micro_batch_size)
        if len(self._stages) > 1:
            self._log.info(
                f"stage {index + 1} of {len(self._stages)}, from batch {place + 1}: {values_text(stage.values)}"
            )

    def _stage_at(self, place: int) -> int:
        return sum(place >= start for start in self.starts)
