"""How each rank of a launch ended, where a launcher can read it.

A launcher's own exit code does not tell: `srun --kill-on-bad-exit` answers with that of a rank it killed itself. So a
rank that ends in an orderly way leaves a record; one that was killed leaves none.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import NamedTuple

from bert_ds.basics.input_gate import read_json
from bert_ds.basics.whole_files import write_text

VARIABLE = "BERT_DS_EXITS"
"""Environment variable: the folder that holds the records; the job scripts set it."""


class ExitRecord(NamedTuple):
    """The end of one rank."""

    code: int
    message: str
    """The error; beside exit code 75, what hangs. Empty where a rank did as it was asked."""


def record_exit(code: int, message: str = "") -> None:
    """Write this rank's record if a job script asked for it; a disk that is full does not change how a rank ends."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
    temporary, path = Path(folder, f".rank_{rank}"), Path(folder, f"rank_{rank}.json")
    with contextlib.suppress(OSError):
        write_text(path, json.dumps({"code": code, "message": message}), temporary=temporary, synced=False)


def read_exits(folder: Path) -> dict[int, ExitRecord]:
    """Return rank -> record, of the ranks that left one."""
    found = {}
    for path in folder.glob("rank_*.json"):
        with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
            content = read_json(path)
            rank = int(path.stem.removeprefix("rank_"))
            found[rank] = ExitRecord(int(content["code"]), str(content["message"]))
    return dict(sorted(found.items()))
