"""The folder of a checkpoint: damage, which one is taken, which are deleted. No engine, no ranks."""

from __future__ import annotations

import hashlib
import random
import shutil
from pathlib import Path

import pytest

from bert_ds.basics.ranks import CheckpointError
from bert_ds.training.checkpoints.checkpoint_folder import (
    abandon_newer,
    candidates,
    find_checkpoint,
    point_to,
    rotate,
    verify_checkpoint,
    write_manifest,
)


def fake_checkpoint(run_dir: Path, step: int) -> Path:
    """A whole checkpoint of two files of noise."""
    folder = run_dir / f"checkpoints/global_step{step}"
    folder.mkdir(parents=True)
    files = {}
    for name in ("model.pt", "optimizer.pt"):
        content = random.Random(f"{step}{name}").randbytes(700)
        (folder / name).write_bytes(content)
        files[name] = {"bytes": 700, "sha256": hashlib.sha256(content).hexdigest()}
    write_manifest(folder, {"format": 1, "step": step, "files": files, "world_size": 2})
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 2 and 4."""
    for step in (2, 4):
        point_to(fake_checkpoint(tmp_path, step))
    return tmp_path


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints/global_step4"


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_a_folder_that_never_saved_has_no_checkpoint(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None


def test_every_flipped_bit_of_every_file_is_found(run_dir: Path) -> None:
    chance = random.Random(1)
    files = sorted(newest(run_dir).iterdir())
    assert len(files) == 3
    for path in files:
        content = path.read_bytes()
        positions = range(len(content)) if path.name == "manifest.json" else chance.sample(range(len(content)), 100)
        for position in positions:
            flip(path, position, chance.randrange(8))
            with pytest.raises(CheckpointError):
                verify_checkpoint(newest(run_dir))
            path.write_bytes(content)
    assert verify_checkpoint(newest(run_dir))["step"] == 4


@pytest.mark.parametrize("damage", ["cut", "missing", "empty", "foreign", "zero tail", "no manifest", "swapped"])
def test_damage_is_named_and_the_checkpoint_before_it_is_taken(run_dir: Path, damage: str) -> None:
    path = newest(run_dir) / "optimizer.pt"
    content = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(content[:-7])
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "foreign":
            path = newest(run_dir) / "model_1.pt"
            path.write_bytes(b"x")
        case "zero tail":
            path.write_bytes(content[:-64] + bytes(64))
        case "no manifest":
            path = newest(run_dir) / "manifest.json"
            path.unlink()
        case "swapped":
            shutil.copy(run_dir / "checkpoints/global_step2" / path.name, path)
    told: list[str] = []
    assert find_checkpoint(run_dir, warn=told.append) == run_dir / "checkpoints/global_step2"
    assert len(told) == 1
    assert str(path) in told[0]


def test_a_named_checkpoint_that_is_damaged_is_an_error_and_no_other_is_tried(run_dir: Path) -> None:
    flip(newest(run_dir) / "model.pt", 500, 3)
    with pytest.raises(CheckpointError, match=r"model\.pt is damaged"):
        find_checkpoint(run_dir, "global_step4")


def test_with_every_checkpoint_damaged_nothing_starts_from_scratch(run_dir: Path) -> None:
    for step in (2, 4):
        (run_dir / f"checkpoints/global_step{step}/manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*global_step4.*global_step2"):
        find_checkpoint(run_dir, warn=lambda message: None)


def test_a_pointer_without_a_checkpoint_is_an_error(run_dir: Path) -> None:
    for step in (2, 4):
        shutil.rmtree(run_dir / f"checkpoints/global_step{step}")
    with pytest.raises(CheckpointError, match="latest exists but no checkpoint does"):
        find_checkpoint(run_dir)


@pytest.mark.parametrize("pointer", ["", "global_step2", "../global_step2", "/etc", "global_step9", "\0\xff"])
def test_what_the_pointer_says_does_not_matter(run_dir: Path, pointer: str) -> None:
    (run_dir / "checkpoints/latest").write_bytes(pointer.encode("latin-1"))
    assert find_checkpoint(run_dir) == newest(run_dir)


@pytest.mark.parametrize("name", ["../saved", "global_step4/..", "latest", "global_step4\n"])
def test_a_name_that_is_not_a_checkpoints_is_refused(run_dir: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="is not the name of a checkpoint"):
        find_checkpoint(run_dir, name)


def steps_in(run_dir: Path) -> list[int]:
    return sorted(int(path.name[11:]) for path in (run_dir / "checkpoints").glob("global_step*"))


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(1, None, [50]), (2, None, [40, 50]), (2, 20, [20, 40, 50]), (9, None, [10, 20, 30, 40, 50])],
)
def test_rotation_keeps_the_last_and_every_nth(
    tmp_path: Path, keep_last: int, keep_every: int | None, left: list[int]
) -> None:
    for step in (10, 20, 30, 40, 50):
        newest = fake_checkpoint(tmp_path, step)
    rotate(tmp_path, newest, keep_last=keep_last, keep_every_steps=keep_every)
    assert steps_in(tmp_path) == left


def test_rotation_keeps_the_steps_it_is_told_to(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        newest = fake_checkpoint(tmp_path, step)
    rotate(tmp_path, newest, keep_last=1, keep_every_steps=None, keep_steps=frozenset({20}))
    assert steps_in(tmp_path) == [20, 40]


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        fake_checkpoint(tmp_path, step)
    (tmp_path / "checkpoints/global_step20/manifest.json").unlink()
    rotate(tmp_path, tmp_path / "checkpoints/global_step30", keep_last=2, keep_every_steps=None)
    assert steps_in(tmp_path) == [10, 30]


def test_rotation_leaves_checkpoints_of_later_steps_alone(tmp_path: Path) -> None:
    for step in (10, 20, 90):
        fake_checkpoint(tmp_path, step)
    rotate(tmp_path, tmp_path / "checkpoints/global_step20", keep_last=1, keep_every_steps=None)
    assert steps_in(tmp_path) == [20, 90]


def test_steps_are_compared_as_numbers_and_not_as_text(tmp_path: Path) -> None:
    for step in (998, 999, 1000):
        newest = fake_checkpoint(tmp_path, step)
    assert [path.name[11:] for path in candidates(tmp_path)] == ["1000", "999", "998"]
    assert find_checkpoint(tmp_path) == newest
    rotate(tmp_path, newest, keep_last=2, keep_every_steps=None)
    assert steps_in(tmp_path) == [999, 1000]
    (abandoned,) = abandon_newer(newest.with_name("global_step999"))
    assert abandoned.name.startswith("global_step1000.abandoned-")
    assert (tmp_path / "checkpoints/latest").read_text() == "global_step999\n"
