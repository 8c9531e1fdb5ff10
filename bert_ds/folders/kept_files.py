"""Files of somebody else's that lie where a verb writes its own: kept beside, never overwritten.

The marker of a folder lists what was written there, each file with its sha256. What lies under such a name and is not
as listed, a file changed by hand included, gets another name before ours takes its place. A kill between a file and its
line in the list costs a copy of our own, and nothing of anybody's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from bert_ds.basics.input_gate import file_sha256
from bert_ds.folders.output_folders import read_marker, write_marker


@contextmanager
def keeping_files(folder: Path, paths: Iterable[str]) -> Iterator[None]:
    """Let the block write files; what lies there and is not ours is kept as NAME.kept-1, and said.

    Args:
        folder: with a marker; without one nothing in it is known to be ours.
        paths: of the files, relative to it.

    Raises:
        OSError: a file cannot be read or renamed, or the marker not written.
    """
    names = list(paths)
    places = {os.fspath(parent) for name in names for parent in PurePosixPath(name).parents} - {"."}
    listed = read_marker(folder).get("files", {})
    found = [place for place in sorted(places) if os.path.lexists(folder / place) and not (folder / place).is_dir()]
    found += [name for name in names if _is_foreign(folder / name, listed.get(name))]
    kept = {folder / name: _set_aside(folder / name) for name in found if os.path.lexists(folder / name)}
    try:
        yield
    finally:
        for path, aside in kept.items():
            if not os.path.lexists(path):
                os.rename(aside, path)
            elif _sha256(path) == _sha256(aside) is not None:
                aside.unlink()
            else:
                print(f"kept {aside}: it lay where {path.name} is written and is not ours", file=sys.stderr, flush=True)
    if marker := read_marker(folder):
        now = {name: sha for name in names if (sha := _sha256(folder / name)) is not None}
        write_marker(folder, {**marker, "files": {**marker.get("files", {}), **now}})


def _is_foreign(path: Path, listed: object) -> bool:
    return os.path.lexists(path) and (listed is None or _sha256(path) != listed)


def _set_aside(path: Path) -> Path:
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.kept-{number}")):
        number += 1
    os.rename(path, aside)
    return aside


def _sha256(path: Path) -> str | None:
    """Return the sha256 of a file that can be read, None for a link and anything else."""
    with suppress(OSError):
        return None if path.is_symlink() else file_sha256(path)
    return None
