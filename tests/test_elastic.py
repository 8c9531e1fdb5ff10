"""A run saved on some ranks continues on another number of them: same losses, same batches, and no pickled code run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks_harness import run_ranks
from tiny_training import (
    FACTS,
    TinyModel,
    ds_config,
    full_weights,
    join_alone,
    step_batches,
    tiny_loop,
    tiny_services,
)

from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.recipe.optimizer_config import (
    AdamWConfig,
    LambConfig,
    LionConfig,
    MuonConfig,
    StableAdamWConfig,
)
from bert_ds.reporting.run_log import read_metrics
from bert_ds.training.checkpoints.checkpoint_folder import file_sha256, parse_manifest, write_manifest
from bert_ds.training.checkpoints.checkpoint_loader import CheckpointPolicy, resume, save_checkpoint
from bert_ds.training.checkpoints.train_state import TrainState
from bert_ds.training.checkpoints.universal_checkpoint import convert, weights_only_forced
from bert_ds.training.engine import make_engine
from bert_ds.training.loop.train_loop import train
from bert_ds.training.optimizers.factory import make_optimizer
from bert_ds.training.optimizers.param_groups import TensorFacts

CONFIGS = {
    **{"lamb": LambConfig, "adamw": AdamWConfig, "stableadamw": StableAdamWConfig},
    **{"lion": LionConfig, "muon": MuonConfig},
}


class Kind(NamedTuple):
    """What is trained how; `parts` micro-batches per step over all ranks."""

    stage: int
    optimizer: str = "lamb"
    precision: str = "fp32"
    zero: tuple[tuple[str, Any], ...] = ()
    parts: int = 4

    def __str__(self) -> str:
        return "-".join([f"stage{self.stage}", self.optimizer, self.precision, *(key for key, _ in self.zero)])


KINDS = [
    *[Kind(stage, optimizer) for stage, optimizer in ((1, "adamw"), (1, "lamb"), (2, "lamb"), (3, "lamb"))],
    Kind(0),
    Kind(0, "adamw", "bf16"),
    Kind(1, "adamw", "bf16"),
    Kind(3, "stableadamw", "bf16"),
    Kind(0, "muon"),
    Kind(2, "muon", "bf16"),
    Kind(3, "adamw", zero=(("sub_group_size", 20),)),
]


def run(folder: Path, kind: Kind, *, rank: int = 0, world_size: int = 1, steps: int = 6) -> tuple[Any, TrainState]:
    """Resume what the folder holds and train on to `steps` of 6, saving at the end."""
    model, accumulation = TinyModel(), kind.parts // world_size
    config = ds_config(kind.stage, precision=kind.precision, accumulation=accumulation, world_size=world_size)
    config["zero_optimization"].update(kind.zero)
    settings = CONFIGS[kind.optimizer](lr=1e-2, weight_decay=0.1)
    optimizer = make_optimizer(settings, model.named_parameters(), facts=TensorFacts(matrices=("dense.weight",)))
    engine = make_engine(model, optimizer, config)
    services = tiny_services(folder, rank, world_size)
    log = services.log
    state = resume(engine, folder, name=None, facts=FACTS, log=log) or TrainState()
    log.start(state.step, {})
    policy = CheckpointPolicy(keep_last=2, facts=FACTS)
    save = replace(
        services, save=lambda at: save_checkpoint(engine, folder, state=at, policy=policy, log=log) is not None
    )
    loop = tiny_loop(6, max_steps=steps)
    train(engine, step_batches(state.step, rank, accumulation), state=state, loop=loop, services=save)
    log.close()
    return engine, state


def facts_of(engine: Any, state: TrainState) -> dict[str, Any]:
    """What a continued run must share with the uninterrupted one."""
    return {
        "weights": full_weights(engine).numpy(),
        "steps": {int(one["step"]) for one in engine.basic_optimizer.state.values()},
        "state": (state.step, state.consumed_examples),
    }


def save_and_continue(rank: int, world_size: int, folder: str) -> dict[str, dict[str, Any]]:
    """Worker: per kind save step 3 on these ranks, then continue what one rank has saved."""
    found = {}
    for kind in KINDS:
        run(Path(folder) / f"to_one/{kind}", kind, rank=rank, world_size=world_size, steps=3)
        here = {"rank": rank, "world_size": world_size}
        found[str(kind)] = facts_of(*run(Path(folder) / f"to_two/{kind}", kind, **here))
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """way/kind -> facts of runs 1 -> 2 and 2 -> 1, and of the uninterrupted one on one rank."""
    join_alone()
    folder, found = tmp_path_factory.mktemp("elastic"), {}
    for kind in KINDS:
        run(folder / f"to_two/{kind}", kind, steps=3)
        found[f"whole/{kind}"] = facts_of(*run(folder / f"whole/{kind}", kind))
    on_two = run_ranks(save_and_continue, 2, str(folder), timeout_s=400)[0]
    for kind in KINDS:
        found[f"to_two/{kind}"] = on_two[str(kind)]
        shutil.copytree(folder / f"to_one/{kind}", folder / f"saved_by_two/{kind}")
        found[f"to_one/{kind}"] = facts_of(*run(folder / f"to_one/{kind}", kind))
    return folder, found


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("way", ["to_one", "to_two"])
def test_the_losses_follow_the_uninterrupted_run(way: str, kind: Kind, runs: Any) -> None:
    folder, _ = runs
    rows = [read_metrics(folder / name / str(kind) / "metrics.jsonl") for name in (way, "whole")]
    continued, whole = ([row["loss"] for row in part] for part in rows)
    assert len(whole) == 6
    assert continued == pytest.approx(whole, rel=1e-5 if kind.precision == "fp32" else 2e-2)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("way", ["to_one", "to_two"])
def test_weights_step_counts_and_progress_are_those_of_the_uninterrupted_run(way: str, kind: Kind, runs: Any) -> None:
    continued, whole = runs[1][f"{way}/{kind}"], runs[1][f"whole/{kind}"]
    assert continued["steps"] == whole["steps"] == {6}
    assert continued["state"] == whole["state"] == (6, 48)
    error = abs(continued["weights"] - whole["weights"]).max()
    assert error <= (2e-5 if kind.precision == "fp32" else 2e-2)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("way", ["to_one", "to_two"])
def test_nothing_of_the_conversion_is_left(way: str, kind: Kind, runs: Any) -> None:
    left = {path.name for path in (runs[0] / way / str(kind) / "checkpoints").iterdir()}
    assert left == {"global_step3", "global_step6", "latest"}


CHAINED = [Kind(stage, optimizer, parts=12) for stage in (1, 2, 3) for optimizer in ("lamb", "adamw")]


def one_more_step(rank: int, world_size: int, folder: str, step: int) -> None:
    """Worker: continue every kind up to a step."""
    for kind in CHAINED:
        run(Path(folder) / str(kind), kind, rank=rank, world_size=world_size, steps=step)


@pytest.mark.campaign
def test_a_run_that_changes_its_ranks_at_every_step_has_the_losses_of_one_that_does_not(tmp_path: Path) -> None:
    for step, world_size in enumerate((4, 3, 1, 2, 4, 1), start=1):
        run_ranks(one_more_step, world_size, str(tmp_path / "changing"), step, timeout_s=600)
    run_ranks(one_more_step, 1, str(tmp_path / "whole"), 6)
    for kind in CHAINED:
        changing, whole = (
            read_metrics(tmp_path / name / str(kind) / "metrics.jsonl") for name in ("changing", "whole")
        )
        assert [row["loss"] for row in changing] == pytest.approx([row["loss"] for row in whole], rel=1e-5)


@pytest.fixture
def saved(tmp_path: Path, runs: Any) -> Callable[[Kind], Path]:
    """Return a fresh run folder with a checkpoint of two ranks."""

    def copy(kind: Kind) -> Path:
        return shutil.copytree(runs[0] / f"saved_by_two/{kind}", tmp_path / "run") / "checkpoints/global_step3"

    return copy


def test_what_deepspeed_would_convert_wrongly_is_refused_with_the_reason(saved: Any) -> None:
    join_alone()
    path = saved(KINDS[2])
    change_manifest(path, universal_blockers=["round_robin_gradients: weights are exchanged silently"])
    with pytest.raises(CheckpointError, match="saved by 2 ranks and cannot continue on 1: round_robin_gradients"):
        run(path.parents[1], KINDS[2])


def test_a_setting_of_this_launch_that_blocks_is_refused_too(saved: Any) -> None:
    join_alone()
    path = saved(KINDS[2])
    with pytest.raises(CheckpointError, match="round_robin_gradients: the address of every parameter"):
        run(path.parents[1], KINDS[2]._replace(zero=(("round_robin_gradients", True),)))


def test_the_blockers_of_a_run_are_in_its_manifests(tmp_path: Path) -> None:
    join_alone()
    run(tmp_path, Kind(1, "lion"), steps=1)
    (blocker,) = parse_manifest(tmp_path / "checkpoints/global_step1")["universal_blockers"]
    assert blocker.startswith("optimizer state other than exp_avg and exp_avg_sq")


class Evil:
    """Unpickles by making a folder."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path(__file__).parent / "unpickled"),)


def change_manifest(path: Path, **changes: Any) -> None:
    manifest = parse_manifest(path) | changes
    write_manifest(path, manifest)


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_a_file_with_code_in_it_is_not_unpickled_even_if_the_manifest_vouches_for_it(name: str, saved: Any) -> None:
    path = saved(KINDS[2])
    torch.save({"optimizer_state_dict": Evil(), "module": Evil()}, path / name)
    record = {"bytes": (path / name).stat().st_size, "sha256": file_sha256(path / name)}
    change_manifest(path, files=parse_manifest(path)["files"] | {name: record})
    with pytest.raises(CheckpointError, match=r"could not be converted .*Weights only load failed"):
        convert(path)
    assert not (Path(__file__).parent / "unpickled").exists()
    assert [one.name for one in path.parent.iterdir() if one.name.startswith(".tmp")] == []


def test_a_load_that_asks_for_code_gets_none_while_it_is_forced(tmp_path: Path) -> None:
    torch.save(Evil(), tmp_path / "evil.pt")
    with weights_only_forced(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "evil.pt", weights_only=False)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_checkpoint_of_another_user_is_not_converted(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(KINDS[2])
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(CheckpointError, match="global_step3 belongs to user id"):
        convert(path)


def test_a_conversion_that_a_killed_launch_left_is_taken_only_if_it_is_whole(saved: Any) -> None:
    path = saved(KINDS[2])
    first = convert(path)
    untouched = {one: one.stat().st_mtime_ns for one in first.rglob("*.pt")}
    assert convert(path) == first
    assert {one: one.stat().st_mtime_ns for one in first.rglob("*.pt")} == untouched
    damaged = first / "zero/dense.weight/fp32.pt"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    convert(path)
    assert damaged.read_bytes() == content
    assert len(json.loads((first / "manifest.json").read_text())["files"]) == len(untouched)


def test_a_disk_without_room_for_the_conversion_is_said_before_it_starts(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(KINDS[2])
    usage = shutil.disk_usage(path)
    monkeypatch.setattr(shutil, "disk_usage", lambda where: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="1,000 bytes free, continuing on other ranks needs"):
        convert(path)


def test_a_checkpoint_of_another_stage_is_still_refused(saved: Any) -> None:
    join_alone()
    path = saved(Kind(1))
    with pytest.raises(CheckpointError, match="zero_stage 1, this run has zero_stage 2"):
        run(path.parents[1], Kind(2))
