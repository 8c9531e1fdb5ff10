"""The start of a launch, watched: ranks that are processes of their own and end at every moment of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks_harness import free_port

from bert_ds.start_hub import keep_alive

ROOT = Path(__file__).resolve().parents[1]
PREAMBLE = """
import os, signal, sys, time
from bert_ds import start_watch as watch
from bert_ds.start_watch import joined, meet, say_ended, watch_start
def die(): os.kill(os.getpid(), signal.SIGKILL)
"""
MEET = "meet(60)\njoined()\ntime.sleep(60)"


class Launch:
    """Ranks that a person starts by hand on one machine."""

    def __init__(self, folder: Path, world_size: int) -> None:
        self.folder, self.world_size, self.port = folder, world_size, free_port()
        self.ranks: list[tuple[int, subprocess.Popen]] = []

    def start(self, rank: int, body: str, *, before: str = "") -> subprocess.Popen:
        """Start a rank that watches the start and does what `body` says."""
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.world_size, "MASTER_PORT": self.port}
        environment = {**os.environ, **{name: str(value) for name, value in facts.items()}}
        environment |= {"MASTER_ADDR": "127.0.0.1", "BERT_DS_EXITS": str(self.folder)}
        environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
        code = f"{PREAMBLE}{before}\nwatch_start()\n{body}"
        words = [sys.executable, *([] if "run_main" in body else ["-S"]), "-c", code]  # -S: without site-packages
        process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
        self.ranks.append((rank, process))
        return process

    def ends(self, *, seconds: float = 20.0) -> dict[int, tuple[int, str]]:
        """Wait for every rank; rank -> exit code and what it said."""
        deadline = time.monotonic() + seconds
        found = {}
        for rank, process in self.ranks:
            _, said = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            found[rank] = process.returncode, said
        return found

    def record(self, rank: int) -> dict:
        """What the rank left for the job script."""
        return json.loads((self.folder / f"rank_{rank}.json").read_text())


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """A launch of three ranks, ended with the test."""
    one = Launch(tmp_path, 3)
    yield one
    for _, process in one.ranks:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("dead", [0, 2])
@pytest.mark.parametrize(
    "moment", ["time.sleep(0.5); die()", "meet(60); die()"], ids=["before the rendezvous", "in the rendezvous"]
)
def test_a_rank_that_dies_ends_the_others_with_75_and_its_name(launch: Launch, dead: int, moment: str) -> None:
    for rank in range(3):
        launch.start(rank, moment if rank == dead else "meet(60); time.sleep(60)")
    ends = launch.ends()
    for rank in {0, 1, 2} - {dead}:
        assert ends[rank][0] == 75, ends
        assert f"start: rank {dead} on" in ends[rank][1] and "died before all ranks had met" in ends[rank][1]
        assert launch.record(rank)["code"] == 75 and f"rank {dead} on" in launch.record(rank)["message"]


def test_a_rank_that_dies_after_others_have_joined_still_ends_them(launch: Launch) -> None:
    for rank in range(3):
        launch.start(rank, "meet(60); time.sleep(0.5); die()" if rank == 1 else MEET)
    ends = launch.ends()
    assert {rank: code for rank, (code, _) in ends.items()} == {0: 75, 1: -9, 2: 75}


def test_the_watch_ends_when_all_have_joined(launch: Launch) -> None:
    for rank in range(3):
        then = "time.sleep(0.3); die()" if rank == 1 else "time.sleep(1)"
        launch.start(rank, f"meet(60); joined(); {then}")
    ends = launch.ends()
    assert {rank: code for rank, (code, _) in ends.items()} == {0: 0, 1: -9, 2: 0}
    assert ends[0][1] == ends[2][1] == ""


def test_a_rank_that_is_slow_is_waited_for(launch: Launch) -> None:
    for rank, wait_s in enumerate((0, 2, 0)):
        launch.start(rank, f"time.sleep({wait_s}); meet(60); joined()")
    assert {rank: code for rank, (code, _) in launch.ends().items()} == {0: 0, 1: 0, 2: 0}


def test_ranks_that_do_not_come_are_named_when_the_limit_is_over(launch: Launch) -> None:
    launch.start(0, "meet(4); time.sleep(60)")
    launch.start(1, "time.sleep(60)")
    ends = launch.ends(seconds=25)
    assert ends[0][0] == 75
    assert "gave up after --start_limit, 4 s: rank 2 not seen yet; rank 1 on" in ends[0][1]
    assert "still importing" in ends[0][1]
    assert ends[1][0] == 75 and "rank 0 on" in ends[1][1] and "rank 2 not seen yet" in ends[1][1]


def test_a_rank_whose_rank_0_never_answers_says_so(launch: Launch) -> None:
    launch.start(1, "meet(2); time.sleep(60)", before="watch.FIRST_CONTACT_S = 0.5")
    code, said = launch.ends()[1]
    assert code == 75
    assert "gave up after --start_limit, 2 s: rank 0 does not answer at 127.0.0.1" in said


@pytest.mark.parametrize("failing", [0, 1])
def test_an_import_that_fails_before_the_others_have_come_reaches_them(launch: Launch, failing: int) -> None:
    launch.start(failing, "import no_such_module")
    time.sleep(1)
    for rank in {0, 1, 2} - {failing}:
        launch.start(rank, MEET)
    ends = launch.ends(seconds=30)
    assert ends.pop(failing)[0] == 1
    for code, said in ends.values():
        assert code == 75
        assert f"rank {failing} on" in said
        assert "ended with exit code 1 before all ranks had met: ModuleNotFoundError: No module named" in said


VERB = """
from bert_ds.command_line import make_parser, run_main
def main():
    from bert_ds.ranks import DataError
    {}
run_main(main, leave_at_once=True)
"""


def test_an_error_of_one_rank_is_the_exit_code_and_the_word_of_all(launch: Launch) -> None:
    launch.start(1, VERB.format("raise DataError('shard 7 is cut')"))
    for rank in (0, 2):
        launch.start(rank, VERB.format("meet(60)"))
    ends = launch.ends()
    assert {rank: code for rank, (code, _) in ends.items()} == {0: 3, 1: 3, 2: 3}
    assert "ended with exit code 3 before all ranks had met: shard 7 is cut" in ends[0][1]
    assert "shard 7 is cut" in launch.record(2)["message"]


def test_the_same_mistake_on_all_ranks_is_said_in_their_own_words_alone(launch: Launch) -> None:
    for rank in range(3):
        launch.start(rank, VERB.format("time.sleep(0.5); make_parser('').parse_args(['--wrong'])"))
    for code, said in launch.ends().values():
        assert code == 2
        assert "unknown argument --wrong" in said and "start:" not in said


def test_a_forked_child_does_not_hide_that_its_rank_has_died(launch: Launch) -> None:
    launch.start(0, MEET)
    launch.start(1, MEET)
    launch.start(2, "time.sleep(0.5); os.fork() == 0 and (time.sleep(3), os._exit(0)); die()")
    assert [process.wait(timeout=3) for _, process in launch.ranks[:2]] == [75, 75]


def test_two_processes_that_say_they_are_one_rank_are_refused_and_the_first_goes_on(launch: Launch) -> None:
    for rank in (0, 1):
        launch.start(rank, "meet(60); joined()")
    time.sleep(1)
    second = launch.start(1, MEET)
    _, said = second.communicate(timeout=10)
    assert second.returncode == 2
    assert "rank 1 has already come from" in said and "wanted one process per rank" in said
    launch.ranks.pop()
    launch.start(2, "meet(60); joined()")
    assert {code for code, _ in launch.ends().values()} == {0}


def test_strangers_on_the_port_do_not_disturb_the_start(launch: Launch) -> None:
    first = launch.start(0, "print(watch._watch._ports[0], file=sys.stderr)\n" + MEET)
    assert first.stderr is not None
    port = int(first.stderr.readline())
    for sent in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"launch": "another", "rank": 1}\n', b"x" * 200_000, b""):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger, contextlib.suppress(OSError):
            stranger.sendall(sent)
    launch.start(1, MEET)
    launch.start(2, "meet(60); joined(); die()")
    assert launch.ranks[2][1].wait(timeout=15) == -signal.SIGKILL
    time.sleep(0.5)
    assert [process.poll() for _, process in launch.ranks[:2]] == [None, None]


def test_the_kernel_finds_a_machine_that_is_gone_within_20_s() -> None:
    with socket.socket() as connection:
        keep_alive(connection)
        found = [
            connection.getsockopt(socket.IPPROTO_TCP, number)
            for number in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        ]
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert found == [5, 5, 3, 20_000]
