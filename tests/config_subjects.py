"""The files that campaigns break: every shipped recipe and DeepSpeed file, as shipped and with every default in it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from config_oracle import Subject

from bert_ds import check_run
from bert_ds.configuration.deepspeed_file.ds_agreement import OPTIMIZER_TYPES
from bert_ds.configuration.deepspeed_file.ds_config import load_pair, resolve_ds_config
from bert_ds.configuration.deepspeed_file.ds_keys import AUTO, default_of, known_settings, leaves
from bert_ds.configuration.deepspeed_file.ds_support import SWITCHED_OFF
from bert_ds.configuration.job_config import parse_job_config
from bert_ds.configuration.reading.config_files import raise_problems, read_config_file, shipped_file
from bert_ds.configuration.recipe.run_config import ConfigError, dump_run_config, load_run_config
from bert_ds.configuration.task.task_config import dump_task, load_task
from bert_ds.launch.slurm_job import sbatch_command

WORLD_SIZE = 2
RECIPE = shipped_file("recipes/bert_base_phase1.json")
DEEPSPEED = shipped_file("zero2.json")
USERS_OWN = ("data.fields.*", "data.rename_labels.*", "data.*.values.*", "prompt.label_words.*")
"""Sections of a task that are named after columns and labels of the user's files."""

JOB: dict[str, Any] = {
    "job_name": "bert",
    "nodes": 2,
    "gpus_per_node": 8,
    "cpus_per_task": 12,
    "memory_per_node": "200G",
    "time": "24:00:00",
    "partition": "gpu,big",
    "account": "nlp",
    "constraint": "h100&ib",
    "exclude": "n01,n02",
    "run": "/home/me/run.json",
    "deepspeed_config": "/home/me/ds.json",
    "run_dir": "/scratch/me/runs/a",
    "overrides": ["optimizer.lr=1e-4"],
}


def shipped_subjects() -> Iterator[Subject]:
    """Yield every shipped recipe and DeepSpeed file, and each again with every default written out."""
    yield from recipe_subjects()
    yield from deepspeed_subjects()


def recipe_subjects() -> Iterator[Subject]:
    """Yield every shipped recipe, and each again with every default written out."""
    for path in sorted(RECIPE.parent.glob("*.json")):
        yield recipe_subject(path.stem, _read(path))
        yield recipe_subject(f"{path.stem} in full", json.loads(dump_run_config(load_run_config(path))))


def deepspeed_subjects() -> Iterator[Subject]:
    """Yield every shipped DeepSpeed file, and each again with every setting written out."""
    for path in sorted(DEEPSPEED.parent.glob("zero*.json")):
        yield deepspeed_subject(path.stem, _read(path))
        run, ds = load_pair(RECIPE, path)
        yield deepspeed_subject(f"{path.stem} in full", resolve_ds_config(run, ds, WORLD_SIZE))


def other_subjects() -> Iterator[Subject]:
    """Yield the shipped fine-tuning tasks and a Slurm job, and each again with every default written out."""
    for path in sorted((DEEPSPEED.parent / "tasks").glob("*.json")):
        yield task_subject(path.stem, _read(path))
        yield task_subject(f"{path.stem} in full", json.loads(dump_task(load_task(path))))
    yield job_subject("job", JOB)
    yield job_subject("job in full", parse_job_config(JOB).model_dump(mode="json"))


def task_subject(name: str, data: dict[str, Any]) -> Subject:
    """Return a fine-tuning task."""
    return Subject(name, data, load_task, _ignored_by_task, free=USERS_OWN)


def job_subject(name: str, data: dict[str, Any]) -> Subject:
    """Return a Slurm job, whose values come from options and not from a file; messages name the option."""
    return Subject(name, data, _read_job, _ignored_by_job)


def recipe_subject(name: str, data: dict[str, Any]) -> Subject:
    """Return a recipe that is read beside a DeepSpeed file that is right."""
    return Subject(
        name, data, lambda file: _check_run(file, DEEPSPEED), lambda file: _ignored_by_recipe(file, file.parent)
    )


def deepspeed_subject(name: str, data: dict[str, Any]) -> Subject:
    """Return a DeepSpeed file that is read beside a recipe that is right."""
    return Subject(name, data, lambda file: _check_run(RECIPE, file), _ignored_by_deepspeed)


def deepspeed_refuses(settings: dict[str, Any]) -> str:
    """Return what DeepSpeed's own parser says against a configuration for one rank, or nothing."""
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _check_run(run: Path, ds: Path) -> int:
    """Run check_run.py's main in this process."""
    argv = ["check_run.py", "--run", str(run), "--deepspeed_config", str(ds), "--world_size", str(WORLD_SIZE)]
    with patch.object(sys, "argv", argv):
        return check_run.main()


def _ignored_by_recipe(file: Path, folder: Path) -> list[str]:
    resolved = json.loads(dump_run_config(load_run_config(file)))
    return [path for path, value in _flat(_read(file)) if not _in_recipe(path, value, resolved, folder)]


def _ignored_by_deepspeed(file: Path) -> list[str]:
    run, ds = load_pair(RECIPE, file)
    effective = resolve_ds_config(run, ds, WORLD_SIZE)
    recipe = json.loads(dump_run_config(run))
    ignored = [path for path, value in leaves(_read(file)) if not _in_deepspeed(path, value, effective, recipe)]
    try:
        alone = resolve_ds_config(run, ds, 1)
    except ConfigError:
        return ignored  # two ranks were asked for
    refused = deepspeed_refuses(alone)
    return [*ignored, *([f"DeepSpeed says {refused}"] if refused else [])]


def _ignored_by_task(file: Path) -> list[str]:
    resolved = json.loads(dump_task(load_task(file)))
    given = [(path, value) for path, value in _flat(_read(file)) if path != "$schema"]
    return [path for path, value in given if not _in_recipe(path, value, resolved, file.parent)]


def _read_job(file: Path) -> None:
    given = read_config_file(file)
    raise_problems(given, [])
    try:
        parse_job_config(given.data)
    except ConfigError as error:
        # "--nodes: ..." is what a file would call "FILE: nodes: ..."
        raise ConfigError("\n".join(f"{file}: {line.removeprefix('--')}" for line in str(error).splitlines())) from None


def _ignored_by_job(file: Path) -> list[str]:
    job = parse_job_config(_read(file))
    resolved = job.model_dump(mode="json")
    command = sbatch_command(job, Path("slurm/pretrain.sh"))
    broken = [word for word in command if not word.isprintable()]
    return [path for path, value in _flat(_read(file)) if not _in_recipe(path, value, resolved, file.parent)] + broken


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items or not value:
        yield path, value
    for key, inner in items:
        yield from _flat(inner, f"{path}.{key}" if path else str(key))


def _in_recipe(path: str, value: Any, resolved: Any, folder: Path) -> bool:
    for part in path.split("."):
        resolved = resolved[int(part)] if isinstance(resolved, list) else resolved.get(part, KeyError)
    if value == {} and isinstance(resolved, dict):
        return True  # a section of defaults
    return _equal(value, resolved) or (isinstance(value, str) and resolved == os.path.abspath(folder / value))


def _in_deepspeed(path: str, value: Any, effective: dict[str, Any], recipe: dict[str, Any]) -> bool:
    path = _first_names(path)
    if value is None or (value == "auto" and path in AUTO):
        return True
    if any(path == block or path.startswith(block + ".") for block in SWITCHED_OFF):
        return True  # refused unless the block says that it is switched off
    if path.startswith(("optimizer.", "scheduler.")):
        return _in_objects(path, value, recipe)
    found: Any = effective
    for part in path.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    if isinstance(value, str) and isinstance(found, str) and found.casefold() == value.casefold():
        return True
    return _equal(value, found) or (found is None and _equal(value, default_of(path)))


def _in_objects(path: str, value: Any, recipe: dict[str, Any]) -> bool:
    """Whether a value of the optimizer or scheduler block is the recipe's; both are handed over as objects."""
    if path == "optimizer.type":
        return OPTIMIZER_TYPES.get(value.lower(), value.lower()) == recipe["optimizer"]["type"]
    if path == "scheduler.type":
        return value.lower().startswith("warmup")
    return any(_equal(value, one) for one in (0.0, True, False, *(inner for _, inner in _flat(recipe))))


def _first_names(path: str) -> str:
    node: dict[str, Any] = {"keys": known_settings()["keys"]}
    parts = []
    for part in path.split("."):
        known = node.get("keys", {}).get(part, {})
        parts.append(known["name"] if known.get("kind") == "same_as" else part)
        node = node.get("keys", {}).get(parts[-1], {})
    return ".".join(parts)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
