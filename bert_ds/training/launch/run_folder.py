"""Entering a run folder: who may write into it, what describes the run in it, and proof that all ranks see the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from bert_ds.basics.input_gate import file_sha256
from bert_ds.basics.ranks import CheckpointError, DataError
from bert_ds.basics.whole_files import write_text
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.folders.kept_files import keeping_files
from bert_ds.folders.output_folders import claim_run_folder, open_run_folder
from bert_ds.folders.replaced_folders import claim_export
from bert_ds.training.agreement import gather_json, on_main_rank
from bert_ds.training.checkpoints.checkpoint_folder import candidates
from bert_ds.training.launch.restart import is_done
from bert_ds.training.launch.run_lock import lock_run_folder

Resume = Literal["never", "auto", "must"]

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")
"""What a tokenizer is saved as."""


def enter_run_folder(run_dir: Path, descriptions: Mapping[str, str], *, resume: Resume) -> None:
    """Make the run folder and write what describes a new run into it; a collective.

    Where there are checkpoints, what describes them stays until `describe_run`, when they are known to fit.

    Args:
        run_dir: the run folder.
        descriptions: file name to text.
        resume: "never" refuses a folder that holds checkpoints, "must" one that holds none.

    Raises:
        ConfigError: the folder is somebody else's, cannot be made or written, another launch is in it, or it does not
            fit `resume`.
        DataError: a rank does not see the folder that rank 0 wrote.
    """
    on_main_rank(lambda: _enter(run_dir, descriptions, resume=resume))
    prove_same_files([run_dir / name for name in descriptions])


def describe_run(run_dir: Path, descriptions: Mapping[str, str]) -> None:
    """Write what describes a run that goes on from a checkpoint; a collective. ConfigError where that fails."""
    on_main_rank(lambda: _describe(run_dir, descriptions))


def write_tokenizer(run_dir: Path, save: Callable[[Path], None]) -> None:
    """Save the tokenizer of a run with `save`, on one rank; what checkpoints were trained with stays as it is."""
    folder = run_dir / "tokenizer"
    if not (candidates(run_dir) and folder.is_dir()):
        with keeping_files(run_dir, (f"tokenizer/{name}" for name in _TOKENIZER_FILES)):
            save(folder)


def refuse_foreign_folders(run_dirs: Sequence[Path], *, export: str | None = None) -> None:
    """Raise ConfigError on every rank unless all of these runs may write into their folders; a collective.

    Nothing is changed.

    Args:
        run_dirs: folders that will be entered.
        export: name of the folder in each of them that the run ends with.
    """

    def claim_all() -> None:
        for run_dir in run_dirs:
            claim_run_folder(run_dir)
            if export is not None:
                claim_export(run_dir / export)

    on_main_rank(claim_all)


def prove_same_files(paths: Sequence[Path]) -> None:
    """Check that every rank reads the same bytes from these files; a collective.

    Raises:
        DataError: on every rank, naming the first rank and file that differ from rank 0's.
    """
    seen = gather_json([_sha256(path) for path in paths])
    for rank, hashes in enumerate(seen):
        for path, found, wanted in zip(paths, hashes, seen[0], strict=True):
            if found != wanted:
                what = "does not see" if found is None else "reads other bytes from"
                raise DataError(f"rank {rank} {what} {path}, unlike rank 0: wanted one folder shared by all nodes")


def _enter(run_dir: Path, descriptions: Mapping[str, str], *, resume: Resume) -> None:
    try:
        open_run_folder(run_dir)
        lock_run_folder(run_dir)
    except OSError as error:
        raise ConfigError(f"--run_dir {run_dir} cannot be written: {error}") from None
    found = candidates(run_dir)
    if found and resume == "never":
        raise ConfigError(
            f"--run_dir {run_dir} holds {len(found)} checkpoints of an earlier run: --resume auto continues it, or "
            "choose another folder"
        )
    if not found and resume == "must":
        raise CheckpointError(f"--resume must: {run_dir} holds no checkpoint")
    if not found and is_done(run_dir):
        raise CheckpointError(f"{run_dir} is marked DONE but holds no checkpoint: choose another --run_dir")
    if not found:
        _describe(run_dir, descriptions)


def _describe(run_dir: Path, descriptions: Mapping[str, str]) -> None:
    try:
        with keeping_files(run_dir, descriptions):
            for name, content in descriptions.items():
                write_text(run_dir / name, content)
    except OSError as error:
        raise ConfigError(f"--run_dir {run_dir} cannot be written: {error}") from None


def _sha256(path: Path) -> str | None:
    try:
        return file_sha256(path)
    except (OSError, ValueError):
        return None
