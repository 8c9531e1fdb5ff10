"""Whose an output folder is: decided here for every verb, before its work and before a byte in it changes.

A verb writes only into a folder that is new, empty, or ours. What makes a folder ours depends on what becomes of it:

* A **run** or a folder of **results** keeps what lies beside our files. A marker says that it is ours, written first;
  what lies in it under a name that we write is the matter of `kept_files`.
* An **export** is replaced as a whole, so every entry has to be ours: a manifest lists each file with its sha256.
* Anything else says itself which entry it did not write, see `claim`.

Folders of earlier versions have neither. Such a run is known by its valid recipe or task beside what only a launch
leaves, such results and exports by holding nothing but what these verbs write.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from bert_ds.basics.whole_files import write_text
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.recipe.run_config import load_run_config
from bert_ds.configuration.task.task_config import load_task

MARKER = "bert_ds_folder.json"
"""In a run or a folder of results."""

WANTED_RUN = "wanted a new or an empty run folder, or that of an earlier run"
WANTED_RESULTS = "wanted a new or an empty folder, or one of earlier results"
"""Ends of the sentences that refuse them."""

Kind = Literal["run", "results"]
_MAX_BYTES = 1 << 20
_PUT_FIRST: Mapping[str, Callable[[Any], bool]] = {
    r"submit\.json": lambda value: isinstance(value, dict) and isinstance(value.get("job"), str),
    r"restarts\.json": lambda value: isinstance(value, dict) and "action" in value,
    r"run\.lock": lambda value: isinstance(value, dict) and "pid" in value,
    r"slurm_job": lambda value: isinstance(value, int),
}
"""What submit.py and a job script leave before a run starts: name, and what its JSON is. An empty file is one too."""
_LOG_PUT_FIRST = r"slurm-[\w.-]*\d\.out"
_LOGS_PUT_FIRST = r"rank_\d+\.out|launcher\.log|exits(/(started|srun\.err|\.?rank_\d+(\.json)?))?"
_LAUNCHED = ("environment.json", "metrics.jsonl", "run.lock", "checkpoints/global_step*")
"""What a launch leaves beside its recipe: a folder with a recipe alone is where somebody keeps recipes."""
_RESULTS = (
    r"results\.json|probes\.(json|png)|(predictions|figures)"
    r"|predictions/(train|validation|test)"
    r"(/(predictions\.(tsv|conll|json)|intents\.tsv|nbest_predictions\.json|null_odds\.json|pairs\.jsonl))?"
    r"|figures/(train|validation|test)_(classes\.txt|confusion\.(tsv|png))"
)
"""Paths that score.py and probe.py of earlier versions wrote."""


def claim(folder: Path, foreign: Callable[[Path], str | None], *, wanted: str) -> None:
    """Raise unless a verb may write into a folder, and try whether it can be written; nothing is left behind.

    Args:
        folder: need not exist.
        foreign: given a folder that is not empty, the first entry that is not ours; None where all is well.
        wanted: the end of the sentence, as in "wanted a new or an empty folder".

    Raises:
        ConfigError: one sentence with the folder and the entry.
    """
    try:
        refuse_foreign(folder, foreign, wanted=wanted)
        _try_to_write(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}: {wanted}") from None


def refuse_foreign(folder: Path, foreign: Callable[[Path], str | None], *, wanted: str) -> None:
    """Raise ConfigError as `claim` does, without trying to write: another machine may be the one that will."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, or a link to nothing: {wanted}")
    if folder.is_dir() and os.listdir(folder) and (entry := foreign(folder)) is not None:
        raise ConfigError(foreign_text(folder, entry, wanted=wanted))


def foreign_text(folder: Path, entry: str, *, wanted: str) -> str:
    """Return the sentence that refuses a folder."""
    return f"{folder} holds {entry!r}, which is not ours or was changed by hand: {wanted}; nothing was touched"


def claim_run_folder(run_dir: Path) -> None:
    """Raise ConfigError unless a run may be in this folder; nothing is changed."""
    claim(run_dir, foreign_in_run, wanted=WANTED_RUN)


def open_run_folder(run_dir: Path) -> None:
    """Claim a run folder, make it and mark it as ours; ConfigError as in `claim_run_folder`."""
    claim_run_folder(run_dir)
    _make(run_dir, "run")


def open_results_folder(folder: Path) -> None:
    """Claim a folder for what score.py or probe.py finds, make it and mark it as ours; ConfigError as in `claim`."""
    claim(folder, foreign_in_results, wanted=WANTED_RESULTS)
    _make(folder, "results")


def read_marker(folder: Path) -> dict[str, Any]:
    """Return what the marker of a folder says, {} where it has none."""
    found = {} if (folder / MARKER).is_symlink() else _json_object(folder / MARKER)
    return found if isinstance(found.get("files", {}), dict) else {}


def write_marker(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the marker of a folder that was claimed; OSError where that fails."""
    write_text(folder / MARKER, json.dumps(facts) + "\n")


def first_entry(folder: Path) -> str | None:
    """Return the first name in a folder that has to be empty."""
    return min(os.listdir(folder), default=None)


def foreign_in_run(run_dir: Path) -> str | None:
    """Return the first name in a folder that tells that it is no run of ours, None where it is one."""
    if _is_marked(run_dir, "run") or _is_earlier_run(run_dir):
        return None
    names = sorted(os.listdir(run_dir))
    has_seeds = any(_is_seed(run_dir / name) for name in names)
    return next((name for name in names if not _may_precede_a_run(run_dir / name, has_seeds=has_seeds)), None)


def foreign_in_results(folder: Path) -> str | None:
    """Return the first path in a folder that tells that it is no folder of results, None where it is one."""
    if _is_marked(folder, "results"):
        return None
    paths = list(entries(folder))
    foreign = next((path for path in paths if not re.fullmatch(_RESULTS, path) or (folder / path).is_symlink()), None)
    is_ours = any("task" in _json_object(folder / name) for name in ("results.json", "probes.json"))
    return foreign if foreign or is_ours else paths[0]


def entries(folder: Path, *, below: str = "") -> Iterator[str]:
    """Yield the relative path of everything in a folder, hidden or not, each folder before its content; no link is
    followed."""
    for entry in sorted(os.scandir(folder / below), key=lambda one: one.name):
        path = f"{below}{entry.name}"
        yield path
        if entry.is_dir(follow_symlinks=False):
            yield from entries(folder, below=f"{path}/")


def _may_precede_a_run(path: Path, *, has_seeds: bool) -> bool:
    """Whether an entry of a folder without recipe and marker is one that submit.py, a job script or a launch makes."""
    if path.is_symlink():
        return False
    if path.is_dir():
        return _is_seed(path) or (path.name == "logs" and all(re.fullmatch(_LOGS_PUT_FIRST, p) for p in entries(path)))
    if path.name == "results.json":
        return has_seeds and "seeds" in _json_object(path)
    for pattern, is_ours in _PUT_FIRST.items():
        if re.fullmatch(pattern, path.name):
            return path.stat().st_size == 0 or is_ours(_read_json(path))
    return re.fullmatch(_LOG_PUT_FIRST, path.name) is not None


def _is_seed(path: Path) -> bool:
    """Whether a folder is the run of one of several seeds or trials."""
    if not re.fullmatch(r"seed_-?\d+|trial_\d+", path.name) or path.is_symlink() or not path.is_dir():
        return False
    return foreign_in_run(path) is None


def _is_earlier_run(run_dir: Path) -> bool:
    if not any(any(run_dir.glob(pattern)) for pattern in _LAUNCHED):
        return False
    for name, load in (("run_config.json", load_run_config), ("task_config.json", load_task)):
        if (run_dir / name).is_file():
            try:
                load(run_dir / name)
            except ConfigError:
                continue
            return True
    return False


def _is_marked(folder: Path, kind: Kind) -> bool:
    return read_marker(folder).get("bert_ds_folder") == kind


def _make(folder: Path, kind: Kind) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_marked(folder, kind):
            write_marker(folder, {"bert_ds_folder": kind, "format": 1})
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}") from None


def _try_to_write(folder: Path) -> None:
    """Make and remove a folder in the nearest folder that exists; OSError where that fails."""
    while not folder.exists():
        folder = folder.parent
    probe = folder / f".bert_ds_probe.{secrets.token_hex(4)}"
    probe.mkdir()
    probe.rmdir()


def _json_object(path: Path) -> dict[str, Any]:
    value = _read_json(path)
    return value if isinstance(value, dict) else {}


def _read_json(path: Path) -> Any:
    """Return the JSON value in a small regular file, None where there is none."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
