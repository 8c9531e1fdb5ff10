"""The machine and the libraries of a run, in its environment.json."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from bert_ds.basics.ranks import Ranks
from bert_ds.basics.whole_files import write_json
from bert_ds.configuration.reading.config_secrets import is_secret_name, is_secret_value
from bert_ds.folders.kept_files import keeping_files

CARRIED_KERNELS = "0.1.0"
"""Version of the package bert_kernels that bert-ds carries; the distribution bert-kernels brings the same files."""

_PACKAGES = (
    "bert-ds",
    "bert-kernels",
    "torch",
    "deepspeed",
    "triton",
    "transformers",
    "tokenizers",
    "numpy",
    "pydantic",
)
_ENVIRONMENT_NAMES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def write_environment(run_dir: Path, ranks: Ranks, *, devices: Sequence[str]) -> None:
    """Write environment.json: versions, commit and host; no argument list and no variable that could hold a secret."""
    names = [name for name in os.environ if name in _ENVIRONMENT_NAMES or name.startswith("SLURM_JOB_")]
    names = [name for name in names if not is_secret_name(name) and not is_secret_value(os.environ[name])]
    facts = {
        "format": 1,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hostname": platform.node(),
        "num_cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "devices": list(devices),
        "world_size": ranks.world_size,
        "versions": library_versions(),
        "commit": _commit(),
        "variables": {name: os.environ[name] for name in sorted(names)},
    }
    with keeping_files(run_dir, ["environment.json"]):
        write_json(run_dir / "environment.json", facts)


def library_versions() -> dict[str, str]:
    """Return the installed versions of the libraries a run depends on."""
    return dict(_library_versions())


def other_kernels() -> str | None:
    """Return a sentence where bert-kernels is installed beside bert-ds at another version, None where it is not.

    Both bring the files of bert_kernels, so those of the one that was installed last are on disk.
    """
    found = _version("bert-kernels")
    if found in (None, CARRIED_KERNELS):
        return None
    return (
        f"bert-kernels {found} is installed beside bert-ds, which carries {CARRIED_KERNELS}: one has overwritten the "
        "other's files; pip uninstall bert-kernels, then install bert-ds again"
    )


@cache
def _library_versions() -> list[tuple[str, str]]:
    return [(package, version) for package in _PACKAGES if (version := _version(package)) is not None]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _commit() -> str | None:
    """Return the commit of this source tree, with "+changes" where files differ; None outside a git tree."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain"])
        commit, changes = (
            subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changes else "")
