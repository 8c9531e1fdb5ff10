"""What a rank does before it meets the others: its own GPU, and timeouts that let our watchdog speak first."""

from __future__ import annotations

import importlib
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_training import join_alone

from bert_ds.basics.ranks import Ranks
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.training.launch import process_group
from bert_ds.training.launch.hang_watchdog import PATIENCE, collective_timeout

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A machine with two GPUs, and what is asked of it in order."""
    found: list[Any] = []
    join_alone()
    monkeypatch.setattr(process_group, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append(("device", device)))
    monkeypatch.setattr(process_group, "meet", lambda limit_s: found.append("meet"))
    monkeypatch.setattr(process_group, "joined", lambda: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(process_group, "host_group", lambda timeout: found.append(("host group", timeout)))
    monkeypatch.setattr(
        process_group.deepspeed,
        "init_distributed",
        lambda **named: found.append((named["dist_backend"], named["timeout"])),
    )
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    return found


def test_a_rank_takes_its_own_gpu_before_anything_and_waits_longer_than_the_watchdog(calls: list[Any]) -> None:
    timeout = collective_timeout(1200.0)
    with process_group.joined_ranks(Ranks(5, 1, 8), timeout=timeout):
        assert float(process_group.os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) > PATIENCE * 1200.0
    assert calls == [("device", 1), "meet", ("nccl", timeout), ("host group", timeout)]


def test_a_rank_without_a_gpu_of_its_own_says_what_it_sees(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    with (
        pytest.raises(
            ConfigError, match=r"local rank 2 sees 2 GPUs \(CUDA_VISIBLE_DEVICES is 0,3\), wanted at least 3"
        ),
        process_group.joined_ranks(Ranks(2, 2, 8)),
    ):
        pass
    assert calls == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_cpu_what_tensors_free_is_kept_for_the_next_step(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[int, int] = {}
    monkeypatch.setattr(process_group.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=asked.__setitem__))
    monkeypatch.setattr(process_group, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: device))
    process_group.keep_freed_memory()
    trim_threshold, mmap_threshold = -1, -3
    assert set(asked) == ({trim_threshold, -2, mmap_threshold} if device == "cpu" else set())
    if asked:
        assert asked[trim_threshold] == 2**31 - 1 and asked[mmap_threshold] == 2**30


def test_a_rank_on_a_cpu_keeps_freed_memory_before_it_meets_the_others(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_group, "keep_freed_memory", lambda: calls.append("memory"))
    with process_group.joined_ranks(Ranks(5, 1, 8)):
        pass
    assert calls.index("memory") < calls.index("meet")


def test_a_c_library_without_mallopt_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group.ctypes, "CDLL", lambda name: SimpleNamespace())
    process_group.keep_freed_memory()


@pytest.mark.parametrize("limit_s", [0.0, 600.0, 3600.0])
def test_a_collective_waits_longer_than_the_watchdog_is_patient(limit_s: float) -> None:
    assert collective_timeout(limit_s) >= timedelta(minutes=30)
    assert collective_timeout(limit_s).total_seconds() >= PATIENCE * limit_s + 300.0 * bool(limit_s)


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_the_limit_of_the_command_line_sets_the_timeout(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"bert_ds.{verb}")
    words = {
        "pretrain": ["--run", "recipes/bert_base_phase1.json", "--deepspeed_config", "zero1.json"],
        "finetune": ["--task", "tasks/cola.json", "--deepspeed_config", "zero1.json", "--model", str(ROOT)],
    }[verb]
    files = [str(ROOT / "ds_configs" / word) if word.endswith(".json") else word for word in words]
    monkeypatch.setattr("sys.argv", [verb, *files, "--run_dir", "nowhere", "--hang_limit", "5000"])
    for name in ("checked_run", "checked_task"):
        monkeypatch.setattr(module, name, lambda args: (None, None), raising=False)
    for name, answer in {"make_plan": None, "require_metrics": None, "task_folders": (None, {})}.items():
        monkeypatch.setattr(module, name, lambda *of, answer=answer: answer, raising=False)
    monkeypatch.setattr(module.StopRequest, "install", lambda self, **named: None)
    monkeypatch.setattr(module, "follow_launcher", lambda stop: None)
    found: list[timedelta] = []

    class Joined(Exception): ...

    def join(ranks: Ranks, *, timeout: timedelta, **named: Any) -> None:
        found.append(timeout)
        raise Joined

    monkeypatch.setattr(module, "joined_ranks", join)
    with pytest.raises(Joined):
        module.main()
    assert found == [collective_timeout(5000.0)]
