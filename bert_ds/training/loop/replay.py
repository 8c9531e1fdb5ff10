"""One step of a run alone, to look at: what its examples do to the gradients."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deepspeed import DeepSpeedEngine

from bert_ds.basics.input_gate import read_json
from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.basics.ranks import DataError
from bert_ds.reporting.run_log import RunLog, read_metrics
from bert_ds.training.agreement import gather_json, on_main_rank
from bert_ds.training.checkpoints.checkpoint_loader import load_before
from bert_ds.training.loop.bad_steps import gradient_report, spelled, trouble_folder
from bert_ds.training.loop.train_step import agree_on_totals


def replay_step(
    engine: DeepSpeedEngine,
    step: int,
    *,
    batch: Callable[[int], Sequence[MicroBatch]],
    seed: int,
    facts: Mapping[str, str],
    log: RunLog,
) -> None:
    """Do forward and backward of a step on the weights of the last checkpoint before it; a collective.

    Losses, tensors that are not finite and the largest gradients of every micro-batch go to the log. No
    checkpoint and no row of metrics is written.

    Args:
        engine: from `make_engine`, not yet trained.
        step: optimizer step, from 1.
        batch: this rank's micro-batches of a step's place in the order of the data, from 0.
        seed: of the run.
        facts: fingerprints that the checkpoint must have.
        log: its folder is the run folder.

    Raises:
        CheckpointError: no whole checkpoint is older than the step.
    """
    state = load_before(engine, log.run_dir, step, facts=facts, log=log)
    number = on_main_rank(lambda: _batch_of(log.run_dir, step)) or step + state.passed_over
    micro_batches = batch(number - 1)
    counts = agree_on_totals(micro_batches, data_wait_s=0.0, stop=False).counts
    engine.train()
    report = gradient_report(engine, micro_batches, counts=counts, seed=seed, step=step)
    log.info(f"step {step}, batch {number}, on the weights of step {state.step}")
    for rank, parts in enumerate(gather_json(spelled(report))):
        for micro_step, part in enumerate(parts):
            log.info(f"rank {rank} micro-step {micro_step}: {json.dumps(part)}")


def _batch_of(run_dir: Path, step: int) -> int | None:
    """Return which batch a step was trained on, where the run says so: in a bad step's report, or on going back."""
    report = trouble_folder(run_dir, step) / "rank_0.json"
    if report.exists():
        return int(read_json(report, error=DataError)["batch"])
    before = [row for row in read_metrics(run_dir / "metrics.jsonl", "start") if row["step"] < step]
    return step + before[-1]["passed_over"] if before and "passed_over" in before[-1] else None
