"""A checkpoint as a folder on disk: its manifest, its verification, which one to take and which to delete.

A checkpoint is `checkpoints/global_stepN/` with a `manifest.json` that holds size and sha256 of every other file and
a checksum of itself. It gets that name only when it is whole, so a folder with the name and damage inside has been
damaged later. `checkpoints/latest` names the newest for other tools; it is never what decides. Nothing here is a
collective.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bert_ds.basics.input_gate import read_json
from bert_ds.basics.ranks import CheckpointError
from bert_ds.basics.whole_files import sync, write_text

MANIFEST = "manifest.json"
POINTER = "latest"
TEMPORARY_PREFIX = ".tmp-"
_TAG = re.compile(r"global_step(\d+)")
_CHUNK = 8 << 20


def checkpoints_dir(run_dir: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return run_dir / "checkpoints"


def step_of(tag: str) -> int:
    """Return N of "global_stepN".

    Raises:
        CheckpointError: the name is anything else, a path for example.
    """
    match = _TAG.fullmatch(tag)
    if match is None:
        raise CheckpointError(f"{tag!r} is not the name of a checkpoint, wanted global_step followed by a number")
    return int(match[1])


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write manifest.json with a checksum of its content, and force file and folder to the disk."""
    write_text(folder / MANIFEST, json.dumps({**content, "checksum": _checksum(content)}, indent=1))
    sync(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the content of manifest.json.

    Raises:
        CheckpointError: it is missing, cannot be read or does not match its checksum.
    """
    content = parse_manifest(folder)
    if content.get("format") != 1 or content.get("step") != step_of(folder.name):
        raise CheckpointError(f"{folder / MANIFEST} is of format {content.get('format')}, step {content.get('step')}")
    files = content.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder / MANIFEST} lists no files")
    for name, record in files.items():
        is_inside = name != ".." and Path(name).name == name
        if not is_inside or not isinstance(record, dict) or set(record) != {"bytes", "sha256"}:
            raise CheckpointError(f"{folder / MANIFEST} does not describe the file {name!r:.60} of its own folder")
    return content


def parse_manifest(folder: Path) -> dict[str, Any]:
    """Return the content of a manifest that matches its own checksum, whatever it describes."""
    try:
        content = read_json(folder / MANIFEST, error=CheckpointError)
        checksum = content.pop("checksum")
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error!r}") from None
    if checksum != _checksum(content):
        raise CheckpointError(f"{folder / MANIFEST} does not match its own checksum")
    return content


def verify_checkpoint(folder: Path, *, hashes: bool = True) -> dict[str, Any]:
    """Return the manifest of a whole checkpoint.

    Args:
        folder: `checkpoints/global_stepN`.
        hashes: compare sha256 too, not only names and sizes.

    Raises:
        CheckpointError: a file is missing, cut, changed or does not belong; the message names the first such file.
    """
    step_of(folder.name)
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    manifest = read_manifest(folder)
    found = {path.name for path in folder.iterdir()} - {MANIFEST}
    if foreign := found - set(manifest["files"]):
        raise CheckpointError(f"{folder / min(foreign)} is not in the manifest")
    for name, record in manifest["files"].items():
        path = folder / name
        if name not in found or path.is_symlink():
            raise CheckpointError(f"{path} is missing")
        if (size := path.stat().st_size) != record["bytes"]:
            raise CheckpointError(f"{path} has {size} bytes, wanted {record['bytes']}")
        if hashes and file_sha256(path) != record["sha256"]:
            raise CheckpointError(f"{path} is damaged: its sha256 is not the one in the manifest")
    return manifest


def find_checkpoint(run_dir: Path, name: str | None = None, *, warn: Callable[[str], None] = print) -> Path | None:
    """Return a verified checkpoint of a run: the named one, else the newest whole one.

    Args:
        run_dir: the run folder.
        name: "global_stepN"; with it no other is tried.
        warn: is told of every damaged checkpoint that is passed over.

    Returns:
        None only where the run has never saved a checkpoint.

    Raises:
        CheckpointError: the named one is damaged, or there are checkpoints and none is whole.
    """
    folder = checkpoints_dir(run_dir)
    if name is not None:
        step_of(name)
        verify_checkpoint(folder / name)
        return folder / name
    damage = []
    for path in candidates(run_dir):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            damage.append(str(error))
            warn(f"checkpoint passed over: {error}")
        else:
            return path
    if damage:
        raise CheckpointError("no checkpoint is whole: " + "; ".join(damage))
    if (folder / POINTER).exists():
        raise CheckpointError(f"{folder / POINTER} exists but no checkpoint does; remove it to start from scratch")
    return None


def candidates(run_dir: Path) -> list[Path]:
    """Return the folders that have a checkpoint's name, the newest first."""
    folder = checkpoints_dir(run_dir)
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _TAG.fullmatch(p.name)), key=lambda p: -step_of(p.name))


def point_to(path: Path) -> None:
    """Let `latest` name this checkpoint, atomically."""
    temporary = path.parent / f"{TEMPORARY_PREFIX}{POINTER}"
    write_text(path.parent / POINTER, path.name + "\n", temporary=temporary)
    sync(path.parent)


def abandon_newer(path: Path) -> list[Path]:
    """Rename the checkpoints of later steps, so that the run goes on from this one; return their new names."""
    renamed = []
    for newer in candidates(path.parent.parent):
        if step_of(newer.name) > step_of(path.name):
            renamed.append(newer.rename(newer.with_name(f"{newer.name}.abandoned-{secrets.token_hex(4)}")))
    point_to(path)
    return renamed


def publish(temporary: Path, tag: str) -> Path:
    """Give a whole temporary folder its name and let the pointer name it.

    A checkpoint of that name that is already there was damaged, or the run would not have come from before it; it is
    moved out of the way and deleted after the new one stands.
    """
    path = temporary.parent / tag
    replaced = temporary.with_name(temporary.name + "-replaced")
    if path.exists():
        os.rename(path, replaced)
    os.rename(temporary, path)
    sync(path.parent)
    point_to(path)
    shutil.rmtree(replaced, ignore_errors=True)
    return path


def rotate(
    run_dir: Path,
    newest: Path,
    *,
    keep_last: int,
    keep_every_steps: int | None,
    keep_steps: frozenset[int] = frozenset(),
) -> list[Path]:
    """Delete checkpoints older than the newest, which has just been verified; return what was deleted.

    Kept are the newest, the keep_last - 1 whole ones before it, multiples of keep_every_steps, and keep_steps. What has
    a later step is damaged, and left for a human to look at.
    """
    step = step_of(newest.name)
    older = [path for path in candidates(run_dir) if step_of(path.name) < step]
    older.sort(key=lambda path: -step_of(path.name))
    kept = set([path for path in older if _is_whole(path)][: keep_last - 1])
    deleted = []
    for path in older:
        at = step_of(path.name)
        if path not in kept and at not in keep_steps and not (keep_every_steps and at % keep_every_steps == 0):
            remove(path)
            deleted.append(path)
    return deleted


def remove(folder: Path) -> None:
    """Delete a checkpoint so that a kill in the middle leaves no folder with a checkpoint's name."""
    doomed = folder.with_name(f"{TEMPORARY_PREFIX}removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(run_dir: Path) -> None:
    """Delete the temporary folders of saves that were killed; no save may be under way."""
    for path in checkpoints_dir(run_dir).glob(f"{TEMPORARY_PREFIX}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _is_whole(path: Path) -> bool:
    try:
        verify_checkpoint(path, hashes=False)
    except CheckpointError:
        return False
    return True


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
