"""A real Slurm of two nodes on this machine, in a folder of its own: munge, slurmctld, two slurmd.

Nothing outside the folder is read or written (SLURM_CONF names its own slurm.conf, munge its own key and socket), and
only processes that were started here are ended, by their numbers.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROGRAMS = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "shellcheck": "shellcheck",
}
"""Program -> Debian's package."""
NODES = ("node1", "node2")
REQUEUE_WAIT_S = 20
"""A job that was queued again waits as long as credentials live; Slurm's default is 120 s."""

SLURM_CONF = """\
ClusterName=bertds
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire={wait_s}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_min_interval=200000
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=15
KillWait=20
MinJobAge=3600
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=1000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=1000
PartitionName=cpu Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


def missing_packages() -> list[str]:
    """Debian packages of the programs that are not installed."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return sorted({package for program, package in PROGRAMS.items() if shutil.which(program, path=path) is None})


class SlurmCluster:
    """slurmctld and two slurmd that run in a folder; `start` and `stop`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = os.environ["PATH"] + ":/usr/sbin:/sbin"
        self.environment = {name: text for name, text in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.environment.update(SLURM_CONF=str(folder / "slurm.conf"), PATH=path)

    def start(self) -> None:
        """Start every daemon and wait until both nodes are idle."""
        folder = self.folder
        (folder / "state").mkdir(parents=True)
        facts = {"host": socket.gethostname(), "ports": _free_ports(3), "user": getpass.getuser()}
        text = SLURM_CONF.format(folder=folder, wait_s=REQUEUE_WAIT_S, **facts)
        (folder / "slurm.conf").write_text(text, encoding="utf-8")
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = {"key-file": key, "socket": folder / "munge.sock", "pid-file": folder / "munged.pid"}
        files |= {"log-file": folder / "munged.log", "seed-file": folder / "munge.seed"}
        self.run("munged", "--force", *(f"--{name}={path}" for name, path in files.items()))
        self.run("slurmctld", "-c")
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: self.node_states() == {"node1": "idle", "node2": "idle"}, seconds=60)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self.run("slurmd", "-N", node)

    def daemon_of(self, node: str) -> int:
        """Process of a node's slurmd."""
        return int((self.folder / f"slurmd-{node}.pid").read_text())

    def kill_node(self, node: str) -> None:
        """Let a node die: its slurmd, its slurmstepds and their tasks, all at once."""
        steps = [
            pid for pid, words in processes().items() if words[0].startswith("slurmstepd") and self._is_on(pid, node)
        ]
        assert steps, f"{node} runs no step"
        for pid in [self.daemon_of(node), *steps, *(child for step in steps for child in descendants(step))]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Cancel every job and end every daemon."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--full", f"--user={getpass.getuser()}")
            wait_until(lambda: self.run("squeue", "-h", "-t", "R,CG") == "", seconds=60)
        for name in ("slurmctld", "slurmd-node1", "slurmd-node2", "munged"):
            path = self.folder / f"{name}.pid"
            if path.exists():
                end_process(int(path.read_text()))

    def run(self, *command: object, cwd: Path | None = None) -> str:
        """Run a command against this cluster and return what it prints."""
        done = subprocess.run(
            [str(word) for word in command], env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout.strip()

    def node_states(self) -> dict[str, str]:
        """Node -> state in one word."""
        return dict(line.split() for line in self.run("sinfo", "-N", "-h", "-o", "%N %t").splitlines())

    def job_fact(self, job: str, name: str) -> str:
        """One field of `scontrol show job`."""
        text = self.run("scontrol", "show", "job", "-o", job)
        return next((word.partition("=")[2] for word in text.split() if word.startswith(f"{name}=")), "")

    def job_state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, ..."""
        return self.job_fact(job, "JobState")

    def wait_for_end(self, job: str, *, seconds: float) -> tuple[str, int]:
        """Wait until a job is over and return its state and exit code."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        wait_until(lambda: self.job_state(job) in over, seconds=seconds)
        return self.job_state(job), int(self.job_fact(job, "ExitCode").partition(":")[0])

    def _is_on(self, pid: int, node: str) -> bool:
        """Whether a slurmstepd belongs to a node: it writes into the log of that node's slurmd."""
        return str(self.folder / f"slurmd-{node}.log") in _open_files(pid)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A running Slurm; its job scripts find the interpreter of the tests."""
    missing = missing_packages()
    assert not missing, f"apt-get install {' '.join(missing)}"
    slurm = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    site = slurm.folder / "site.env"
    site.write_text(f"PYTHON={sys.executable}\nexport MASTER_ADDR=127.0.0.1\n", encoding="utf-8")
    slurm.environment.update(BERT_DS_SITE=str(site), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


def wait_until(condition: Callable[[], bool], *, seconds: float) -> None:
    """Look every fifth of a second until the condition holds.

    Raises:
        AssertionError: it does not after that many seconds.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still waiting after {seconds} s"
        time.sleep(0.2)


def processes() -> dict[int, list[str]]:
    """Process -> words of its command line, of every process that has one."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if words[0]:
                found[int(path.parent.name)] = words
    return found


def processes_of(run_dir: Path) -> list[int]:
    """Processes whose command line names a run folder: its ranks and their launchers."""
    return [pid for pid, words in processes().items() if any(str(run_dir) in word for word in words)]


def processes_left(run_dir: Path, *, seconds: float = 15.0) -> list[int]:
    """What `processes_of` still finds after so long; Slurm calls a job ended while its last processes are ending."""
    deadline = time.monotonic() + seconds
    while (found := processes_of(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def descendants(pid: int) -> Iterator[int]:
    """Children of a process, and theirs."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in path.read_text().split():
                yield int(child)
                yield from descendants(int(child))


def end_process(pid: int) -> None:
    """End a daemon: politely, and after ten seconds for good."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        for _ in range(50):
            os.kill(pid, 0)
            time.sleep(0.2)
        os.kill(pid, signal.SIGKILL)


def _open_files(pid: int) -> str:
    names = []
    for path in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            names.append(os.readlink(path))
    return "\n".join(names)


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


if __name__ == "__main__":
    if names := missing_packages():
        sys.exit(f"test-slurm needs programs that are not installed; Debian, Ubuntu: apt-get install {' '.join(names)}")
