"""How often DeepSpeed's engine waits for a card per micro-step and per step, counted on the real engine.

On a CPU the engine skips what only a card needs. Here the accelerator says that it is one, with streams that count who
waits for them; numbers that the host reads are counted as they are.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from tiny_training import TinyModel, ds_config, join_alone, step_batches, tiny_engine
from torch.utils._python_dispatch import TorchDispatchMode

from bert_ds.training.loop.train_step import forward_backward, take_step

ACCUMULATION = 3
CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"


class WithoutDropout(TinyModel):
    """Draws no mask, for which the tiny model reads its seed."""

    def forward(self, **inputs: Any) -> tuple:
        return super().forward(**{**inputs, "dropout_seed": None})


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts["reads"] += func._overloadpacket.__name__ in ("_local_scalar_dense", "equal", "nonzero")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Let the accelerator have streams, and count who waits for them or for all."""
    found: Counter[str] = Counter()

    def count(*unused: Any) -> None:
        found["waits"] += 1

    def nothing(*unused: Any, **named: Any) -> None: ...

    class Stream:
        synchronize = count
        wait_stream = record_event = wait_event = nothing

    class Event:
        synchronize = count
        record = wait = nothing

        def query(self) -> bool:
            return True

    stream, event = Stream(), Event()
    accelerator = type(get_accelerator())
    for name in ("is_synchronized_device", "resolves_data_dependency", "handles_memory_backpressure"):
        monkeypatch.setattr(accelerator, name, lambda self: False)
    monkeypatch.setattr(accelerator, "use_host_timers", lambda self: True)
    monkeypatch.setattr(accelerator, "synchronize", count)
    monkeypatch.setattr(accelerator, "Stream", property(lambda self: lambda *unused, **named: stream))
    monkeypatch.setattr(accelerator, "Event", property(lambda self: lambda *unused, **named: event))
    for name in ("current_stream", "default_stream"):
        monkeypatch.setattr(accelerator, name, lambda self, device=None: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", nothing)
    return found


def waits_of(counts: Counter[str], stage: int, precision: str, *, overlap: bool) -> tuple[int, ...]:
    """Return (waits, reads) of a step's micro-steps, and those of its end."""
    join_alone()
    config = ds_config(stage, precision=precision, accumulation=ACCUMULATION)
    config["zero_optimization"]["overlap_comm"] = overlap
    engine = tiny_engine(config, model=WithoutDropout())
    batches = step_batches(0, 0, ACCUMULATION)
    found: list[int] = []
    for step in (1, 2):
        micro_batches = next(batches)
        totals = {name: sum(batch.counts[name] for batch in micro_batches) for name in micro_batches[0].counts}
        counts.clear()
        with Reads(counts):
            forward_backward(engine, micro_batches, counts=totals, seed=1, step=step)
        found = [counts["waits"], counts["reads"]]
        counts.clear()
        with Reads(counts):
            take_step(engine)
        found += [counts["waits"], counts["reads"]]
    return tuple(found)


@pytest.mark.parametrize(
    ("stage", "overlap", "wanted"),
    [
        (0, False, (0, 0, 0, 11)),
        (1, False, (0, 0, 0, 2)),
        (2, False, (0, 0, 0, 4)),
        (2, True, (ACCUMULATION, 0, 0, 4)),
        (3, False, (3 * ACCUMULATION, 0, 0, 1)),
    ],
)
def test_the_engine_waits_as_the_readme_says(
    counts: Counter[str], stage: int, overlap: bool, wanted: tuple[int, ...]
) -> None:
    assert waits_of(counts, stage, "bf16", overlap=overlap) == wanted


def test_the_shipped_files_have_what_waits_least() -> None:
    zero = {stage: json.loads((CONFIGS / f"zero{stage}.json").read_text())["zero_optimization"] for stage in (1, 2, 3)}
    assert not zero[1]["overlap_comm"] and not zero[2]["overlap_comm"]
    # Which fits the model: see test_a_bucket_that_is_auto_holds_the_model_and_at_most_fifty_million_numbers.
    assert zero[3]["reduce_bucket_size"] == zero[3]["stage3_prefetch_bucket_size"] == "auto"
    for stage in (1, 2):
        assert zero[stage]["reduce_bucket_size"] == zero[stage]["allgather_bucket_size"] == "auto"
