"""Damage checkpoints in every way that disks do: what is found, what is named, which checkpoint is taken instead.

    python tests/campaign_damage.py [--positions 500]

A run of two ranks under ZeRO-2 has the checkpoints of steps 2 and 4. The newest is damaged in a fresh copy each time.
Rows go to tests/results/damage.jsonl, one per kind; a kind that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from campaign_rows import add_row, read_rows
from ranks_harness import run_ranks
from tiny_training import ds_config, run_tiny

from bert_ds.basics.ranks import CheckpointError, Ranks
from bert_ds.training.checkpoints.checkpoint_folder import MANIFEST, find_checkpoint

RESULTS = Path(__file__).parent / "results/damage.jsonl"
MODEL = "mp_rank_00_model_states.pt"
OPTIMIZER = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
FILES = (MANIFEST, MODEL, OPTIMIZER.format(0), OPTIMIZER.format(1))

Damage = Callable[[Path, random.Random], str]
"""Damages a checkpoint and returns the name of the file that a message must have."""


def train_two_ranks(rank: int, world_size: int, folder: str) -> None:
    """Worker: two runs of four steps, saved at the second and the fourth."""
    config = ds_config(2, world_size=world_size)
    for name in ("run", "other"):
        run_tiny(Path(folder) / name, Ranks(rank, rank, world_size), config=config, steps=4 if name == "run" else 2)


def flip(name: str) -> Damage:
    def damage(path: Path, draw: random.Random) -> str:
        content = bytearray((path / name).read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (path / name).write_bytes(content)
        return name

    return damage


def cut(name: str) -> Damage:
    def damage(path: Path, draw: random.Random) -> str:
        os.truncate(path / name, draw.randrange((path / name).stat().st_size))
        return name

    return damage


def zero_tail(name: str) -> Damage:
    def damage(path: Path, draw: random.Random) -> str:
        content = (path / name).read_bytes()
        kept = draw.randrange(len(content.rstrip(b"\0")))
        (path / name).write_bytes(content[:kept] + bytes(len(content) - kept))
        return name

    return damage


def missing(path: Path, draw: random.Random) -> str:
    name = draw.choice(FILES)
    (path / name).unlink()
    return name


def extra(path: Path, draw: random.Random) -> str:
    name = f"zero_pp_rank_{draw.randrange(2, 10**6)}_mp_rank_00_optim_states.pt"
    (path / name).write_bytes(draw.randbytes(100))
    return name


def swapped_ranks(path: Path, draw: random.Random) -> str:
    first, second = (path / OPTIMIZER.format(rank) for rank in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    return "zero_pp_rank_"


def of_another_run(path: Path, draw: random.Random) -> str:
    name = draw.choice(FILES)
    shutil.copy(path.parents[2] / "other/checkpoints/global_step2" / name, path / name)
    return name if name != MANIFEST else ""


def of_an_older_step(path: Path, draw: random.Random) -> str:
    """A stale manifest, or a file of the checkpoint before."""
    name = draw.choice(FILES)
    shutil.copy(path.parent / "global_step2" / name, path / name)
    return name if name != MANIFEST else ""


def a_link(path: Path, draw: random.Random) -> str:
    name = draw.choice(FILES[1:])
    (path / name).rename(path.parent / "elsewhere")
    (path / name).symlink_to(path.parent / "elsewhere")
    return name


KINDS: dict[str, tuple[Damage, float]] = {
    **{f"one bit flipped in {name}": (flip(name), 1.0) for name in FILES},
    **{f"{name} cut": (cut(name), 0.2) for name in FILES},
    **{f"zeros at the end of {name}": (zero_tail(name), 0.2) for name in FILES},
    "a file missing": (missing, 0.1),
    "a file too many": (extra, 0.1),
    "files of two ranks swapped": (swapped_ranks, 0.02),
    "a file of another run": (of_another_run, 0.1),
    "a file or the manifest of an older step": (of_an_older_step, 0.1),
    "a link in place of a file": (a_link, 0.1),
}
"""Name -> what is done, and how often as a part of --positions."""

POINTERS = (b"", b"garbage\n", b"../../other\n", b"global_step2\n", b"global_step99\n", b"\0" * 12, b"\xff\xfe")


def count_damage(whole: Path, damage: Damage, *, tries: int) -> dict[str, int]:
    """Damage a fresh copy again and again."""
    counts = {"tried": tries, "found": 0, "file_named": 0, "older_taken": 0}
    draw = random.Random(str(damage))
    scratch = whole / "scratch"
    for _ in range(tries):
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(whole / "run/checkpoints", scratch / "checkpoints")
        name = damage(scratch / "checkpoints/global_step4", draw)
        said: list[str] = []
        with contextlib.suppress(CheckpointError):
            found = find_checkpoint(scratch, warn=said.append)
            counts["older_taken"] += found is not None and found.name == "global_step2"
        counts["found"] += bool(said)
        counts["file_named"] += bool(said) and name in said[0]
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=500)
    parser.add_argument("--work", type=Path, default=Path("runs/campaign-damage"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    run_ranks(train_two_ranks, 2, str(args.work), timeout_s=300)
    done = {row["kind"] for row in read_rows(args.results)}
    for kind, (damage, part) in KINDS.items():
        if kind not in done:
            tries = max(1, round(part * args.positions))
            add_row(args.results, {"kind": kind, **count_damage(args.work, damage, tries=tries)})
    right = 0
    for pointer in POINTERS:
        (args.work / "run/checkpoints/latest").write_bytes(pointer)
        found = find_checkpoint(args.work / "run")
        right += found is not None and found.name == "global_step4"
    add_row(
        args.results, {"kind": "latest empty, garbage, a path or stale", "tried": len(POINTERS), "newest_taken": right}
    )
    for path in (args.work / "run/checkpoints").glob("global_step*"):
        (path / MODEL).write_bytes(b"")
    try:
        find_checkpoint(args.work / "run", warn=lambda text: None)
        refused = 0
    except CheckpointError:
        refused = 1
    add_row(args.results, {"kind": "every checkpoint damaged", "tried": 1, "refused": refused})


if __name__ == "__main__":
    main()
