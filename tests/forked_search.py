"""finetune.py as a search whose trials are forks of it, which have imported everything; started by `run_verb`.

SEARCH_STOPS_AT in the environment is the number of the start after which the search is asked to stop.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bert_ds.launch import search


class Forked:
    """A fork with a command line of its own, with what a search asks of subprocess.Popen."""

    started = 0

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        log.parent.mkdir(exist_ok=True)
        sys.stdout.flush()
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                os.environ.clear()
                os.environ.update(environment)
                file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                for number in (1, 2):
                    os.dup2(file, number)
                sys.argv = list(command[1:])
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as leaving:
                code = int(leaving.code or 0)
            finally:
                sys.stdout.flush()
                os._exit(code)
        Forked.started += 1
        if str(Forked.started) == os.environ.get("SEARCH_STOPS_AT"):
            os.kill(os.getpid(), signal.SIGTERM)

    def poll(self) -> int | None:
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.02)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self._pid, number)


if __name__ == "__main__":
    search.start = Forked  # type: ignore[assignment,misc]
    sys.argv[0] = str(Path(search.__file__).resolve().parents[1] / "finetune.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
