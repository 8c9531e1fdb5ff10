"""How a launch ends, tried with real signals and real parents."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from bert_ds.basics.processes import STOP_SIGNALS
from bert_ds.basics.ranks import CheckpointError
from bert_ds.training.launch.restart import StopRequest, is_done, mark_done

ROOT = Path(__file__).resolve().parents[1]

CHILD = """
import sys, time
from bert_ds.training.launch.restart import StopRequest, follow_launcher
stop = StopRequest()
stop.install()
follow_launcher(stop, grace_s={grace}, poll_s=0.05)
print("ready", flush=True)
while not stop.reason:
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
    kept = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever has started the tests
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


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_asks_for_a_stop_and_is_named(number: signal.Signals) -> None:
    stop = StopRequest()
    stop.install()
    assert not stop.reason
    os.kill(os.getpid(), number)
    assert stop.reason == number.name


def test_no_later_signal_interrupts_the_save_and_a_second_ctrl_c_says_how_to_end_without(
    capfd: pytest.CaptureFixture[str],
) -> None:
    stop, before = StopRequest(), signal.getsignal(signal.SIGQUIT)
    stop.install()
    for number in (*STOP_SIGNALS, *STOP_SIGNALS):
        os.kill(os.getpid(), number)
    assert stop.reason == "SIGTERM"
    how = f"SIGQUIT (Ctrl-\\, kill -QUIT {os.getpid()}) ends without it"
    assert capfd.readouterr().err.splitlines() == [
        f"SIGTERM: saving at the end of this step; {how}",
        f"SIGINT again: the save is under way; {how}",
        f"SIGINT again: the save is under way; {how}",
    ]
    assert signal.getsignal(signal.SIGQUIT) == before


def test_only_one_rank_speaks(capfd: pytest.CaptureFixture[str]) -> None:
    stop = StopRequest()
    stop.install(speaks=False)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    assert (stop.reason, capfd.readouterr().err) == ("SIGINT", "")


def test_a_hang_up_that_is_ignored_at_the_start_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    stop.install()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.reason


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


def test_a_worker_stops_whose_launchers_died_while_it_was_imported(tmp_path: Path) -> None:
    told = tmp_path / "told"
    environment = os.environ | {"RANK": "0", "CROSS_SIZE": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", CHILD.format(grace=60, then=""), str(told)]
    subprocess.run(command, env=environment, check=True, timeout=60, capture_output=True)
    assert told.read_text() == "the launcher has died"


def test_a_worker_stops_whose_launcher_has_lost_its_runner(tmp_path: Path) -> None:
    """The process between them is gone when the worker looks; whoever adopts orphans is the launcher's parent."""
    told = tmp_path / "told"
    launcher = f"import os, time\nwhile os.getppid() == int(os.environ['BETWEEN']): time.sleep(0.02)\n{PARENT}"
    between = (
        "import os, subprocess, sys\n"
        "os.environ['BETWEEN'] = str(os.getpid())\n"
        "print(subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL).pid)\n"
    )
    environment = os.environ | {"RANK": "0", "CROSS_SIZE": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    code = CHILD.format(grace=60, then="")
    command = [sys.executable, "-c", launcher, code, str(told), "-m deepspeed.launcher.launch"]
    started = subprocess.run(
        [sys.executable, "-c", between, *command], env=environment, check=True, timeout=60, stdout=subprocess.PIPE
    )
    assert wait_until(lambda: told.exists() and told.read_text() == "the deepspeed runner has died", 60)
    os.kill(int(started.stdout), signal.SIGKILL)


def test_what_a_killed_worker_has_forked_dies_with_it() -> None:
    code = (
        "import os, time\n"
        "from bert_ds.training.launch.restart import StopRequest, follow_launcher\n"
        "follow_launcher(StopRequest())\n"
        "pid = os.fork()\n"
        "if pid:\n"
        "    print(pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert worker.stdout is not None
    forked = int(worker.stdout.readline())
    assert not has_ended(forked)
    worker.kill()
    worker.wait()
    assert wait_until(lambda: has_ended(forked), 10)


def test_a_worker_that_saves_is_given_the_time_it_needs(tmp_path: Path) -> None:
    saving = "with stop.training():\n    time.sleep(1.5)\nopen(sys.argv[1], 'w').write('saved')\ntime.sleep(60)"
    parent, pid = start_child_of_a_launcher(tmp_path / "told", grace=0.3, then=saving)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: has_ended(pid), 20)
    assert (tmp_path / "told").read_text() == "saved"


def test_a_worker_that_does_not_stop_ends_after_the_grace_period(tmp_path: Path) -> None:
    parent, pid = start_child_of_a_launcher(tmp_path / "told", grace=0.3, then="time.sleep(60)")
    parent.kill()
    parent.wait()
    assert wait_until(lambda: has_ended(pid), 10)


def test_done_is_said_by_a_marker(tmp_path: Path) -> None:
    assert not is_done(tmp_path)
    mark_done(tmp_path, {"step": 10})
    assert is_done(tmp_path)


def test_a_disk_that_is_full_at_the_last_mark_is_told_with_what_stands_and_what_to_do(tmp_path: Path) -> None:
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"has ended well and its last checkpoint is saved.*File too large"):
            mark_done(tmp_path, {"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


WITHOUT_A_TERMINAL = """
import sys, time
from bert_ds.launch.command_line import run_main
from bert_ds.training.launch.restart import StopRequest
def main():
    stop = StopRequest()
    stop.install()
    print("ready", flush=True)
    for step in range(20):
        time.sleep(0.03)
        print("step", step, flush=True)
        print("step", step, file=sys.stderr)
    open(sys.argv[1], "w").write(str(stop.reason))
    return 0 if stop.reason is None else 75
run_main(main, leave_at_once=True)
"""


@pytest.mark.parametrize(
    ("owns_terminal", "ignores", "reason"),
    [(False, False, "None"), (True, True, "None"), (True, False, "SIGHUP")],
    ids=["setsid", "nohup", "plain"],
)
def test_a_closed_terminal_stops_a_rank_unless_it_was_started_by_setsid_or_nohup(
    tmp_path: Path, owns_terminal: bool, ignores: bool, reason: str
) -> None:
    def enter() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignores else signal.SIG_DFL)
        if owns_terminal:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    terminal, side = os.openpty()
    command = [sys.executable, "-c", WITHOUT_A_TERMINAL, str(tmp_path / "told")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    process = subprocess.Popen(
        command, stdin=side, stdout=side, stderr=side, env=environment, start_new_session=True, preexec_fn=enter
    )
    os.close(side)
    assert os.read(terminal, 5) == b"ready"
    os.close(terminal)
    assert process.wait(timeout=60) == (0 if reason == "None" else 75)
    assert (tmp_path / "told").read_text() == reason
