"""DeepSpeed's launcher with all that it says of a launch in a file; the terminal has what --log_level lets through.

    python -m bert_ds.launch.launcher_log FILE deepspeed.launcher.runner ARGUMENTS

Of its two processes the upper one, the runner, starts the lower one, the launch, on this machine in the same way. What
it starts on other machines logs there, as ever. A file that cannot be written costs the lines and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RUNNER, LAUNCH = "deepspeed.launcher.runner", "deepspeed.launcher.launch"
LOGGER = "DeepSpeed"
_OWN = "bert_ds.launch.launcher_log"


def logged_command(command: Sequence[str], log: Path) -> list[str]:
    """Return the command line of a process of DeepSpeed's launcher as one that logs; any other one as it is."""
    words = list(command)
    place = next((i for i in range(1, len(words)) if words[i - 1] == "-m" and words[i] in (RUNNER, LAUNCH)), None)
    return words if place is None else [*words[:place], _OWN, str(log), *words[place:]]


def main() -> None:
    log, module, *words = sys.argv[1:]
    _log_into(logging.getLogger(LOGGER), Path(log))
    if module == RUNNER:
        vars(subprocess)["Popen"] = _logging_popen(Path(log))
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _log_into(logger: logging.Logger, log: Path) -> None:
    """Write everything from INFO on into a file, whatever level DeepSpeed gives its logger and all of its handlers."""
    with contextlib.suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
    file = _File(log, encoding="utf-8", delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.setLevel(logging.INFO)
    vars(logger)["setLevel"] = lambda level: None
    logger.addHandler(file)


class _File(logging.FileHandler):
    def setLevel(self, level: int | str) -> None:
        """Stay at INFO."""
        super().setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line; the file is opened at the first one."""
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """A launch does not end for its log."""


def _logging_popen(log: Path) -> type[subprocess.Popen[Any]]:
    class Popen(subprocess.Popen[Any]):
        def __init__(self, args: Any, *rest: Any, **options: Any) -> None:
            super().__init__(logged_command(args, log) if isinstance(args, list) else args, *rest, **options)

    return Popen


if __name__ == "__main__":
    main()
