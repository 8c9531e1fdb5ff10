"""What every verb that trains does around its loop: enter the run folder, find where to start, train under watch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from deepspeed import DeepSpeedEngine

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.basics.ranks import Ranks
from bert_ds.configuration.recipe.run_config import RunConfig
from bert_ds.reporting.environment import other_kernels, write_environment
from bert_ds.reporting.run_log import RunLog
from bert_ds.training.checkpoints.checkpoint_loader import resume
from bert_ds.training.checkpoints.train_state import LoopSettings, TrainState
from bert_ds.training.launch.hang_watchdog import watched_for_hangs
from bert_ds.training.launch.launch_precision import Decision
from bert_ds.training.launch.process_group import device_name
from bert_ds.training.launch.run_folder import Resume, describe_run, enter_run_folder
from bert_ds.training.loop.train_loop import Services, train


class LaunchFolder(NamedTuple):
    """The run folder as a launch enters it."""

    path: Path
    descriptions: Mapping[str, str]
    """What describes the run: file name to text."""
    resume: Resume


def enter(folder: LaunchFolder, ranks: Ranks, *, total_steps: int, decision: Decision) -> RunLog:
    """Enter the folder and return the log in it, which has said what was decided; a collective.

    Raises:
        ConfigError, DataError: see `enter_run_folder`.
    """
    enter_run_folder(folder.path, folder.descriptions, resume=folder.resume)
    log = RunLog(folder.path, ranks, total_steps=total_steps)
    decision.say(log.info)
    write_environment(folder.path, ranks, devices=[device_name()])
    if (said := other_kernels()) is not None:
        log.warning(said)
    return log


def start_state(engine: DeepSpeedEngine, folder: LaunchFolder, *, facts: Mapping[str, str], log: RunLog) -> TrainState:
    """Load the newest checkpoint that may be continued and return its state, or that of a run at its beginning.

    A collective. Only when the checkpoint is known to fit is the run described, as it is known by now.

    Raises:
        CheckpointError: see `resume`.
    """
    state = None if folder.resume == "never" else resume(engine, folder.path, name=None, facts=facts, log=log)
    describe_run(folder.path, folder.descriptions)
    return state or TrainState()


def recipe_loop(run: RunConfig, stage_starts: tuple[int, ...]) -> LoopSettings:
    """Return what the loop needs of the recipe."""
    return LoopSettings(
        total_steps=run.training.steps,
        seed=run.seed,
        peak_lr=run.optimizer.lr,
        schedule=run.schedule,
        log_every_steps=run.training.log_every_steps,
        evaluate_every_steps=run.evaluation.every_steps,
        checkpoint_every_steps=run.checkpoints.every_steps,
        max_bad_steps=run.recovery.max_bad_steps,
        max_rollbacks=run.recovery.max_rollbacks,
        spike_sigmas=run.recovery.spike_sigmas,
        spike_window=run.recovery.spike_window,
        stage_starts=stage_starts,
        draws=run.draws,
    )


def train_watched(
    engine: DeepSpeedEngine,
    batches: Iterator[Sequence[MicroBatch]],
    *,
    state: TrainState,
    loop: LoopSettings,
    services: Services,
    limit_s: float,
) -> None:
    """`train` with a watchdog over it and a stop request that waits for the save; a collective.

    Args:
        engine, batches, state, loop, services: see `train`.
        limit_s: see `watched_for_hangs`.
    """
    log, heart = services.log, services.heartbeat
    watched = watched_for_hangs(heart, log.run_dir, ranks=log.ranks, limit_s=limit_s, module=engine.module)
    with watched, services.stop.training():
        train(engine, batches, state=state, loop=loop, services=services)
