"""Finding and loading what a run has saved; every public function here is a collective.

A checkpoint belongs to its ZeRO stage and precision; on another number of ranks it continues by `load_resized`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from bert_ds.basics.ranks import CheckpointError
from bert_ds.reporting.run_log import RunLog
from bert_ds.training.checkpoints import checkpoint_folder
from bert_ds.training.checkpoints.checkpoint_folder import checkpoints_dir
from bert_ds.training.checkpoints.checkpoint_saver import (
    CheckpointPolicy,
    CheckpointSaver,
    precision_of,
    try_on_main,
)
from bert_ds.training.checkpoints.train_state import TrainState
from bert_ds.training.checkpoints.universal_checkpoint import load_resized


def save_checkpoint(
    engine: DeepSpeedEngine, run_dir: Path, *, state: TrainState, policy: CheckpointPolicy, log: RunLog
) -> Path | None:
    """Save at once, publish and rotate; return the checkpoint, or None on all ranks alike where that failed."""
    saver = CheckpointSaver(engine, run_dir, policy=replace(policy, asynchronous=False), log=log)
    return checkpoints_dir(run_dir) / f"global_step{state.step}" if saver.save(state) else None


def resume(
    engine: DeepSpeedEngine, run_dir: Path, *, name: str | None, facts: Mapping[str, str], log: RunLog
) -> TrainState | None:
    """Load the newest whole checkpoint of a run, or the named one; None where the run has never saved one.

    With a name, checkpoints of later steps are renamed: the run goes on from the named one, now and after a restart.

    Raises:
        CheckpointError: there are checkpoints but none is whole, or see `load_checkpoint`.
    """
    found = try_on_main(lambda: _found(run_dir, name, warn=log.warning))
    if "error" in found:
        raise CheckpointError(found["error"])
    if found["value"] is None:
        return None
    tag, saved_by = found["value"]
    path = checkpoints_dir(run_dir) / tag
    if saved_by != dist.get_world_size():
        log.info(f"{tag} was saved by {saved_by} ranks, continuing on {dist.get_world_size()}")
    state = load_checkpoint(engine, path, facts=facts, verified=True)
    if name is not None and log.is_main:
        for abandoned in checkpoint_folder.abandon_newer(path):
            log.warning(f"a newer checkpoint is kept as {abandoned}")
    log.info(f"resumed from {path}")
    return state


def roll_back(
    engine: DeepSpeedEngine, run_dir: Path, *, state: TrainState, facts: Mapping[str, str], log: RunLog
) -> bool:
    """Put engine and state back to the newest whole checkpoint; False, on all ranks alike, where there is none.

    One that was saved between bad steps does not count. The state then passes over all batches that it has seen since.
    """
    found = try_on_main(lambda: _newest_with(lambda at: not at["bad_streak"], run_dir, warn=log.warning))
    if found.get("value") is None:
        return False
    path, bad_step = checkpoints_dir(run_dir) / found["value"], state.step
    state.go_back(load_checkpoint(engine, path, facts=facts, verified=True))
    if log.is_main:
        checkpoint_folder.abandon_newer(path)
    log.row("start", state.step, {"rolled_back_from": bad_step, "passed_over": state.passed_over})
    log.warning(f"went back from step {bad_step} to {path}; {state.passed_over} batches are passed over by now")
    return True


def load_before(
    engine: DeepSpeedEngine, run_dir: Path, step: int, *, facts: Mapping[str, str], log: RunLog
) -> TrainState:
    """Load the newest whole checkpoint that is older than a step.

    Raises:
        CheckpointError: there is none, or see `load_checkpoint`.
    """
    found = try_on_main(lambda: _newest_with(lambda at: at["step"] < step, run_dir, warn=log.warning))
    if found.get("value") is None:
        raise CheckpointError(f"{checkpoints_dir(run_dir)} holds no whole checkpoint from before step {step}")
    return load_checkpoint(engine, checkpoints_dir(run_dir) / found["value"], facts=facts, verified=True)


def load_checkpoint(
    engine: DeepSpeedEngine, path: Path, *, facts: Mapping[str, str] | None = None, verified: bool = False
) -> TrainState:
    """Load weights, optimizer and progress into a new engine. Learning rate, decay and the like stay the engine's.

    Args:
        engine: from `make_engine`, not yet trained.
        path: `checkpoints/global_stepN`.
        facts: fingerprints that must equal those in the manifest; None checks none.
        verified: skip the sha256 of every file, because `find_checkpoint` has just computed it.

    Raises:
        CheckpointError: the checkpoint is damaged, belongs to another stage, precision, optimizer or data, or cannot be
            converted for this number of ranks.
    """
    answer = try_on_main(lambda: checkpoint_folder.verify_checkpoint(path, hashes=not verified))
    if "error" in answer:
        raise CheckpointError(answer["error"])
    manifest = answer["value"]
    _refuse_foreign(engine, path, manifest=manifest, facts=facts or {})
    settings = [_settings(group) for group in engine.optimizer.param_groups]
    # Without ZeRO every rank holds everything.
    resized = manifest["world_size"] != dist.get_world_size() and manifest["zero_stage"] != 0
    if resized:
        load_resized(engine, path, manifest=manifest)
    try:
        state = TrainState.from_dict(manifest["state"])
        if not resized:
            engine.load_checkpoint(str(path.parent), tag=path.name, load_lr_scheduler_states=False)
    except (RuntimeError, KeyError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
        raise CheckpointError(f"{path} does not fit this model or optimizer: {' '.join(lines[:2])}{more}") from error
    for group, setting in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(setting)
    state.attempt += 1
    return state


def _found(run_dir: Path, name: str | None, *, warn: Callable[[str], None]) -> tuple[str, int] | None:
    """Return name and world size of the checkpoint to continue from."""
    path = checkpoint_folder.find_checkpoint(run_dir, name, warn=warn)
    return None if path is None else (path.name, checkpoint_folder.read_manifest(path)["world_size"])


def _newest_with(wanted: Callable[[dict[str, Any]], bool], run_dir: Path, *, warn: Callable[[str], None]) -> str | None:
    """Return the name of the newest whole checkpoint whose state is wanted."""
    for path in checkpoint_folder.candidates(run_dir):
        try:
            manifest = checkpoint_folder.verify_checkpoint(path)
        except CheckpointError as error:
            warn(f"checkpoint passed over: {error}")
        else:
            if wanted(manifest["state"]):
                return path.name
    return None


def _refuse_foreign(
    engine: DeepSpeedEngine, path: Path, *, manifest: Mapping[str, Any], facts: Mapping[str, str]
) -> None:
    """Raise if the checkpoint was written by another kind of run than this one."""
    wanted = {
        "zero_stage": int(engine.zero_optimization_stage()),
        "precision": precision_of(engine),
        "optimizer": type(engine.basic_optimizer).__name__,
    }
    for name, value in wanted.items():
        if manifest[name] != value:
            raise CheckpointError(f"{path} was saved with {name} {manifest[name]}, this run has {name} {value}")
    for name, value in facts.items():
        # What an earlier version did not write is not known to differ.
        if (found := manifest["facts"].get(name, value)) != value:
            raise CheckpointError(f"{path} was saved with {name} {found}, this run has {name} {value}")


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
