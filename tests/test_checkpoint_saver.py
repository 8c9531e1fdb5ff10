"""Saves behind the training, and weights that must not be saved."""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from ranks_harness import run_ranks
from tiny_training import FACTS, ds_config, join_alone, run_tiny, step_batches, tiny_engine, tiny_loop, tiny_services

from bert_ds.basics.ranks import CheckpointError, Ranks
from bert_ds.reporting.run_log import read_metrics
from bert_ds.training.checkpoints import checkpoint_saver
from bert_ds.training.checkpoints.checkpoint_folder import find_checkpoint, verify_checkpoint
from bert_ds.training.checkpoints.checkpoint_loader import resume
from bert_ds.training.checkpoints.checkpoint_saver import CheckpointPolicy, CheckpointSaver
from bert_ds.training.checkpoints.fp32_weights import load_fp32_state_dict
from bert_ds.training.checkpoints.train_state import TrainState
from bert_ds.training.loop.train_loop import train

ALONE = Ranks(0, 0, 1)
HELD = threading.Event()


def hold_writes_of_checkpoint_threads(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook: let a thread that saves wait before it opens a file, while HELD is set."""
    if HELD.is_set() and event == "open" and threading.current_thread().name == "checkpoint":
        while HELD.is_set():
            threading.Event().wait(0.01)


def both_ways_on_two_ranks(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Train six steps saving at every second one, at once and behind the training; then a rank cannot write."""
    ranks, found = Ranks(rank, rank, world_size), {}
    for stage in (0, 2, 3):
        for how in ("blocking", "asynchronous"):
            run_dir = Path(folder) / f"{stage}-{how}"
            config = ds_config(stage, world_size=world_size)
            run_tiny(run_dir, ranks, config=config, steps=6, asynchronous=how == "asynchronous")
            found[f"{stage}-{how}"] = verify_checkpoint(run_dir / "checkpoints/global_step4")["files"]
    return found | {"full": save_behind_training_on_a_full_disk(Path(folder) / "full", ranks)}


def save_behind_training_on_a_full_disk(run_dir: Path, ranks: Ranks) -> list[Any]:
    """A save that succeeds, one that rank 1 cannot write, one that succeeds: what settle says and what is left."""
    engine = tiny_engine(ds_config(2, world_size=ranks.world_size))
    log = tiny_services(run_dir, ranks.rank, ranks.world_size).log
    saver = CheckpointSaver(engine, run_dir, policy=CheckpointPolicy(asynchronous=True), log=log)
    answers: list[Any] = []
    for step, limit in ((1, resource.RLIM_INFINITY), (2, 1000), (3, resource.RLIM_INFINITY)):
        if ranks.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        begun = saver.save(TrainState(step=step))
        answers.append((begun, saver.settle(True), saver.settle(False), find_checkpoint(run_dir).name))
    return answers


@pytest.fixture(scope="module")
def both_ways(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("both")
    return folder, run_ranks(both_ways_on_two_ranks, 2, str(folder), timeout_s=300.0)[0]


@pytest.mark.parametrize("stage", [0, 2])
def test_a_save_behind_the_training_writes_the_bytes_of_one_that_blocks(stage: int, both_ways: Any) -> None:
    files = both_ways[1]
    assert files[f"{stage}-asynchronous"] == files[f"{stage}-blocking"]
    assert len(files[f"{stage}-blocking"]) >= 1


def test_a_save_behind_the_training_holds_the_weights_of_one_that_blocks_at_stage_3(both_ways: Any) -> None:
    # Not byte by byte: DeepSpeed leaves the padding of its shards uninitialised.
    behind, blocking = (
        load_fp32_state_dict(both_ways[0] / f"3-{how}/checkpoints/global_step4") for how in ("asynchronous", "blocking")
    )
    assert behind.keys() == blocking.keys()
    assert all(torch.equal(behind[name], blocking[name]) for name in behind)


def test_a_failed_write_behind_the_training_is_told_and_leaves_the_older_checkpoint(both_ways: Any) -> None:
    folder, found = both_ways
    assert found["full"] == [
        (True, True, True, "global_step1"),
        (True, False, False, "global_step1"),
        (True, True, True, "global_step3"),
    ]
    log = (folder / "full/logs/rank_0.log").read_text()
    assert "checkpoint global_step2 was not written, older ones are untouched: rank 1: zero_pp_rank_1" in log
    assert sorted(path.name for path in (folder / "full/checkpoints").iterdir()) == [
        "global_step1",
        "global_step3",
        "latest",
    ]


def test_the_time_on_the_step_path_and_behind_it_are_recorded(both_ways: Any) -> None:
    for how, behind in (("blocking", 0), ("asynchronous", 1)):
        rows = read_metrics(both_ways[0] / f"2-{how}/metrics.jsonl", "checkpoint")
        assert [row["step"] for row in rows] == [2, 4, 6]
        assert all(row["seconds"] > 0 and (row["background_s"] > 0) == behind for row in rows)


def test_training_goes_on_while_a_checkpoint_is_written_and_the_end_waits_for_it(tmp_path: Path) -> None:
    join_alone()
    sys.addaudithook(hold_writes_of_checkpoint_threads)
    engine, services = tiny_engine(ds_config(2)), tiny_services(tmp_path, 0, 1)
    policy = CheckpointPolicy(facts=FACTS, asynchronous=True)
    saver = CheckpointSaver(engine, tmp_path, policy=policy, log=services.log)
    seen = {}

    def batches() -> Iterator[Any]:
        for step, micro_batches in enumerate(step_batches(0, 0, 1), start=1):
            if step == 2:
                HELD.set()
            seen[step] = find_checkpoint(tmp_path)
            if step == 4:
                HELD.clear()
            yield micro_batches

    services = replace(services, save=saver.save, settle=saver.settle)
    loop = tiny_loop(5, checkpoint_every_steps=2)
    try:
        train(engine, batches(), state=TrainState(), loop=loop, services=services)
    finally:
        HELD.clear()
    assert (seen[3], seen[4]) == (None, None)
    names = {path.name for path in (tmp_path / "checkpoints").glob("global_step*")}
    assert names == {"global_step4", "global_step5"}
    assert verify_checkpoint(tmp_path / "checkpoints/global_step5")["step"] == 5


def test_where_memory_is_short_a_save_blocks_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    join_alone()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    engine, services = tiny_engine(ds_config(2)), tiny_services(tmp_path, 0, 1)
    saver = CheckpointSaver(engine, tmp_path, policy=CheckpointPolicy(asynchronous=True), log=services.log)
    assert saver.save(TrainState(step=1))
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoints/global_step1"
    assert "bytes of host memory, 1,000 are available" in capsys.readouterr().out


def test_the_first_rank_of_a_machine_needs_room_for_the_model_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join_alone()
    engine = tiny_engine(ds_config(2))
    needed = checkpoint_saver.checkpoint_bytes(engine)
    monkeypatch.setattr(checkpoint_saver, "gather_json", lambda machine: ["a", "a", "b"])
    log = tiny_services(tmp_path, 0, 1).log
    saver = CheckpointSaver(engine, tmp_path, policy=CheckpointPolicy(asynchronous=True), log=log)
    for share, fits in ((0.9, False), (1.1, True)):
        memory = SimpleNamespace(available=share * needed / 0.8)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        assert saver._fits_into_memory() == fits


def test_a_checkpoint_is_planned_with_all_that_it_holds_and_wants_room_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join_alone()
    fp32, bf16 = torch.zeros(1000), torch.zeros(1000, dtype=torch.bfloat16)
    for stage, weight, of_a_weight in ((0, fp32, 12), (0, bf16, 14), (2, fp32, 16), (2, bf16, 14), (3, bf16, 12)):
        module = SimpleNamespace(parameters=lambda weight=weight: [weight])
        engine: Any = SimpleNamespace(module=module, zero_optimization_stage=lambda stage=stage: stage)
        assert checkpoint_saver.checkpoint_bytes(engine) == 1000 * of_a_weight + (2 << 20)
    for free, fits in ((1099, False), (1100, True)):
        monkeypatch.setattr(checkpoint_saver.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with (
            nullcontext() if fits else pytest.raises(CheckpointError, match="1,099 bytes free, a checkpoint needs 1,1")
        ):
            checkpoint_saver._start(tmp_path / "checkpoints", "global_step1", needed_bytes=1000)


def test_a_damaged_checkpoint_that_is_passed_over_keeps_its_name(tmp_path: Path) -> None:
    join_alone()
    engine, log = tiny_engine(ds_config(0)), tiny_services(tmp_path, 0, 1).log
    saver = CheckpointSaver(engine, tmp_path, policy=CheckpointPolicy(facts=FACTS), log=log)
    assert saver.save(TrainState(step=1)) and saver.save(TrainState(step=2))
    (manifest := tmp_path / "checkpoints/global_step2/manifest.json").write_text("{")
    state = resume(engine, tmp_path, name=None, facts=FACTS, log=log)
    assert state is not None and state.step == 1 and manifest.exists()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_weights_that_are_not_finite_are_never_published(
    stage: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    join_alone()
    engine, services = tiny_engine(ds_config(stage)), tiny_services(tmp_path, 0, 1)
    saver = CheckpointSaver(engine, tmp_path, policy=CheckpointPolicy(), log=services.log)
    assert saver.save(TrainState(step=1))
    weight = dict(engine.module.named_parameters())["pair.weight"]
    getattr(weight, "ds_tensor", weight).data.view(-1)[3] = float("inf")
    assert not saver.save(TrainState(step=2))
    assert "global_step2 was not written, older ones are untouched: rank 0: pair.weight is not finite" in (
        capsys.readouterr().out
    )
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["global_step1", "latest"]


def test_a_last_save_that_fails_behind_the_training_fails_the_launch(tmp_path: Path) -> None:
    services = tiny_services(tmp_path, 0, 1, save=lambda state: True, settle=lambda wait: not wait)
    join_alone()
    with pytest.raises(CheckpointError, match="the last checkpoint, at step 2, could not be written"):
        train(
            tiny_engine(ds_config(2)), step_batches(0, 0, 1), state=TrainState(), loop=tiny_loop(2), services=services
        )
