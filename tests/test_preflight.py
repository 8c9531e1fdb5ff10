"""What is measured before the first step, and which node it names."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from ranks_harness import run_ranks

from bert_ds.basics.ranks import Ranks
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.training.launch.node_facts import Needs, NodeFacts, needs_of, node_problems

FIT = NodeFacts(
    node="n0",
    gemm_flops=60e9,
    gemm_sum=12.0,
    reduced=10.0,
    all_reduce_bytes_per_s=1e9,
    links=(1e9, 1e9),
    folder="",
    clock_s=1000.0,
    memory=8 * 2**30,
    device_memory=-1,
    disk=50 * 2**30,
    temporary=5 * 2**30,
)


def four_nodes(**wrong: Any) -> list[NodeFacts]:
    """Facts of four ranks on four nodes; what is given is true of rank 2."""
    facts = [FIT._replace(node=f"n{rank}") for rank in range(4)]
    facts[2] = facts[2]._replace(**wrong)
    return facts


def test_four_equal_nodes_are_fit() -> None:
    assert node_problems(four_nodes(), Needs(disk=2**30, host=2**30)) == []


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"gemm_flops": 29e9}, "a GEMM of 29.0 GFLOP/s, wanted 50% of the median, 60.0 GFLOP/s"),
        ({"gemm_sum": 13.0}, "its GEMM computes something else than the others'"),
        ({"reduced": 9.0}, "an all-reduce gave 9, wanted 10"),
        ({"folder": "/runs cannot be written: Read-only file system"}, "/runs cannot be written: Read-only"),
        ({"clock_s": 1180.0}, "its clock is +180 s from the median, wanted at most 30 s"),
        ({"clock_s": 880.0}, "its clock is -120 s from the median"),
        ({"memory": 2**29}, "537 MB of memory free, wanted 2.1 GB"),
        ({"device_memory": 10**9}, "1.0 GB of GPU memory free, wanted 2.0 GB"),
        ({"disk": 10**9}, "1.0 GB free for the run, wanted 3.0 GB"),
        ({"temporary": 10**8}, "100 MB free for temporary files, wanted 268 MB"),
        ({"links": (5e6, 4e6)}, "5.0 MB/s to its neighbours, wanted 250 MB/s"),
    ],
)
def test_the_node_with_a_fault_is_named_with_what_was_found_and_wanted(wrong: dict[str, Any], text: str) -> None:
    found = node_problems(four_nodes(**wrong), Needs(disk=3 * 10**9, device=2 * 10**9, host=2**30))
    assert len(found) == 1
    assert found[0].startswith("node n2 (rank 2): ")
    assert text in found[0]


def test_a_node_with_one_bad_link_of_two_is_not_blamed_for_its_neighbour() -> None:
    facts = four_nodes(links=(4e6, 5e6))
    facts[1] = facts[1]._replace(links=(1e9, 4e6))
    facts[3] = facts[3]._replace(links=(5e6, 1e9))
    assert [one.partition(":")[0] for one in node_problems(facts, Needs())] == ["node n2 (rank 2)"]


def test_the_memory_of_a_node_is_what_all_its_ranks_share() -> None:
    facts = [FIT._replace(reduced=3.0, memory=3 * 2**29, links=()) for _ in range(2)]
    assert [one.partition(":")[0] for one in node_problems(facts, Needs())] == ["node n0 (rank 0)"]


def test_checkpoints_that_are_there_already_need_no_room(tmp_path: Path) -> None:
    (folder := tmp_path / "checkpoints/global_step3").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(60))
    plan: Any = Mock(disk_bytes=100)
    plan.memory.return_value = Mock(device=7, host=8)
    assert needs_of(plan, tmp_path) == Needs(disk=40, device=7, host=8)


def _look(rank: int, world_size: int, folder: str, fault: str) -> tuple[str, str]:
    """A preflight of two ranks that are one node each; rank 1 has a fault of its system. Returns error and output."""
    import contextlib
    import io

    os.environ["SLURMD_NODENAME"] = f"node{rank}"
    patch = pytest.MonkeyPatch()
    clock, usage, open_file = time.time, shutil.disk_usage, io.open

    def refuse(path: Any, *args: Any, **options: Any) -> Any:
        if ".preflight-" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return open_file(path, *args, **options)

    if rank == 1 and fault == "clock":
        patch.setattr(time, "time", lambda: clock() + 300)
    if rank == 1 and fault == "disk":
        patch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=2**20))
    if rank == 1 and fault == "folder":
        patch.setattr(io, "open", refuse)
    place = Path(folder) / ("elsewhere" if rank == 1 and fault == "another folder" else "runs")
    place.mkdir(exist_ok=True)

    from bert_ds.training.launch.preflight import preflight

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            needs = Needs(disk=2**30 if fault == "disk" else 0)
            preflight(place / "mine", Ranks(rank, 0, world_size), when="off" if fault == "off" else "auto", needs=needs)
        except ConfigError as error:
            return str(error), said.getvalue()
    return "", said.getvalue()


def _look_at_all(rank: int, world_size: int, folder: str, faults: list[str]) -> dict[str, tuple[str, str]]:
    return {fault: _look(rank, world_size, str(Path(folder)), fault) for fault in faults}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[str, str]]]:
    """What each of two ranks, one node each, finds for every fault of rank 1."""
    folder = tmp_path_factory.mktemp("preflight")
    faults = ["", "off", "another folder", "folder", "disk", "clock"]
    results = run_ranks(_look_at_all, 2, str(folder), faults)
    assert [path.name for path in folder.rglob("*") if path.name not in ("runs", "elsewhere")] == []
    return results


def test_two_fit_nodes_are_measured_and_rank_0_says_what_was_found(found: list) -> None:
    assert found[0][""][0] == found[1][""][0] == ""
    assert found[0][""][1].startswith("preflight: 2 nodes fit: GEMM ") and found[1][""][1] == ""


def test_off_measures_nothing(found: list) -> None:
    assert found[0]["off"] == ("", "")


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("another folder", "elsewhere is not the folder that rank 0 on node0 sees: wanted one folder shared by all"),
        ("folder", "runs cannot be written: Read-only file system"),
        ("disk", "1.0 MB free for the run, wanted 1.1 GB"),
    ],
)
def test_a_fault_of_a_nodes_system_is_named_on_every_rank(found: list, fault: str, text: str) -> None:
    assert found[0][fault] == found[1][fault]
    error = found[0][fault][0]
    assert error.startswith("preflight: node node1 (rank 1): ") and text in error
    assert "--preflight off" in error


def test_clocks_that_are_minutes_apart_are_said(found: list) -> None:
    error = found[0]["clock"][0]
    assert "node node1 (rank 1): its clock is +150 s from the median" in error  # the median of two is between them
