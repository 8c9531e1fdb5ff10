"""The DeepSpeed launcher as `bert-ds` runs it: whatever signal comes, the ranks save, and the exit code is theirs.

Where it would start one rank alone, that is started instead of it: its imports take seconds.

DeepSpeed's own two processes die of SIGHUP and SIGUSR1, kill ranks that still save 30 s after SIGTERM or SIGINT, and
then answer 1, or 0 where the upper one has not seen how the lower one ended. So they get a session of their own, which
no terminal signals, and what `bert-ds` is asked goes to the ranks alone, and once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import FrameType

from bert_ds.basics.exit_record import VARIABLE, read_exits
from bert_ds.basics.processes import (
    command_of,
    in_session,
    is_rank,
    parent_of,
    signal_at_parents_death,
    stop_signals_heard,
)
from bert_ds.basics.ranks import EXIT_DONE, EXIT_RUN_AGAIN
from bert_ds.launch.command_line import CALLED_BY

LAUNCHER_OPTIONS = (
    *("-H", "--hostfile", "-i", "--include", "-e", "--exclude", "--num_nodes", "--num_gpus", "--num_accelerators"),
    *("--master_port", "--master_addr", "--node_rank", "--launcher", "--launcher_args", "--enable_each_rank_log"),
    *("--autotuning", "--bind_core_list", "--ssh_port", "--venv_script", "--log_level"),
)
"""Of DeepSpeed 0.19.8's launcher, those with a value."""
LAUNCHER_FLAGS = (
    *("--module", "--no_python", "--no_local_rank", "--no_ssh", "--no_ssh_check", "--force_multi", "--save_pid"),
    *("--bind_cores_to_rank", "-q", "--quiet"),
)
"""And those without."""
_ONE_RANK = frozenset(f"--num_{what}{between}1" for what in ("gpus", "accelerators") for between in ("=", " "))
_HOSTFILE = Path("/job/hostfile")
"""Where DeepSpeed's launcher looks for other machines unasked."""
_ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel*", "davinci[0-9]*", "hl[0-9]*", "dri/renderD*")
OF_ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
_LOOK_EVERY_S = 0.2


def launcher_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide a command line into what is for DeepSpeed's launcher and what is for the script that it starts.

    All that stands before a lone "--" is the launcher's; without one its options are picked out by their names.
    """
    if "--" in words:
        split = list(words).index("--")
        return list(words[:split]), list(words[split + 1 :])
    theirs: list[str] = []
    own: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        name = name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name
        if name in LAUNCHER_FLAGS:
            theirs.append(name)
        elif name in LAUNCHER_OPTIONS:
            theirs += [name + word[len(name) :]] if equals else [name, *islice(rest, 1)]
        else:
            own.append(word)
    return theirs, own


def starts_one_rank(words: Sequence[str], *, devices: Path = Path("/dev"), system: Path = Path("/sys")) -> bool:
    """Whether DeepSpeed's launcher would start one rank on this machine for these options: nothing needs it for that.

    So it is where one is asked for, and without options where there is neither an accelerator nor a second processor
    with memory of its own, of which each gets a rank. Not within a job that has ranks already.

    Args:
        words: all that is for the launcher.
        devices, system: where Linux shows its devices and itself.
    """
    if _HOSTFILE.exists() or {"RANK", "WORLD_SIZE", "LOCAL_SIZE", "SLURM_PROCID"} & os.environ.keys():
        return False
    if words:
        return " ".join(words) in _ONE_RANK
    has_accelerator = any(any(devices.glob(pattern)) for pattern in _ACCELERATORS)
    is_alone = len(list(system.glob("devices/system/node/node[0-9]*"))) <= 1
    return is_alone and (not has_accelerator or os.environ.get("DS_ACCELERATOR") == "cpu")


def run_launcher(command: list[str]) -> int:
    """Run the launcher and return the exit code of its ranks; 75 where they have been asked to stop.

    SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask the ranks to save and stop, and are waited out. SIGHUP stays ignored where
    it is (`nohup`). SIGQUIT kills all of the launch and ends this process with 131. Main thread only.

    Args:
        command: the launcher's command line, or that of a script as the only rank.
    """
    with tempfile.TemporaryDirectory(prefix="bert-ds-") as records:
        launch = _Launch(command, Path(records))
        for number in stop_signals_heard():
            signal.signal(number, launch.on_signal)
        signal.signal(signal.SIGQUIT, launch.on_signal)
        code = launch.run()
        for number in stop_signals_heard():
            signal.signal(number, signal.SIG_IGN)  # the interpreter's end would put back what dies of them
        if launch.is_killed:
            return 128 + signal.SIGQUIT
        return _exit_code(code, [record.code for record in read_exits(Path(records)).values()], asked=launch.is_asked)


class _Launch:
    """The launcher's processes and ranks."""

    def __init__(self, command: list[str], records: Path) -> None:
        self._command, self._records = command, records
        self._process: subprocess.Popen[bytes] | None = None
        self.is_asked = self.is_killed = False

    def run(self) -> int:
        """Start the launcher and return its code once it and all that it has started have ended."""
        facts = {} if any("deepspeed.launcher" in word for word in self._command) else OF_ONE_RANK
        self._process = subprocess.Popen(
            self._command,
            env={VARIABLE: str(self._records), CALLED_BY: "bert-ds", **os.environ, **facts},
            start_new_session=True,
            preexec_fn=lambda: signal_at_parents_death(signal.SIGTERM),
        )
        if self.is_asked:  # while it was being started
            self._ask()
        code = self._process.wait()
        while members := self._members():
            if self.is_killed:
                self._send(signal.SIGKILL, members)
            elif not self.is_asked:
                self.is_asked = True
                self._say("the launcher has died")
                self._ask()
            time.sleep(_LOOK_EVERY_S)
        return code

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Pass the first stop signal on; say what goes on. SIGQUIT kills."""
        if number == signal.SIGQUIT:
            self.is_killed = self.is_asked = True
            return self._send(signal.SIGKILL, self._members())
        again, self.is_asked = self.is_asked, True
        self._say(signal.Signals(number).name + (" again" if again else ""))
        if self._process is not None and not again:
            self._ask()

    def _say(self, what: str) -> None:
        text = f"bert-ds: {what}: the run is being saved, then this ends; SIGQUIT (Ctrl-\\) ends without the save\n"
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            os.write(2, text.encode())

    def _ask(self) -> None:
        """Ask the ranks to stop; where there is none on this machine, ask the launcher, for nothing is trained here."""
        members = self._members()
        self._send(signal.SIGTERM, [pid for pid in members if is_rank(pid) and not is_rank(parent_of(pid))] or members)

    def _members(self) -> list[int]:
        """Return the launcher's processes and the ranks with theirs; not what somebody else keeps in the session."""
        session = self._process.pid if self._process is not None else 0
        pids = in_session(session) if session else []
        return [pid for pid in pids if is_rank(pid) or pid == session or "deepspeed.launcher" in command_of(pid)]

    @staticmethod
    def _send(number: signal.Signals, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _exit_code(launcher_code: int, rank_codes: list[int], *, asked: bool) -> int:
    """Return what the ranks have recorded, an error before anything else; without records what the launcher says."""
    if errors := set(rank_codes) - {EXIT_DONE, EXIT_RUN_AGAIN}:
        return min(errors, key=lambda code: (code == 1, code))  # one without a meaning is mostly what another led to
    if EXIT_RUN_AGAIN in rank_codes:
        return EXIT_RUN_AGAIN
    if asked:
        return EXIT_DONE if rank_codes else EXIT_RUN_AGAIN
    return launcher_code if launcher_code >= 0 else 128 - launcher_code
