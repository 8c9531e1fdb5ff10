"""Saving the training state; `save` and `settle` are collectives.

A save: all ranks write into one temporary folder through `VerifiedCheckpointEngine`; they agree on sizes, hashes and
errors; rank 0 writes the manifest, forces it to the disk, renames the folder and moves the pointer, then deletes old
checkpoints. Killed at any moment it leaves the older checkpoints and perhaps a temporary folder that nothing reads.

An asynchronous save copies every file into host memory and returns; a thread per rank writes, hashes and forces them
to the disk while training goes on. At the first step after which all ranks are through they agree as above, and a
thread of rank 0 publishes. There is one save at a time: the next one waits for it, and so does the end of a launch.
"""

from __future__ import annotations

import platform
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from bert_ds.basics.ranks import CheckpointError
from bert_ds.reporting.environment import library_versions
from bert_ds.reporting.run_log import RunLog
from bert_ds.training.agreement import broadcast_json, gather_json, max_over_ranks
from bert_ds.training.checkpoints import checkpoint_folder
from bert_ds.training.checkpoints.checkpoint_engine import VerifiedCheckpointEngine
from bert_ds.training.checkpoints.train_state import TrainState
from bert_ds.training.deepspeed_names import deepspeed_version
from bert_ds.training.optimizers.zero_limits import universal_checkpoint_blockers


@dataclass(frozen=True)
class CheckpointPolicy:
    """What a run writes into its manifests, how, and how many checkpoints it keeps."""

    keep_last: int = 2
    keep_every_steps: int | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of recipe, data and tokenizer; a resume is refused where one of them differs."""
    keep_steps: Callable[[], frozenset[int]] = frozenset
    """Steps whose checkpoints are kept whatever their age, asked at every rotation."""
    asynchronous: bool = False
    """Write behind the training, from a copy in host memory."""


class CheckpointSaver:
    """Saves, publishes and rotates the checkpoints of one launch. A failure leaves the older ones alone and is logged.

    Args:
        engine: from `make_engine`.
        run_dir: the run folder.
        policy: see there.
        log: is told of every save and every failure.
    """

    def __init__(self, engine: DeepSpeedEngine, run_dir: Path, *, policy: CheckpointPolicy, log: RunLog) -> None:
        assert isinstance(engine.checkpoint_engine, VerifiedCheckpointEngine), "the engine is not from make_engine"
        self._engine, self._run_dir, self._policy, self._log = engine, run_dir, policy, log
        self._writer = engine.checkpoint_engine
        self._pending: _Save | None = None
        self._good = True

    def save(self, state: TrainState) -> bool:
        """Save, or copy what is to be saved and begin to write it; False, on all ranks alike, where that failed."""
        self.settle(True)
        begun, tag = time.perf_counter(), f"global_step{state.step}"
        folder = checkpoint_folder.checkpoints_dir(self._run_dir)
        broken = enumerate(gather_json(_weights_not_finite(self._engine)))
        if errors := [f"rank {rank}: {name} is not finite" for rank, name in broken if name]:
            return self._fail(tag, "; ".join(errors))
        started = try_on_main(lambda: _start(folder, tag, needed_bytes=checkpoint_bytes(self._engine)))
        if "error" in started:
            return self._fail(tag, started["error"])
        temporary = folder / started["value"]
        self._writer.in_memory = self._policy.asynchronous and self._fits_into_memory()
        self._engine.save_checkpoint(
            str(folder),
            tag=temporary.name,
            client_state={"parameter_names": self._writer.parameter_names},
            save_latest=False,
        )
        manifest = _manifest(self._engine, state=state, facts=self._policy.facts)
        self._pending = _Save(tag, temporary, manifest, begun)
        if not self._writer.in_memory:
            return self.settle(True)
        self._pending.stall_s = time.perf_counter() - begun
        self._pending.work = _Background(self._writer.write_snapshots)
        return True

    def settle(self, wait: bool) -> bool:
        """Publish a save that is being written behind the training, if all ranks are through or `wait` is true.

        Returns:
            False, on all ranks alike, where the newest save that has ended could not be written.
        """
        save = self._pending
        if save is None or not self._is_through(save, wait=wait):
            return self._good
        if save.files is None:
            parts = gather_json({"files": self._writer.written, "error": self._writer.error})
            save.files = {name: record for part in parts for name, record in sorted(part["files"].items())}
            errors = [f"rank {rank}: {part['error']}" for rank, part in enumerate(parts) if part["error"]]
            if dist.get_rank() == 0:
                save.work = _Background(lambda: self._publish(save, errors))
            if not self._is_through(save, wait=wait):
                return self._good
        published = try_on_main(save.result)
        self._pending = None
        if "error" in published:
            needed = checkpoint_bytes(self._engine)
            return self._fail(save.tag, f"{published['error']} (a checkpoint needs about {needed:,} bytes)")
        self._report(save)
        self._good = True
        return True

    def _is_through(self, save: _Save, *, wait: bool) -> bool:
        """Whether no rank's thread is at work any more."""
        if wait and save.work is not None:
            save.work.join()
        return not max_over_ranks(float(save.work is not None and save.work.is_alive()))

    def _publish(self, save: _Save, errors: list[str]) -> None:
        """Publish a whole folder, then delete what is older; delete the folder if a rank has failed. Rank 0 only."""
        try:
            if errors:
                raise CheckpointError("; ".join(errors))
            if past := {file.name for file in save.temporary.iterdir()} ^ set(save.files or {}):
                release = deepspeed_version()
                raise CheckpointError(f"DeepSpeed {release} did not save {min(past)} through this project's engine")
            checkpoint_folder.write_manifest(save.temporary, {**save.manifest, "files": save.files})
            path = checkpoint_folder.publish(save.temporary, save.tag)
        except (OSError, CheckpointError):
            shutil.rmtree(save.temporary, ignore_errors=True)
            raise
        keep, every = self._policy.keep_last, self._policy.keep_every_steps
        try:
            steps = self._policy.keep_steps()
            checkpoint_folder.rotate(self._run_dir, path, keep_last=keep, keep_every_steps=every, keep_steps=steps)
        except OSError as error:
            self._log.warning(f"an old checkpoint could not be deleted: {error}")

    def _fits_into_memory(self) -> bool:
        """Whether the host memory of every machine has room for the copy of its ranks' files."""
        machines = gather_json(platform.node())
        local_ranks, world_size = max(map(machines.count, machines)), len(machines)
        # The first rank writes the model too, at most as much again as one rank's share of the rest.
        needed = checkpoint_bytes(self._engine) * min(1.0, (local_ranks + 1) / world_size)
        available = psutil.virtual_memory().available
        if not max_over_ranks(float(needed > 0.8 * available)):
            return True
        self._log.info(
            f"this checkpoint is not written behind the training: a copy needs {needed:,.0f} bytes of host memory, "
            f"{available:,} are available on the first machine"
        )
        return False

    def _report(self, save: _Save) -> None:
        num_bytes, seconds = sum(record["bytes"] for record in (save.files or {}).values()), save.seconds()
        stall_s = seconds if save.stall_s is None else save.stall_s
        step = save.manifest["step"]
        self._log.checkpoint_row(step, stall_s=stall_s, background_s=seconds - stall_s, num_bytes=num_bytes)
        behind = f", {seconds - stall_s:.1f} s more behind the training" if save.stall_s is not None else ""
        self._log.info(f"saved {save.temporary.parent / save.tag}: {num_bytes:,} bytes in {stall_s:.1f} s{behind}")

    def _fail(self, tag: str, reason: str) -> bool:
        if self._log.is_main:
            self._log.warning(f"checkpoint {tag} was not written, older ones are untouched: {reason}")
        self._good = False
        return False


class _Background(threading.Thread):
    """A daemon thread that keeps the error of its action."""

    def __init__(self, action: Callable[[], None]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._action = action
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._action()
        except Exception as error:
            self.error = error


@dataclass
class _Save:
    """A save that has not ended."""

    tag: str
    temporary: Path
    manifest: dict[str, Any]
    """Without the files."""
    begun: float
    stall_s: float | None = None
    """Seconds on the step path of an asynchronous save."""
    files: dict[str, dict[str, Any]] | None = None
    """Of all ranks, once all of them are through."""
    work: _Background | None = None

    def seconds(self) -> float:
        return time.perf_counter() - self.begun

    def result(self) -> None:
        """Raise what went wrong in the thread."""
        if self.work is not None and self.work.error is not None:
            raise self.work.error


def checkpoint_bytes(engine: DeepSpeedEngine) -> int:
    """Return how many bytes a checkpoint takes over all ranks, at most: two moments, an fp32 master, the weights."""
    parameters = list(engine.module.parameters())
    numel = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
    stage = engine.zero_optimization_stage()
    weights = 0 if stage == 3 else parameters[0].element_size()
    masters = 0 if stage == 0 and parameters[0].element_size() == 4 else 4
    return numel * (weights + masters + 8) + (1 << 20) * (1 + dist.get_world_size())


def try_on_main(action: Callable[[], Any]) -> dict[str, Any]:
    """Run an action on rank 0 and return {"value": ...} or {"error": ...} on all ranks; a collective."""
    answer: dict[str, Any] = {}
    if dist.get_rank() == 0:
        try:
            answer = {"value": action()}
        except (OSError, CheckpointError) as error:
            answer = {"error": str(error)}
    return broadcast_json(answer)


def precision_of(engine: DeepSpeedEngine) -> str:
    """Return the dtype that the engine computes in, as it stands in a manifest."""
    return str(engine.get_data_types()[0]).removeprefix("torch.")


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


def _weights_not_finite(engine: DeepSpeedEngine) -> str:
    """Return the name of the first weight on this rank that holds a NaN or an infinity, else ""."""
    named = [(name, _held(parameter)) for name, parameter in engine.module.named_parameters()]
    # A sum is as finite as what it adds up, and cheaper than a mask of every element.
    sums = torch.stack([held.sum(dtype=torch.float32) for _, held in named])
    finite = torch.isfinite(sums).tolist()  # host sync: once per save
    return next((name for (name, _), good in zip(named, finite, strict=True) if not good), "")


def _held(parameter: Any) -> torch.Tensor:
    """Return the part of a weight that this rank holds, without the padding of a ZeRO-3 shard."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    shard, rank = parameter.ds_tensor, dist.get_rank(parameter.ds_process_group)
    return shard.flatten()[: max(0, min(shard.numel(), parameter.ds_numel - rank * shard.numel()))]


def _manifest(engine: DeepSpeedEngine, *, state: TrainState, facts: Mapping[str, str]) -> dict[str, Any]:
    return {
        "format": 1,
        "step": state.step,
        "state": state.to_dict(),
        "world_size": dist.get_world_size(),
        "zero_stage": int(engine.zero_optimization_stage()),
        "precision": precision_of(engine),
        "optimizer": type(engine.basic_optimizer).__name__,
        "universal_blockers": universal_checkpoint_blockers(engine),
        "facts": dict(facts),
        "versions": library_versions(),
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
