"""Verbs as a user starts them, without the seconds that every start spends on importing."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fork_server import launch, plain_environment, rank_facts


def run_verb(
    *command: object, env: dict[str, str] | None = None, world_size: int | None = None, timeout_s: float = 240.0
) -> subprocess.CompletedProcess[str]:
    """Run a script with the interpreter of the tests and return what it wrote and its exit code.

    Args:
        command: script and arguments; what begins with `-m` or `-c` gets a new interpreter.
        env: added to the environment.
        world_size: as so many ranks, like a launcher; None is a process that no launcher started. The outputs are those
            of all ranks one after the other, the exit code is the first that is not 0.
        timeout_s: then all ranks are killed.
    """
    words, environment = [str(word) for word in command], plain_environment() | (env or {})
    if words[0].startswith("-"):
        return subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, env=environment, timeout=timeout_s
        )
    ranks = [{}] if world_size is None else rank_facts(world_size)
    with tempfile.TemporaryDirectory() as folder:
        files = [{name: f"{folder}/{name}{rank}" for name in ("out", "err")} for rank in range(len(ranks))]
        orders = [
            {"argv": words, "env": environment | facts, "cwd": os.getcwd(), **own}
            for facts, own in zip(ranks, files, strict=True)
        ]
        code = next((code for code in launch(orders, timeout_s=timeout_s) if code), 0)
        out, err = ("".join(Path(own[name]).read_text("utf-8", "replace") for own in files) for name in ("out", "err"))
    return subprocess.CompletedProcess(words, code, out, err)


def run_text(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    """Run a text as a script, which has `sys` and finds the modules of these folders first."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(f"import sys\nsys.path[:0] = {[str(one) for one in folders]}\n{code}", encoding="utf-8")
        return run_verb(script)
