"""Saving and resuming: on one rank in this process, and on two ranks in one launch."""

from __future__ import annotations

import os
import pickletools
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_saves import killed_saves
from ranks_harness import run_forked, run_ranks
from tiny_training import (
    FACTS,
    ds_config,
    full_weights,
    join_alone,
    optimizer_digest,
    run_tiny,
    tiny_engine,
    tiny_services,
)

from bert_ds.basics.ranks import CheckpointError, Ranks
from bert_ds.reporting.run_log import read_metrics
from bert_ds.training.checkpoints.checkpoint_engine import VerifiedCheckpointEngine, load_safely
from bert_ds.training.checkpoints.checkpoint_folder import (
    find_checkpoint,
    parse_manifest,
    verify_checkpoint,
    write_manifest,
)
from bert_ds.training.checkpoints.checkpoint_loader import resume, roll_back, save_checkpoint
from bert_ds.training.checkpoints.checkpoint_saver import CheckpointPolicy, checkpoint_bytes
from bert_ds.training.checkpoints.fp32_weights import load_fp32_state_dict
from bert_ds.training.checkpoints.train_state import TrainState

ALONE = Ranks(0, 0, 1)


def resume_everywhere(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """For each stage and precision: six steps at once, and three then three."""
    results, ranks = {}, Ranks(rank, rank, world_size)
    for stage, precision in ((0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")):
        config = ds_config(stage, precision=precision, accumulation=2, world_size=world_size)
        name = f"{stage}-{precision}"
        whole, _ = run_tiny(Path(folder) / name / "whole", ranks, config=config, steps=6)
        run_tiny(Path(folder) / name / "parts", ranks, config=config, steps=3)
        parts, _ = run_tiny(Path(folder) / name / "parts", ranks, config=config, steps=6)
        path = find_checkpoint(Path(folder) / name / "parts")
        exported = load_fp32_state_dict(path)
        live = dict(zip(exported_names(parts), full_weights(parts, flat=False), strict=True))
        results[name] = {
            "weights_equal": torch.equal(full_weights(whole), full_weights(parts)),
            "optimizer_equal": optimizer_digest(whole) == optimizer_digest(parts),
            "exported_equal": all(torch.equal(exported[key], value) for key, value in live.items()),
            "exported_names": sorted(exported),
            "tied": torch.equal(exported["tied.weight"], exported["dense.weight"]),
            "wrapper": type(parts.optimizer).__name__,
            "bytes": (sum(p.stat().st_size for p in path.iterdir()), checkpoint_bytes(parts)),
        }
    return results | {"full disk": save_on_a_full_disk(Path(folder) / "full", ranks)}


def save_on_a_full_disk(run_dir: Path, ranks: Ranks) -> dict[str, Any]:
    """Steps 2 saved; then rank 1 alone cannot write its file; then it can again."""
    config = ds_config(2, world_size=ranks.world_size)
    engine, state = run_tiny(run_dir, ranks, config=config, steps=2)
    log, policy = tiny_services(run_dir, ranks.rank, ranks.world_size).log, CheckpointPolicy(facts=FACTS)
    results: dict[str, Any] = {}
    for attempt, limit in (("full", 1000), ("free", resource.RLIM_INFINITY)):
        state.step += 1
        if ranks.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        path = save_checkpoint(engine, run_dir, state=state, policy=policy, log=log)
        found = find_checkpoint(run_dir)
        results[attempt] = (path and path.name, found and found.name)
    results["left"] = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    return results


def exported_names(engine: Any) -> list[str]:
    return [name for name, _ in engine.module.named_parameters()]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("resumed")
    return folder, run_ranks(resume_everywhere, 2, str(folder), timeout_s=300.0)[0]


CASES = ["0-fp32", "0-bf16", "1-bf16", "2-fp32", "3-fp32", "3-bf16"]


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(case: str, resumed: Any) -> None:
    folder, results = resumed
    losses = {
        part: [row["loss"] for row in read_metrics(folder / case / part / "metrics.jsonl")]
        for part in ("whole", "parts")
    }
    assert len(losses["whole"]) == 6
    assert losses["parts"] == losses["whole"]
    assert results[case]["weights_equal"]
    assert results[case]["optimizer_equal"]


@pytest.mark.parametrize("case", CASES)
def test_the_exported_weights_are_the_live_masters(case: str, resumed: Any) -> None:
    assert resumed[1][case]["exported_equal"]
    assert resumed[1][case]["exported_names"] == [
        "LayerNorm.bias",
        "LayerNorm.weight",
        "dense.bias",
        "dense.weight",
        "pair.bias",
        "pair.weight",
        "tied.weight",
    ]


def test_a_tied_weight_is_exported_under_both_names(resumed: Any) -> None:
    assert [resumed[1][case]["tied"] for case in CASES] == [True] * len(CASES)


def test_stage_1_with_fp32_accumulation_in_bf16_was_the_engine_under_test(resumed: Any) -> None:
    assert resumed[1]["1-bf16"]["wrapper"] == "BF16_Optimizer"


def test_the_announced_size_is_enough_and_not_much_more(resumed: Any) -> None:
    for case in CASES:
        written, announced = resumed[1][case]["bytes"]
        assert written <= announced


def test_a_disk_that_is_full_on_one_rank_fails_the_save_on_all_and_leaves_the_older_checkpoint(resumed: Any) -> None:
    assert resumed[1]["full disk"] == {
        "full": (None, "global_step2"),
        "free": ("global_step4", "global_step4"),
        "left": ["global_step2", "global_step4", "latest"],
    }
    log = (resumed[0] / "full/logs/rank_0.log").read_text()
    assert "not written, older ones are untouched: rank 1: zero_pp_rank_1_mp_rank_00_optim_states.pt: [Errno 27]" in log


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of one rank with the checkpoints of steps 2 and 4; copy it before damaging it."""
    join_alone()
    run_dir = tmp_path_factory.mktemp("saved")
    run_tiny(run_dir, ALONE, config=ds_config(2), steps=4)
    return run_dir


@pytest.fixture
def run_dir(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints/global_step4"


def test_the_pointer_names_the_newest_and_there_is_no_temporary_folder(run_dir: Path) -> None:
    assert (run_dir / "checkpoints/latest").read_text() == "global_step4\n"
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["global_step2", "global_step4", "latest"]


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def test_a_pickle_in_a_checkpoint_is_not_executed(tmp_path: Path) -> None:
    torch.save({"module": Malicious(tmp_path / "canary")}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="unsupported GLOBAL posix") as caught:
        load_safely(tmp_path / "x.pt")
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "canary").exists()


def test_a_checkpoint_names_nothing_that_an_older_torch_refuses_to_load(run_dir: Path) -> None:
    files = [torch._C.PyTorchFileReader(str(path)) for path in newest(run_dir).glob("*.pt")]
    pickles = [file.get_record("data.pkl") for file in files]
    named = {str(value) for one in pickles for code, value, _ in pickletools.genops(one) if code.name == "GLOBAL"}
    assert len(pickles) == 2 and any(name.startswith("torch._utils") for name in named)
    assert not {name for name in named if "builtin" in name or "Enum" in name}


def resume_alone(run_dir: Path, *, facts: dict[str, str] = FACTS, name: str | None = None) -> TrainState | None:
    join_alone()
    log = tiny_services(run_dir, 0, 1).log
    return resume(tiny_engine(ds_config(2)), run_dir, name=name, facts=facts, log=log)


def test_resuming_counts_the_attempt_and_keeps_the_progress(run_dir: Path) -> None:
    assert resume_alone(run_dir) == TrainState(step=4, consumed_examples=8, attempt=2)


def test_an_older_checkpoint_that_is_resumed_by_name_is_the_runs_from_then_on_and_the_newer_is_kept(
    run_dir: Path,
) -> None:
    state = resume_alone(run_dir, name="global_step2")
    assert state is not None
    assert state.step == 2
    assert find_checkpoint(run_dir) == run_dir / "checkpoints/global_step2"
    [kept] = (run_dir / "checkpoints").glob("global_step4.abandoned-*")
    assert (kept / "manifest.json").exists()


def test_going_back_abandons_what_was_saved_between_bad_steps(run_dir: Path) -> None:
    manifest = parse_manifest(newest(run_dir))
    write_manifest(newest(run_dir), {**manifest, "state": {**manifest["state"], "bad_streak": 1}})
    join_alone()
    log, state = tiny_services(run_dir, 0, 1).log, TrainState(step=5)
    assert roll_back(tiny_engine(ds_config(2)), run_dir, state=state, facts=FACTS, log=log)
    assert (state.step, state.passed_over) == (2, 3)
    assert find_checkpoint(run_dir) == run_dir / "checkpoints/global_step2"
    assert len(list((run_dir / "checkpoints").glob("global_step4.abandoned-*"))) == 1


def test_a_checkpoint_of_other_data_is_refused(run_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="saved with data_fingerprint d1, this run has data_fingerprint d2"):
        resume_alone(run_dir, facts={"data_fingerprint": "d2"})


def test_a_checkpoint_of_another_optimizer_is_refused(run_dir: Path) -> None:
    own = parse_manifest(newest(run_dir))
    write_manifest(newest(run_dir), {**own, "optimizer": "Lamb"})
    wanted = f"global_step4 was saved with optimizer Lamb, this run has optimizer {own['optimizer']}$"
    with pytest.raises(CheckpointError, match=wanted):
        resume_alone(run_dir)


def test_decay_and_rate_are_the_recipes_and_not_the_checkpoints(run_dir: Path) -> None:
    join_alone()
    engine = tiny_engine(ds_config(2))
    for group, decay in zip(engine.optimizer.param_groups, (0.7, 0.2), strict=True):
        group["weight_decay"] = decay
    log = tiny_services(run_dir, 0, 1).log
    resume(engine, run_dir, name=None, facts=FACTS, log=log)
    assert [group["weight_decay"] for group in engine.optimizer.param_groups] == [0.7, 0.2]


def save_once(run_dir: Path, step: int) -> Path | None:
    join_alone()
    log = tiny_services(run_dir, 0, 1).log
    policy = CheckpointPolicy(facts=FACTS)
    return save_checkpoint(tiny_engine(ds_config(2)), run_dir, state=TrainState(step=step), policy=policy, log=log)


def test_a_disk_with_too_little_room_is_told_with_both_numbers_before_anything_is_written(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    assert save_once(run_dir, 6) is None
    assert "has 5,000 bytes free, a checkpoint needs 2," in capsys.readouterr().out
    assert find_checkpoint(run_dir) == newest(run_dir)


def test_a_folder_that_cannot_be_written_leaves_training_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    assert save_once(tmp_path, 6) is None


def test_a_file_that_was_saved_past_our_engine_makes_the_save_fail(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(VerifiedCheckpointEngine, "save", lambda self, state_dict, path: torch.save({}, path))
    assert save_once(run_dir, 6) is None
    assert "did not save" in capsys.readouterr().out
    assert find_checkpoint(run_dir) == newest(run_dir)


def test_leftovers_of_killed_saves_are_removed_by_the_next_save(run_dir: Path) -> None:
    leftover = run_dir / "checkpoints/.tmp-global_step6-00000000"
    leftover.mkdir()
    assert save_once(run_dir, 6) is not None
    assert not leftover.exists()


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(run_dir: Path) -> None:
    (newest(run_dir) / "manifest.json").write_text("{}")
    assert save_once(run_dir, 4) == newest(run_dir)
    assert verify_checkpoint(newest(run_dir))["step"] == 4


@pytest.mark.parametrize("how", ["blocking", "asynchronous"])
def test_kills_inside_saves_lose_no_checkpoint_and_change_no_loss(how: str, tmp_path: Path) -> None:
    result = run_forked(killed_saves, tmp_path, 4, 2, how == "asynchronous")
    assert result["operations"]["kills"] >= 4
    assert result["num_losses"] == result["last_step"]
    assert result["same"]
