"""Kill the conversion of a checkpoint for another number of ranks, at file operations spread over all of it.

    python tests/campaign_conversion.py [--kills 20]

For ZeRO 1, 2 and 3 a run of two ranks is saved. A child process converts the checkpoint and is killed by SIGKILL before
its k-th file operation; a second one then converts what is there. Survived is where the second gives the bytes of a
conversion that was left alone and the source is untouched. Appends a row per stage to tests/results/kills.jsonl.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
from pathlib import Path

import torch
from campaign_kills import RESULTS, Case, finish
from campaign_rows import add_row
from killed_saves import kill_at_operation

from bert_ds.training.checkpoints.checkpoint_folder import file_sha256, verify_checkpoint
from bert_ds.training.checkpoints.universal_checkpoint import convert


def in_child(path: Path, *, kill_at: int | None = None) -> int:
    """Convert in a process of its own; return its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            if kill_at is not None:
                kill_at_operation(path.parent, kill_at)
            convert(path)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def converted(path: Path) -> dict[str, str]:
    """Return the files of the finished conversion, and remove it."""
    [folder] = path.parent.glob(".tmp-universal-*")
    files = {str(file.relative_to(folder)): file_sha256(file) for file in folder.rglob("*.pt")}
    shutil.rmtree(folder)
    return files


def operations_of(path: Path) -> int:
    """Return how many file operations a conversion has, from where kills no longer hit."""
    number = 64
    while in_child(path, kill_at=number) == -signal.SIGKILL:
        number *= 2
    converted(path)
    return number


def run_stage(stage: int, work: Path, *, num_kills: int) -> dict[str, object]:
    case = Case(stage, ranks=2)
    finish(case, work / case.name, steps=2)
    path = work / case.name / "checkpoints/global_step2"
    assert in_child(path) == 0
    wanted, operations = converted(path), operations_of(path)
    kills = survived = 0
    for k in range(num_kills):
        kills += in_child(path, kill_at=operations * k // (2 * num_kills)) == -signal.SIGKILL
        assert in_child(path) == 0
        verify_checkpoint(path)
        survived += converted(path) == wanted
        for left in path.parent.glob(".tmp-*"):  # the next save removes them
            shutil.rmtree(left)
    return {"kind": "conversion", "case": f"zero{stage}", "tried": num_kills, "kills": kills, "survived": survived}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--work", type=Path, default=Path("runs/campaign-conversion"))
    args = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    shutil.rmtree(args.work, ignore_errors=True)
    for stage in (1, 2, 3):
        add_row(RESULTS, run_stage(stage, args.work, num_kills=args.kills))


if __name__ == "__main__":
    main()
