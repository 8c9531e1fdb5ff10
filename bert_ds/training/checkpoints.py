"""Saving and loading the training state; every public function here is a collective.

A save: all ranks write into one temporary folder through `VerifiedCheckpointEngine`; they agree on sizes, hashes and
errors; rank 0 writes the manifest, forces it to the disk, renames the folder and moves the pointer, then deletes old
checkpoints. Killed at any moment it leaves the older checkpoints and perhaps a temporary folder that nothing reads.

A checkpoint belongs to its ZeRO stage and precision; on another number of ranks it continues by `load_resized`.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from bert_ds.ranks import CheckpointError
from bert_ds.run_log import RunLog, library_versions
from bert_ds.training import checkpoint_folder
from bert_ds.training.agreement import broadcast_json, gather_json
from bert_ds.training.checkpoint_engine import VerifiedCheckpointEngine
from bert_ds.training.train_state import TrainState
from bert_ds.training.universal_checkpoint import load_resized
from bert_ds.training.zero_limits import universal_checkpoint_blockers


@dataclass(frozen=True)
class CheckpointPolicy:
    """What a run writes into its manifests and how many checkpoints it keeps."""

    keep_last: int = 2
    keep_every_steps: int | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of recipe, data and tokenizer; a resume is refused where one of them differs."""


def save_checkpoint(
    engine: DeepSpeedEngine, run_dir: Path, *, state: TrainState, policy: CheckpointPolicy, log: RunLog
) -> Path | None:
    """Save, publish and rotate; return the checkpoint, or None on all ranks alike where it could not be written.

    A failure leaves the older checkpoints alone and is logged with its reason.
    """
    writer = engine.checkpoint_engine
    assert isinstance(writer, VerifiedCheckpointEngine), "the engine was not built by make_engine"
    begun, tag = time.perf_counter(), f"global_step{state.step}"
    folder = checkpoint_folder.checkpoints_dir(run_dir)
    started = _on_main(lambda: _start(folder, tag, needed_bytes=checkpoint_bytes(engine)))
    if "error" in started:
        _log_failure(log, tag, started["error"])
        return None
    temporary = folder / started["value"]
    client_state = {"parameter_names": writer.parameter_names}
    engine.save_checkpoint(str(folder), tag=temporary.name, client_state=client_state, save_latest=False)
    parts = gather_json({"files": writer.written, "error": writer.error})
    errors = [f"rank {rank}: {part['error']}" for rank, part in enumerate(parts) if part["error"]]
    manifest = _manifest(engine, parts, state=state, facts=policy.facts)
    published = _on_main(lambda: _finish(temporary, tag, manifest=manifest, errors=errors))
    if "error" in published:
        _log_failure(log, tag, published["error"])
        return None
    path = folder / tag
    if log.is_main:
        _rotate(run_dir, path, policy=policy, log=log)
    seconds, num_bytes = time.perf_counter() - begun, sum(record["bytes"] for record in manifest["files"].values())
    log.row("checkpoint", state.step, {"seconds": seconds, "bytes": num_bytes})
    log.info(f"saved {path}: {num_bytes:,} bytes in {seconds:.1f} s")
    return path


def resume(
    engine: DeepSpeedEngine, run_dir: Path, *, name: str | None, facts: Mapping[str, str], log: RunLog
) -> TrainState | None:
    """Load the newest whole checkpoint of a run, or the named one; None where the run has never saved one.

    With a name, checkpoints of later steps are renamed: the run goes on from the named one, now and after a restart.

    Raises:
        CheckpointError: there are checkpoints but none is whole, or see `load_checkpoint`.
    """
    found = _on_main(lambda: _found(run_dir, name, warn=log.warning))
    if "error" in found:
        raise CheckpointError(found["error"])
    if found["value"] is None:
        return None
    tag, saved_by = found["value"]
    path = checkpoint_folder.checkpoints_dir(run_dir) / tag
    if saved_by != dist.get_world_size():
        log.info(f"{tag} was saved by {saved_by} ranks, continuing on {dist.get_world_size()}")
    state = load_checkpoint(engine, path, facts=facts, verified=True)
    if name is not None and log.is_main:
        for abandoned in checkpoint_folder.abandon_newer(path):
            log.warning(f"a newer checkpoint is kept as {abandoned}")
    log.info(f"resumed from {path}")
    return state


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
    answer = _on_main(lambda: checkpoint_folder.verify_checkpoint(path, hashes=not verified))
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
        raise CheckpointError(f"{path} does not fit this model or optimizer: {error}") from error
    for group, setting in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(setting)
    state.attempt += 1
    return state


def checkpoint_bytes(engine: DeepSpeedEngine) -> int:
    """Return how many bytes a checkpoint takes over all ranks, at most: two moments, an fp32 master, the weights."""
    parameters = list(engine.module.parameters())
    numel = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
    stage = engine.zero_optimization_stage()
    weights = 0 if stage == 3 else parameters[0].element_size()
    masters = 0 if stage == 0 and parameters[0].element_size() == 4 else 4
    return numel * (weights + masters + 8) + (1 << 20) * (1 + dist.get_world_size())


def _on_main(action: Callable[[], Any]) -> dict[str, Any]:
    """Run an action on rank 0 and return {"value": ...} or {"error": ...} on all ranks."""
    answer: dict[str, Any] = {}
    if dist.get_rank() == 0:
        try:
            answer = {"value": action()}
        except (OSError, CheckpointError) as error:
            answer = {"error": str(error)}
    return broadcast_json(answer)


def _start(folder: Path, tag: str, *, needed_bytes: int) -> str:
    """Make the temporary folder, if the disk has room, and return its name."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint_folder.remove_leftovers(folder.parent)
    free = shutil.disk_usage(folder).free
    if free < 1.1 * needed_bytes:
        raise CheckpointError(f"{folder} has {free:,} bytes free, a checkpoint needs {round(1.1 * needed_bytes):,}")
    name = f"{checkpoint_folder.TEMPORARY_PREFIX}{tag}-{secrets.token_hex(4)}"
    (folder / name).mkdir()
    return name


def _finish(temporary: Path, tag: str, *, manifest: dict[str, Any], errors: list[str]) -> None:
    """Publish a whole folder; delete it if a rank has failed."""
    try:
        if errors:
            raise CheckpointError("; ".join(errors))
        checkpoint_folder.write_manifest(temporary, manifest)
        checkpoint_folder.publish(temporary, tag)
    except (OSError, CheckpointError):
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _found(run_dir: Path, name: str | None, *, warn: Callable[[str], None]) -> tuple[str, int] | None:
    """Return name and world size of the checkpoint to continue from."""
    path = checkpoint_folder.find_checkpoint(run_dir, name, warn=warn)
    return None if path is None else (path.name, checkpoint_folder.read_manifest(path)["world_size"])


def _rotate(run_dir: Path, newest: Path, *, policy: CheckpointPolicy, log: RunLog) -> None:
    try:
        checkpoint_folder.rotate(run_dir, newest, keep_last=policy.keep_last, keep_every_steps=policy.keep_every_steps)
    except OSError as error:
        log.warning(f"an old checkpoint could not be deleted: {error}")


def _log_failure(log: RunLog, tag: str, reason: str) -> None:
    if log.is_main:
        log.warning(f"checkpoint {tag} was not written, older ones are untouched: {reason}")


def _manifest(
    engine: DeepSpeedEngine, parts: list[dict[str, Any]], *, state: TrainState, facts: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "format": 1,
        "step": state.step,
        "state": state.to_dict(),
        "world_size": dist.get_world_size(),
        "zero_stage": int(engine.zero_optimization_stage()),
        "precision": _precision(engine),
        "optimizer": type(engine.basic_optimizer).__name__,
        "universal_blockers": universal_checkpoint_blockers(engine),
        "facts": dict(facts),
        "versions": library_versions(),
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {name: record for part in parts for name, record in sorted(part["files"].items())},
    }


def _refuse_foreign(
    engine: DeepSpeedEngine, path: Path, *, manifest: Mapping[str, Any], facts: Mapping[str, str]
) -> None:
    """Raise if the checkpoint was written by another kind of run than this one."""
    wanted = {
        "zero_stage": int(engine.zero_optimization_stage()),
        "precision": _precision(engine),
        "optimizer": type(engine.basic_optimizer).__name__,
    }
    for name, value in wanted.items():
        if manifest[name] != value:
            raise CheckpointError(f"{path} was saved with {name} {manifest[name]}, this run has {name} {value}")
    for name, value in facts.items():
        if manifest["facts"].get(name) != value:
            raise CheckpointError(
                f"{path} was saved with {name} {manifest['facts'].get(name)}, this run has {name} {value}"
            )


def _precision(engine: DeepSpeedEngine) -> str:
    return str(engine.get_data_types()[0]).removeprefix("torch.")


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
