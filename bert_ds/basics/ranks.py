"""Facts about this process among its ranks, and the exit codes a launcher can rely on. Standard library only."""

from __future__ import annotations

import os
import platform
from typing import NamedTuple

EXIT_DONE = 0
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_CHECKPOINT = 4
EXIT_DIVERGED = 5
EXIT_RUN_AGAIN = 75
PERMANENT_EXITS = (EXIT_CONFIG, EXIT_DATA, EXIT_CHECKPOINT, EXIT_DIVERGED)
"""Exit codes that another launch would meet again."""

LAUNCHER_PATIENCE_S = 30
"""DeepSpeed's launcher kills its ranks so long after SIGTERM or SIGINT; `bert-ds` and Slurm's scripts wait."""


class DataError(ValueError):
    """Input text, shards or tokenizer are unusable; the message names the file and what is wanted."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or trusted; the message names it."""


class DivergedError(RuntimeError):
    """The loss or the gradients are no longer finite; the message says since which step."""


class LauncherError(ValueError):
    """The launcher's variables do not say which rank this is; the message names them."""


class Ranks(NamedTuple):
    """Place of this process in the job."""

    rank: int
    local_rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def read_ranks(environ: dict[str, str] | None = None) -> Ranks:
    """Read rank, local rank and world size from a launcher's variables.

    The DeepSpeed launcher and torchrun set RANK, LOCAL_RANK and WORLD_SIZE; under a bare `srun` the SLURM_* ones are
    taken. With neither there is one rank.

    Raises:
        LauncherError: only some of the variables are set, or one is not a whole number in range.
    """
    env = dict(os.environ) if environ is None else environ
    for names in (
        ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    ):
        if names[0] not in env:
            continue
        missing = [name for name in names if name not in env]
        if missing:
            raise LauncherError(f"{names[0]} is set but {', '.join(missing)} is not: start it with one launcher")
        rank, local_rank, world_size = (_whole_number(env, name) for name in names)
        if not 0 <= rank < world_size:
            raise LauncherError(f"{names[0]}={rank} is outside 0..{world_size - 1} ({names[2]}={world_size})")
        return Ranks(rank, local_rank, world_size)
    return Ranks(0, 0, 1)


def node_name() -> str:
    """Return the name of this machine, Slurm's where there is one."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def _whole_number(env: dict[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise LauncherError(f"{name}={env[name]!r} is not a whole number") from None
