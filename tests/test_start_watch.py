"""The start of a launch, watched: ranks that are processes of their own and end at every moment of it.

All launches run side by side, as most of their time is waiting.
"""

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
from typing import NamedTuple

import pytest
from fork_server import free_port

from bert_ds.launch.start_hub import keep_alive

ROOT = Path(__file__).resolve().parents[1]
PREAMBLE = """
import os, signal, sys, time
from bert_ds.launch import start_watch as watch
from bert_ds.launch.start_watch import joined, meet, say_ended, watch_start
FOLDER = os.environ["BERT_DS_EXITS"]
def die(): os.kill(os.getpid(), signal.SIGKILL)
def wait_for(*names):
    while not all(os.path.exists(f"{FOLDER}/{name}") for name in names):
        time.sleep(0.05)
"""
WATCH = """
watch_start()
open(f"{FOLDER}/came_" + os.environ["RANK"], "w").close()
"""
MEET = "meet(60)\njoined()\ntime.sleep(60)"
WAIT = "meet(60); time.sleep(60)"
VERB = """
from bert_ds.launch.command_line import make_parser, run_main
def main():
    from bert_ds.basics.ranks import DataError
    {}
run_main(main, leave_at_once=True)
"""
FAILS, TYPO = VERB.format("raise DataError('shard 7 is cut')"), VERB.format("make_parser('').parse_args(['--wrong'])")


class Rank(NamedTuple):
    """A rank that watches the start and then does what `body` says."""

    rank: int
    body: str
    before: str = ""
    """What it does before it watches."""


def dying(dead: int, moment: str) -> list[Rank]:
    """Three ranks of which one dies."""
    return [Rank(rank, moment if rank == dead else WAIT) for rank in range(3)]


def cannot_import(failing: int) -> list[Rank]:
    """Three ranks of which one fails before the others have begun."""
    others = [Rank(rank, MEET, f"wait_for('rank_{failing}.json')") for rank in range(3) if rank != failing]
    return [Rank(failing, "import no_such_module", "watch.FIRST_CONTACT_S = 0"), *others]


LAUNCHES = {
    "0 dies before": dying(0, 'wait_for("came_1", "came_2"); die()'),
    "0 dies at once": [Rank(0, "die()"), *(Rank(rank, WAIT, "time.sleep(1)") for rank in (1, 2))],
    "2 dies before": dying(2, 'wait_for("came_0", "came_1"); die()'),
    "0 dies in": dying(0, "meet(60); die()"),
    "2 dies in": dying(2, "meet(60); die()"),
    "dies after others joined": [Rank(0, MEET), Rank(1, "meet(60); time.sleep(0.5); die()"), Rank(2, MEET)],
    "dies later": [
        *(Rank(rank, "meet(60); joined(); time.sleep(2)") for rank in (0, 2)),
        Rank(1, "meet(60); joined(); time.sleep(0.5); die()"),
    ],
    "slow": [Rank(rank, f"time.sleep({wait_s}); meet(60); joined()") for rank, wait_s in enumerate((0, 3, 0))],
    "late": [
        Rank(0, "wait_for('came_1'); meet(4); time.sleep(60)", "watch.FIRST_CONTACT_S = 0.5"),
        Rank(1, "time.sleep(60)"),
    ],
    "no rank 0": [Rank(1, "meet(2); time.sleep(60)", "watch.FIRST_CONTACT_S = 0.5")],
    "0 cannot import": cannot_import(0),
    "1 cannot import": cannot_import(1),
    "one fails": [
        Rank(1, "wait_for('came_0', 'came_2')" + FAILS),
        Rank(0, VERB.format("meet(60)")),
        Rank(2, VERB.format("meet(60)")),
    ],
    "a typo": [Rank(rank, TYPO, "watch.OWN_WORD_S = 30") for rank in range(3)],
    "forked": [
        *(Rank(rank, WAIT) for rank in (0, 1)),
        Rank(2, "wait_for('came_0', 'came_1'); os.fork() == 0 and (time.sleep(5), os._exit(0)); die()"),
    ],
    "twice": [
        *(Rank(rank, "meet(60); joined()") for rank in (0, 1)),
        Rank(1, MEET, "wait_for('came_1')"),
        Rank(2, "meet(60); joined()", "wait_for('rank_1.json')"),
    ],
}


class End(NamedTuple):
    """How a rank ended."""

    code: int
    said: str
    record: dict
    """What it left for the job script."""
    after_s: float
    """Since the launches began."""


def start(one: Rank, folder: Path, port: int) -> subprocess.Popen:
    """Start a rank of three."""
    facts = {"RANK": one.rank, "LOCAL_RANK": one.rank, "WORLD_SIZE": 3, "MASTER_PORT": port}
    environment = {**os.environ, **{name: str(value) for name, value in facts.items()}}
    environment |= {"MASTER_ADDR": "127.0.0.1", "BERT_DS_EXITS": str(folder)}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    code = f"{PREAMBLE}{one.before}{WATCH}{one.body}"
    words = [sys.executable, *([] if "run_main" in one.body else ["-S"]), "-c", code]  # -S: without site-packages
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[End]]]:
    """The ends of the ranks of every launch, in the order of LAUNCHES."""
    folders = {name: tmp_path_factory.mktemp("exits") for name in LAUNCHES}
    ports = {name: free_port() for name in LAUNCHES}
    begun = time.monotonic()
    every = {(name, number): one for name, ranks in LAUNCHES.items() for number, one in enumerate(ranks)}
    started = {key: start(one, folders[key[0]], ports[key[0]]) for key, one in every.items()}
    over: dict[tuple[str, int], float] = {}
    try:
        while len(over) < len(every):
            now = time.monotonic() - begun
            assert now < 100, f"still running: {[key for key in every if key not in over]}"
            for key, process in started.items():
                if process.poll() is not None:
                    over.setdefault(key, now)
            time.sleep(0.05)
        found: dict[str, list[End]] = {name: [] for name in LAUNCHES}
        for (name, number), one in every.items():
            process, record = started[name, number], folders[name] / f"rank_{one.rank}.json"
            # The pipe of a killed rank may still be held by its forked child.
            said = "" if process.returncode < 0 else process.communicate()[1]
            content = json.loads(record.read_text()) if record.exists() else {}
            found[name].append(End(process.returncode, said, content, over[name, number]))
        yield found
    finally:
        for process in started.values():
            process.kill()
            process.wait()


def codes(found: list[End]) -> list[int]:
    """Exit codes in the order of the launch."""
    return [one.code for one in found]


@pytest.mark.parametrize("dead", [0, 2])
@pytest.mark.parametrize("moment", ["before", "in"])
def test_a_rank_that_dies_ends_the_others_with_75_and_its_name(
    ends: dict[str, list[End]], dead: int, moment: str
) -> None:
    found = ends[f"{dead} dies {moment}"]
    assert codes(found) == [-9 if rank == dead else 75 for rank in range(3)]
    for rank in {0, 1, 2} - {dead}:
        assert f"start: rank {dead} on" in found[rank].said
        assert f"died before all ranks had met; rank {rank} ends" in found[rank].said
        assert found[rank].record["code"] == 75 and f"rank {dead} on" in found[rank].record["message"]


def test_a_rank_0_that_dies_before_the_others_have_come_is_named_too(ends: dict[str, list[End]]) -> None:
    assert codes(ends["0 dies at once"]) == [-9, 75, 75]
    assert all("rank 0 on" in one.said for one in ends["0 dies at once"][1:])


def test_a_rank_that_dies_after_others_have_joined_still_ends_them(ends: dict[str, list[End]]) -> None:
    assert codes(ends["dies after others joined"]) == [75, -9, 75]


def test_the_watch_ends_when_all_have_joined(ends: dict[str, list[End]]) -> None:
    assert codes(ends["dies later"]) == [0, 0, -9]
    assert [one.said for one in ends["dies later"][:2]] == ["", ""]


def test_a_rank_that_is_slow_is_waited_for(ends: dict[str, list[End]]) -> None:
    assert codes(ends["slow"]) == [0, 0, 0]


def test_ranks_that_do_not_come_are_named_when_the_limit_is_over(ends: dict[str, list[End]]) -> None:
    first, second = ends["late"]
    assert (first.code, second.code) == (75, 75)
    assert "gave up after --start_limit, 4 s: rank 2 not seen yet; rank 1 on" in first.said
    assert "still importing" in first.said
    assert "rank 0 on" in second.said and "rank 2 not seen yet" in second.said


def test_a_rank_whose_rank_0_never_answers_says_so(ends: dict[str, list[End]]) -> None:
    (one,) = ends["no rank 0"]
    assert one.code == 75
    assert "gave up after --start_limit, 2 s: rank 0 does not answer at 127.0.0.1" in one.said


@pytest.mark.parametrize("failing", [0, 1])
def test_an_import_that_fails_before_the_others_have_come_reaches_them(
    ends: dict[str, list[End]], failing: int
) -> None:
    failed, *others = ends[f"{failing} cannot import"]
    assert failed.code == 1
    for one in others:
        assert one.code == 75
        assert f"rank {failing} on" in one.said
        assert "ended with exit code 1 before all ranks had met: ModuleNotFoundError: No module named" in one.said


def test_an_error_of_one_rank_is_the_exit_code_and_the_word_of_all(ends: dict[str, list[End]]) -> None:
    assert codes(ends["one fails"]) == [3, 3, 3]
    assert "ended with exit code 3 before all ranks had met: shard 7 is cut" in ends["one fails"][1].said
    assert "shard 7 is cut" in ends["one fails"][2].record["message"]


def test_the_same_mistake_on_all_ranks_is_said_in_their_own_words_alone(ends: dict[str, list[End]]) -> None:
    assert codes(ends["a typo"]) == [2, 2, 2]
    for one in ends["a typo"]:
        assert "unknown argument --wrong" in one.said and "start:" not in one.said


def test_a_forked_child_does_not_hide_that_its_rank_has_died(ends: dict[str, list[End]]) -> None:
    first, second, dead = ends["forked"]
    assert codes([first, second, dead]) == [75, 75, -9]
    assert max(first.after_s, second.after_s) < dead.after_s + 4


def test_two_processes_that_say_they_are_one_rank_are_refused_and_the_first_goes_on(
    ends: dict[str, list[End]],
) -> None:
    assert codes(ends["twice"]) == [0, 0, 2, 0]
    assert "rank 1 has already come from" in ends["twice"][2].said
    assert "wanted one process per rank" in ends["twice"][2].said


def test_strangers_on_the_port_do_not_disturb_the_start(tmp_path: Path) -> None:
    port = free_port()
    first = start(
        Rank(0, "print(watch._watch._ports[0], file=sys.stderr)\n" + MEET, "watch.FIRST_CONTACT_S = 0"), tmp_path, port
    )
    ranks = [first]
    try:
        assert first.stderr is not None
        hub = int(first.stderr.readline())
        for sent in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"launch": "another", "rank": 1}\n', b"x" * 200_000, b""):
            with socket.create_connection(("127.0.0.1", hub), timeout=5) as stranger, contextlib.suppress(OSError):
                stranger.sendall(sent)
        ranks += [start(Rank(1, MEET), tmp_path, port), start(Rank(2, "meet(60); joined(); die()"), tmp_path, port)]
        assert ranks[2].wait(timeout=15) == -signal.SIGKILL
        time.sleep(0.3)
        assert [process.poll() for process in ranks[:2]] == [None, None]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def test_the_kernel_finds_a_machine_that_is_gone_within_20_s() -> None:
    with socket.socket() as connection:
        keep_alive(connection)
        found = [
            connection.getsockopt(socket.IPPROTO_TCP, number)
            for number in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        ]
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert found == [5, 5, 3, 20_000]
