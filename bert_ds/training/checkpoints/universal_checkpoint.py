"""Continuing on another number of ranks, through DeepSpeed's universal checkpoint; the user types nothing for it.

Under ZeRO a checkpoint holds one shard per rank. Rank 0 lets DeepSpeed's converter put the tensors together into a
folder beside the checkpoint, all ranks load their shards from there, and the folder is deleted. A launch that is killed
in between leaves it to the next, which takes it if it is whole, or else to the next save, which removes it.

The converter and the loader unpickle freely. So they read only a checkpoint of this user whose sha256 have just been
compared with its manifest, and every `torch.load` of theirs is forced to `weights_only`.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from bert_ds.basics.ranks import CheckpointError
from bert_ds.reporting.environment import library_versions
from bert_ds.training.agreement import gather_json, on_main_rank
from bert_ds.training.checkpoints.checkpoint_engine import allowed_classes
from bert_ds.training.checkpoints.checkpoint_folder import (
    MANIFEST,
    TEMPORARY_PREFIX,
    file_sha256,
    parse_manifest,
    write_manifest,
)
from bert_ds.training.deepspeed_names import named_release
from bert_ds.training.optimizers.zero_limits import universal_checkpoint_blockers

with named_release():
    from deepspeed.checkpoint.ds_to_universal import main as convert_to_universal

_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def load_resized(engine: DeepSpeedEngine, path: Path, *, manifest: dict[str, Any]) -> None:
    """Load weights and optimizer of a checkpoint that another number of ranks has saved; a collective.

    Args:
        engine: from `make_engine`, not yet trained, of the checkpoint's ZeRO stage (1, 2 or 3).
        path: a checkpoint whose files have just been verified against its manifest.
        manifest: that manifest.

    Raises:
        CheckpointError: DeepSpeed would get the conversion wrong, or it failed; the message has the reason.
    """
    reasons = [*manifest.get("universal_blockers", []), *universal_checkpoint_blockers(engine)]
    if blockers := sorted({reason for found in gather_json(reasons) for reason in found}):
        raise CheckpointError(
            f"{path} was saved by {manifest['world_size']} ranks and cannot continue on {dist.get_world_size()}: "
            + "; ".join(blockers)
        )
    folder = path.parent / on_main_rank(lambda: convert(path).name)
    engine._config.load_universal_checkpoint = True
    try:
        with weights_only_forced():
            engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
    except Exception as error:
        raise CheckpointError(f"{path} does not fit this model or optimizer: {error}") from error
    finally:
        engine._config.load_universal_checkpoint = False
    gather_json(None)  # all ranks have read it
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)


def convert(path: Path) -> Path:
    """Convert a verified checkpoint and return the folder of the universal one; not a collective.

    Raises:
        CheckpointError: it belongs to another user, the disk is too small, or the converter failed.
    """
    _refuse_other_owner(path)
    source, target = file_sha256(path / MANIFEST), path.parent / f"{TEMPORARY_PREFIX}universal-{path.name}"
    if _is_whole(target, source=source):
        return target
    shutil.rmtree(target, ignore_errors=True)
    _refuse_small_disk(path)
    work = path.parent / f"{TEMPORARY_PREFIX}converting-{secrets.token_hex(4)}"
    try:
        work.mkdir(mode=0o700)
        _run_converter(path, work / "universal")
        files = {name: _record(work / "universal" / name) for name in _file_names(work / "universal")}
        write_manifest(work / "universal", {"source": source, "versions": library_versions(), "files": files})
        os.rename(work / "universal", target)
    except Exception as error:  # the converter asserts, indexes and unpickles
        raise CheckpointError(f"{path} could not be converted for another number of ranks: {error!r}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


@contextlib.contextmanager
def weights_only_forced() -> Iterator[None]:
    """Let no `torch.load` of this process unpickle more than tensors, containers and the allowed classes."""
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        with allowed_classes():
            yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _run_converter(path: Path, output: Path) -> None:
    arguments = Namespace(
        input_folder=str(path),
        output_folder=str(output),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with weights_only_forced(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        convert_to_universal(arguments)


def _refuse_other_owner(path: Path) -> None:
    for file in [path, *path.iterdir()]:
        if (owner := file.lstat().st_uid) != os.geteuid():
            raise CheckpointError(f"{file} belongs to user id {owner}: only your own checkpoints are converted")


def _refuse_small_disk(path: Path) -> None:
    """The converter writes every tensor twice, in pieces and whole, and copies the model's files."""
    needed = round(2.5 * sum(file.stat().st_size for file in path.iterdir()))
    if (free := shutil.disk_usage(path).free) < needed:
        raise CheckpointError(f"{path.parent} has {free:,} bytes free, continuing on other ranks needs {needed:,}")


def _is_whole(folder: Path, *, source: str) -> bool:
    """Whether an earlier launch has converted this very checkpoint and nothing has changed since."""
    try:
        manifest = parse_manifest(folder)
        found = {name: _record(folder / name) for name in _file_names(folder)}
    except (CheckpointError, OSError):
        return False
    return manifest.get("source") == source and manifest.get("files") == found


def _file_names(folder: Path) -> list[str]:
    names = (str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir() or file.is_symlink())
    return sorted(name for name in names if name != MANIFEST)


def _record(file: Path) -> dict[str, Any]:
    info = file.lstat()
    if file.is_symlink() or info.st_uid != os.geteuid():
        raise CheckpointError(f"{file} is a link or belongs to user id {info.st_uid}")
    return {"bytes": info.st_size, "sha256": file_sha256(file)}
