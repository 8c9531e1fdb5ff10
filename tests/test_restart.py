"""How a launch ends, tried with real signals and real parents."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bert_ds.training.restart import StopRequest, is_done, mark_done

ROOT = Path(__file__).resolve().parents[1]

CHILD = """
import sys, time
from bert_ds.training.restart import StopRequest, follow_launcher
stop = StopRequest()
stop.install()
follow_launcher(stop, grace_s={grace}, poll_s=0.05)
print("ready", flush=True)
while not stop.requested:
    time.sleep(0.02)
open(sys.argv[1], "w").write(stop.reason)
{then}
"""

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def restored_handlers() -> object:
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


RUNNER = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", *sys.argv[2:]], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline(), end="", flush=True)
child.wait()
"""


def start_child_of_a_launcher(told: Path, *, grace: float, then: str) -> tuple[subprocess.Popen, int]:
    code = CHILD.format(grace=grace, then=then)
    environment = os.environ | {"RANK": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, code, str(told)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def start_grandchild_of_deepspeeds_runner(told: Path) -> tuple[subprocess.Popen, int]:
    """The worker, under what looks like DeepSpeed's per-node launcher, under what looks like its runner."""
    code = CHILD.format(grace=60, then="")
    environment = os.environ | {"RANK": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", RUNNER, "deepspeed", PARENT, code, str(told), "-m deepspeed.launcher.launch"]
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert runner.stdout is not None
    return runner, int(runner.stdout.readline())


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def wait_until(condition: object, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_asks_for_a_stop_and_is_named(number: signal.Signals) -> None:
    stop = StopRequest()
    stop.install()
    assert not stop.requested
    os.kill(os.getpid(), number)
    assert stop.reason == number.name


def test_a_second_interrupt_is_not_held_back() -> None:
    stop = StopRequest()
    stop.install()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_a_worker_whose_launcher_is_killed_is_asked_to_stop(tmp_path: Path) -> None:
    told = tmp_path / "told"
    parent, pid = start_child_of_a_launcher(told, grace=60, then="")
    parent.kill()
    parent.wait()
    assert wait_until(lambda: has_ended(pid), 10)
    assert told.read_text() in ("SIGTERM", "the launcher has died")


def test_a_worker_stops_when_deepspeeds_runner_dies_though_its_own_launcher_lives_on(tmp_path: Path) -> None:
    told = tmp_path / "told"
    runner, pid = start_grandchild_of_deepspeeds_runner(told)
    launcher = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    runner.kill()
    runner.wait()
    assert wait_until(lambda: has_ended(pid), 10)
    assert told.read_text() == "the deepspeed runner has died"
    os.kill(launcher, signal.SIGKILL)


def test_what_a_killed_worker_has_forked_dies_with_it(tmp_path: Path) -> None:
    code = (
        "import os, time\n"
        "from bert_ds.training.restart import StopRequest, follow_launcher\n"
        "stop = StopRequest()\n"
        "stop.install()\n"
        "follow_launcher(stop)\n"
        "pid = os.fork()\n"
        "if pid:\n"
        "    print(pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert worker.stdout is not None
    forked = int(worker.stdout.readline())
    os.kill(forked, signal.SIGTERM)
    assert not wait_until(lambda: has_ended(forked), 0.3)
    worker.kill()
    worker.wait()
    assert wait_until(lambda: has_ended(forked), 10)


def test_a_worker_that_does_not_stop_ends_after_the_grace_period(tmp_path: Path) -> None:
    parent, pid = start_child_of_a_launcher(tmp_path / "told", grace=0.3, then="time.sleep(60)")
    parent.kill()
    parent.wait()
    assert wait_until(lambda: has_ended(pid), 10)


def test_done_is_said_by_a_marker(tmp_path: Path) -> None:
    assert not is_done(tmp_path)
    mark_done(tmp_path, {"step": 10})
    assert is_done(tmp_path)
