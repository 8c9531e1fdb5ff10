"""`bert-ds` around a launcher, tried with real signals on processes that stand for DeepSpeed's and are as frail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_restart import has_ended, wait_until

from bert_ds.basics.processes import STOP_SIGNALS
from bert_ds.launch import launcher
from bert_ds.launch.launcher import _exit_code, starts_one_rank

ROOT = Path(__file__).resolve().parents[1]

BERT_DS = """
import sys
from bert_ds.launch.launcher import run_launcher
sys.exit(run_launcher([sys.executable, "-c", *sys.argv[1:], "deepspeed.launcher.runner"]))
"""

ALONE = """
import sys
from bert_ds.launch.launcher import run_launcher
sys.exit(run_launcher([sys.executable, "-c", sys.argv[-1]]))
"""

RUNNER = """
import os, subprocess, sys
open("runner", "w").write(str(os.getpid()))
launch = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2], "deepspeed.launcher.launch"])
code = launch.wait()
if code > 0:
    sys.exit(code)
"""

LAUNCH = """
import os, subprocess, sys
os.environ["RANK"] = "0"
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
open("launch", "w").write(str(os.getpid()))
sys.exit(rank.wait())
"""

RANK = """
import os, signal, time
from bert_ds.basics.exit_record import record_exit
from bert_ds.training.launch.restart import StopRequest
stop = StopRequest()
stop.install()
heard, handler = [], signal.getsignal(signal.SIGTERM)
signal.signal(signal.SIGTERM, lambda number, frame: (heard.append(number), handler(number, frame)))
open("rank.part", "w").write(str(os.getpid()))
os.rename("rank.part", "rank")
while not stop.reason:
    time.sleep(0.02)
time.sleep(0.4)
open("saved", "w").write(f"{{stop.reason}} x {{len(heard)}}")
record_exit({code})
os._exit({code})
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []
    yield running
    for process in running:
        process.kill()
        process.wait()


def start(
    folder: Path, *, code: int = 75, ignored: tuple[signal.Signals, ...] = (), bert_ds: str = BERT_DS
) -> subprocess.Popen[str]:
    """Start `bert-ds` and wait until its rank is at work."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    environment.pop("RANK", None)

    def dispositions() -> None:
        for number in (*STOP_SIGNALS, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    command = [sys.executable, "-c", bert_ds, RUNNER, LAUNCH, RANK.format(code=code)]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=dispositions
    )
    assert wait_until((folder / "rank").exists, 60)
    return process


def pid_of(folder: Path, name: str) -> int:
    return int((folder / name).read_text())


@pytest.mark.parametrize(
    ("number", "bert_ds"), [*((number, BERT_DS) for number in STOP_SIGNALS), (signal.SIGHUP, ALONE)]
)
def test_a_signal_is_passed_to_the_ranks_once_and_the_save_is_waited_for(
    tmp_path: Path, started: list, number: signal.Signals, bert_ds: str
) -> None:
    started.append(process := start(tmp_path, bert_ds=bert_ds))
    process.send_signal(number)
    assert process.wait(timeout=60) == 75
    assert (tmp_path / "saved").read_text() == "SIGTERM x 1"
    assert process.stderr is not None
    how = "the run is being saved, then this ends; SIGQUIT (Ctrl-\\) ends without the save"
    assert process.stderr.read().splitlines()[0] == f"bert-ds: {number.name}: {how}"


@pytest.mark.parametrize("code", [0, 4])
def test_the_only_rank_is_started_without_a_launcher_and_ends_with_its_own_code(
    tmp_path: Path, started: list, code: int
) -> None:
    started.append(process := start(tmp_path, code=code, bert_ds=ALONE))
    environ = Path(f"/proc/{pid_of(tmp_path, 'rank')}/environ").read_bytes().split(b"\0")
    assert {b"RANK=0", b"LOCAL_RANK=0", b"WORLD_SIZE=1", b"BERT_DS_CALLED_BY=bert-ds"} <= set(environ)
    os.kill(pid_of(tmp_path, "rank"), signal.SIGTERM)
    assert process.wait(timeout=60) == code


@pytest.mark.parametrize(
    ("words", "devices", "nodes", "environment", "one"),
    [
        ([], [], 1, {}, True),
        ([], [], 0, {}, True),
        ([], ["nvidiactl", "null"], 1, {}, True),
        ([], ["nvidia0"], 1, {}, False),
        ([], ["dri/renderD128"], 1, {}, False),
        ([], ["nvidia0"], 1, {"DS_ACCELERATOR": "cpu"}, True),
        ([], [], 2, {}, False),
        (["--num_gpus", "1"], ["nvidia0", "nvidia1"], 2, {}, True),
        (["--num_accelerators=1"], [], 1, {}, True),
        (["--num_gpus", "2"], [], 1, {}, False),
        (["--num_gpus", "1", "--hostfile", "hosts"], [], 1, {}, False),
        (["--enable_each_rank_log", "logs"], [], 1, {}, False),
        ([], [], 1, {"LOCAL_SIZE": "2"}, False),
        (["--num_gpus", "1"], [], 1, {"RANK": "1", "WORLD_SIZE": "2"}, False),
        ([], [], 1, {"SLURM_PROCID": "0"}, False),
    ],
)
def test_one_rank_is_told_by_the_launchers_options_and_the_machine(
    words: list[str],
    devices: list[str],
    nodes: int,
    environment: dict[str, str],
    one: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_SIZE", "SLURM_PROCID", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in devices:
        (tmp_path / "dev" / name).mkdir(parents=True)
    for number in range(nodes):
        (tmp_path / f"sys/devices/system/node/node{number}").mkdir(parents=True)
    assert starts_one_rank(words, devices=tmp_path / "dev", system=tmp_path / "sys") == one


def test_a_hostfile_wants_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launcher, "_HOSTFILE", tmp_path / "hostfile")
    assert starts_one_rank(["--num_gpus", "1"])
    (tmp_path / "hostfile").touch()
    assert not starts_one_rank(["--num_gpus", "1"])


def test_what_a_terminal_sends_reaches_no_process_of_the_launch(tmp_path: Path, started: list) -> None:
    started.append(process := start(tmp_path))
    assert {os.getsid(pid_of(tmp_path, name)) for name in ("runner", "launch", "rank")} == {pid_of(tmp_path, "runner")}
    assert os.getsid(process.pid) != pid_of(tmp_path, "runner")
    process.send_signal(signal.SIGINT)
    wait_until(lambda: False, 0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 75
    assert process.stderr is not None
    lines = process.stderr.read().splitlines()
    assert [line for line in lines if line.startswith("bert-ds: SIGINT again: the run is being saved")]
    assert (tmp_path / "saved").read_text() == "SIGTERM x 1"


@pytest.mark.parametrize("victims", [("runner",), ("launch",)])
def test_a_launcher_that_a_signal_ends_takes_nothing_with_it(
    tmp_path: Path, started: list, victims: tuple[str, ...]
) -> None:
    started.append(process := start(tmp_path))
    for name in victims:
        os.kill(pid_of(tmp_path, name), signal.SIGHUP)
    assert process.wait(timeout=60) == 75
    assert (tmp_path / "saved").exists()


def test_sigquit_ends_all_at_once_without_a_save(tmp_path: Path, started: list) -> None:
    started.append(process := start(tmp_path))
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGQUIT)
    assert process.wait(timeout=60) == 131
    assert not (tmp_path / "saved").exists()
    assert all(has_ended(pid_of(tmp_path, name)) for name in ("runner", "launch", "rank"))


def test_a_launch_does_not_outlive_bert_ds(tmp_path: Path, started: list) -> None:
    started.append(process := start(tmp_path))
    process.kill()
    assert wait_until(lambda: has_ended(pid_of(tmp_path, "runner")), 20)
    os.kill(pid_of(tmp_path, "rank"), signal.SIGKILL)


def test_a_hang_up_is_ignored_under_nohup(tmp_path: Path, started: list) -> None:
    started.append(process := start(tmp_path, ignored=(signal.SIGHUP,)))
    for pid in (process.pid, *(pid_of(tmp_path, name) for name in ("runner", "launch", "rank"))):
        os.kill(pid, signal.SIGHUP)
    assert not wait_until((tmp_path / "saved").exists, 0.7)
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=60) == 75


def test_a_signal_before_there_are_ranks_ends_the_launcher_with_the_same_code(tmp_path: Path, started: list) -> None:
    runner = "import time; open('rank', 'w'); time.sleep(60)"
    code = BERT_DS.replace("*sys.argv[1:]", repr(runner))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    started.append(process := subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True))
    assert wait_until((tmp_path / "rank").exists, 60)
    process.terminate()
    assert process.wait(timeout=60) == 75


@pytest.mark.parametrize(
    ("launcher", "ranks", "asked", "code"),
    [
        (0, [], False, 0),
        (0, [0, 0], False, 0),
        (1, [], False, 1),
        (247, [0], False, 247),
        (-9, [], False, 137),
        (0, [75], False, 75),
        (1, [75, 75], True, 75),
        (1, [0, 0], True, 0),
        (0, [], True, 75),
        (1, [1, 4], True, 4),
        (247, [75, 1], True, 1),
    ],
)
def test_the_exit_code_is_that_of_the_ranks(launcher: int, ranks: list[int], asked: bool, code: int) -> None:
    assert _exit_code(launcher, ranks, asked=asked) == code


def test_a_verb_that_trains_nothing_takes_the_place_of_bert_ds() -> None:
    code = "import os, bert_ds.console as console; os.execve = lambda path, words, env: print(words[1]); console.main()"
    command = [sys.executable, "-c", code, "check_run", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert shown.stdout.strip().endswith("check_run.py")


def test_a_signal_in_the_interpreters_own_end_leaves_the_exit_code(tmp_path: Path) -> None:
    code = BERT_DS.replace("sys.exit(", "code = (") + (
        "import os, signal\n"
        "for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):\n"
        "    os.kill(os.getpid(), number)\n"
        "assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN\n"  # a handler would end before the interpreter
        "sys.exit(code)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, "import sys; sys.exit(4)"], cwd=tmp_path, capture_output=True)
    assert (ended.returncode, ended.stderr) == (4, b"")
