"""Let the disk fail while a checkpoint is written.

    python tests/campaign_disk.py [--moments 20]

A disk that somebody else fills at equally spaced moments of a save, one whose quota is used up (that error is injected
when a file is opened), a limit on the size of files, a disk that is too small from the start, one that becomes
read-only; each for saves that block and saves behind the training. Survived is where the older checkpoint is untouched,
nothing temporary is left, the reason and the size that is needed are told, and the next save on the healed disk
succeeds. Wants root, for a disk of its own in memory.

Rows go to tests/results/disk.jsonl, one per kind; a kind that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from campaign_rows import add_row, read_rows
from tiny_training import FACTS, ds_config, join_alone, tiny_engine, tiny_services

from bert_ds.training.checkpoints.checkpoint_folder import find_checkpoint
from bert_ds.training.checkpoints.checkpoint_saver import CheckpointPolicy, CheckpointSaver
from bert_ds.training.checkpoints.train_state import TrainState

RESULTS = Path(__file__).parent / "results/disk.jsonl"


class Fault:
    """What happens to the disk while a save opens its files; an audit hook cannot be taken away, so it is switched."""

    def __init__(self) -> None:
        self.act: Callable[[Path], None] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        path = str(args[0]) if event == "open" and args else ""
        if self.act is not None and "/.tmp-global_step" in path and path.endswith(".pt"):
            act, self.act = self.act, None
            act(Path(path))


class Disk:
    """One run on a small disk of its own."""

    def __init__(self, mount: Path, logs: Path, *, asynchronous: bool) -> None:
        self.run_dir = mount / "run"
        self.engine = tiny_engine(ds_config(2))
        self.log = tiny_services(logs, 0, 1).log
        policy = CheckpointPolicy(facts=FACTS, asynchronous=asynchronous)
        self.saver = CheckpointSaver(self.engine, self.run_dir, policy=policy, log=self.log)
        self.step = 0

    def save(self) -> tuple[bool, str]:
        """Save the next step and wait; return whether it succeeded and what was said."""
        self.step += 1
        # The log file may be as hard to write as the checkpoint: logging then complains on stderr and goes on.
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
            saved = self.saver.save(TrainState(step=self.step)) and self.saver.settle(True)
        return saved, said.getvalue()

    def survives(self, reason: str, heal: Callable[[], None]) -> bool:
        """Whether a save that must fail leaves everything in order, and the next one succeeds."""
        before = find_checkpoint(self.run_dir)
        saved, said = self.save()
        could_clean = "Read-only" not in reason
        left = could_clean and [path.name for path in (self.run_dir / "checkpoints").glob(".tmp*")]
        heal()
        same = find_checkpoint(self.run_dir) == before
        told = reason in said and "older ones are untouched" in said and " needs " in said
        after, _ = self.save()
        good = not saved and same and told and after and not left
        if not good:
            print("NOT SURVIVED", saved, same, left, after, said, file=sys.stderr)
        return good


def disk_faults(
    fault: Fault, mount: Path, *, size: int, moments: int
) -> Iterator[tuple[str, int, Iterator[tuple[str, Callable[[], None]]]]]:
    """Yield (name, number, faults): taking the next of the faults arms it and gives what is said and how to heal it."""
    filler = mount / "filler"

    def fill(left: int) -> None:
        free = shutil.disk_usage(mount).free
        filler.write_bytes(bytes(max(0, free - left)))

    def full_while_written() -> Iterator[tuple[str, Callable[[], None]]]:
        for moment in range(moments):
            left = round(0.9 * size * moment / moments)
            fault.act = lambda path, left=left: fill(left)
            yield "No space left on device", filler.unlink

    def over_quota() -> Iterator[tuple[str, Callable[[], None]]]:
        def refuse(path: Path) -> None:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))

        fault.act = refuse
        yield "Disk quota exceeded", lambda: None

    def limited_files() -> Iterator[tuple[str, Callable[[], None]]]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        for limit in (0, 1000, size // 4):
            fault.act = lambda path, limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            yield "File too large", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    def read_only() -> Iterator[tuple[str, Callable[[], None]]]:
        fault.act = lambda path: remount(mount, "ro")
        yield "Read-only file system", lambda: remount(mount, "rw")

    def too_small() -> Iterator[tuple[str, Callable[[], None]]]:
        fill(size)
        yield "bytes free, a checkpoint needs", filler.unlink

    yield "disk full while files are written", moments, full_while_written()
    yield "quota used up", 1, over_quota()
    yield "limit on the size of files", 3, limited_files()
    yield "disk full before the save", 1, too_small()
    yield "disk read-only", 1, read_only()


@contextlib.contextmanager
def small_disk(mount: Path) -> Iterator[None]:
    mount.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(mount)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def remount(mount: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(mount)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--work", type=Path, default=Path("runs/campaign-disk"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    join_alone()
    fault, mount = Fault(), args.work / "mount"
    done = {row["kind"] for row in read_rows(args.results)}
    for asynchronous, how in ((False, "blocking"), (True, "behind the training")):
        with small_disk(mount):
            disk = Disk(mount, args.work, asynchronous=asynchronous)
            assert disk.save()[0]
            size = sum(file.stat().st_size for file in find_checkpoint(disk.run_dir).iterdir())
            for kind, count, faults in disk_faults(fault, mount, size=size, moments=args.moments):
                if f"{kind}, {how}" not in done:
                    survived = sum(disk.survives(reason, heal) for reason, heal in faults)
                    add_row(args.results, {"kind": f"{kind}, {how}", "tried": count, "survived": survived})


if __name__ == "__main__":
    main()
