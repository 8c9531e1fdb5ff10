"""Whose a folder of token shards is, and what is being built in it: building.json says it until the manifest does."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bert_ds.basics.input_gate import read_bytes
from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.corpus.shards.segments import foreign_file, has_finished_segments, remove_our_files, write_durably
from bert_ds.corpus.shards.shard_folder import Manifest
from bert_ds.folders.output_folders import claim, first_entry, foreign_text

_BUILDING = "building.json"
_WANTED = "wanted a new or an empty folder, or that of an earlier shard build"
_PLAN_BEGINS = b'{\n "format": 1,\n "dtype": "uint'


def claim_build_folder(folder: Path) -> None:
    """Refuse a folder that is neither new, empty, nor that of a build that was begun; ConfigError names an entry."""
    claim(folder, _foreign_entry, wanted=_WANTED)


def refuse_foreign_files(folder: Path, *, finished: set[str]) -> None:
    """Refuse what has a name of ours in the folder of a finished build, whose shard files are given, and is not ours.

    Raises:
        ConfigError: with the name; nothing was changed.
    """
    foreign = foreign_file(folder, finished=finished)
    if foreign is None and os.path.lexists(folder / _BUILDING) and _unfinished_build(folder) is None:
        foreign = _BUILDING
    if foreign is not None:
        raise ConfigError(foreign_text(folder, foreign, wanted=_WANTED))


@contextmanager
def only_builder(folder: Path) -> Iterator[None]:
    """Hold the folder against a second build; DataError where one is under way."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is building {folder}") from None
        except OSError as error:
            # Some cluster file systems have no locks; the lock only guards against starting a build twice.
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
        yield
    finally:
        os.close(descriptor)


def enter(folder: Path, intended: Manifest) -> None:
    """Say what is built here; a build of something else that has finished nothing yet is forgotten."""
    found = _unfinished_build(folder)
    if found is not None and has_finished_segments(folder):
        refuse_other_build(folder, intended, found)
    elif found != intended.model_dump():
        remove_our_files(folder, except_for={_BUILDING})
        write_durably(folder / _BUILDING, intended.model_dump())


@contextmanager
def nothing_left_of_nothing(folder: Path) -> Iterator[None]:
    """Empty the folder when the block fails before a segment is finished: another try may have other settings."""
    try:
        yield
    except Exception:
        if not has_finished_segments(folder):
            remove_our_files(folder, except_for=set())
        raise


def refuse_other_build(folder: Path, intended: Manifest, found: dict[str, Any]) -> None:
    """Raise ConfigError naming the first setting in which what is built there differs from what is to be built."""
    for name, wanted in intended.model_dump().items():
        if name != "splits" and found.get(name) != wanted:
            raise ConfigError(
                f"output {folder} was built with other settings: {name} is {_short(found.get(name))} there and "
                f"{_short(wanted)} here; choose another folder or delete that one"
            )


def _foreign_entry(folder: Path) -> str | None:
    """Return the first name in a folder that no build has entered, or that none has written; None where all is ours."""
    if _unfinished_build(folder) is not None:
        return foreign_file(folder)
    if os.path.lexists(folder / _BUILDING):
        return _BUILDING
    name = first_entry(folder)
    return None if name == f"{_BUILDING}.partial" and _is_cut_manifest(folder / name) else name


def _is_cut_manifest(path: Path) -> bool:
    """Whether a file is the beginning of what `write_durably` writes of a manifest without shards."""
    found = read_bytes(path) if path.is_file() and not path.is_symlink() else None
    return found is not None and found[: len(_PLAN_BEGINS)] == _PLAN_BEGINS[: len(found)]


def _unfinished_build(folder: Path) -> dict[str, Any] | None:
    """Return what building.json says is built in a folder, None where it is not of a build."""
    try:
        return Manifest.model_validate_json(read_bytes(folder / _BUILDING)).model_dump()
    except ValueError:
        return None


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
