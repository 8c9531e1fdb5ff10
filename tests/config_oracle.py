"""The judge of configuration files: what a reader of files made of one, and whether it should have.

A file is either refused, with lines that name what is wrong, or accepted. Accepted means honoured: `Subject.ignored`
finds no setting of it that the resolved configuration does not hold.
"""

from __future__ import annotations

import contextlib
import io
import time
import traceback
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from config_damage import Damage

from bert_ds.configuration.reading.config_problems import printable
from bert_ds.configuration.recipe.run_config import ConfigError


class Answer(NamedTuple):
    """What a reader made of a file."""

    lines: tuple[str, ...]
    """Error lines; empty where it was accepted."""
    crash: str
    """The traceback, where it ended in any other way."""
    seconds: float
    """Of processor time."""


class Subject(NamedTuple):
    """A kind of file, and what reads it."""

    name: str
    data: dict[str, Any]
    """A file that is right."""
    read: Callable[[Path], object]
    """Reads a file as its verb does, and raises ConfigError."""
    ignored: Callable[[Path], list[str]]
    """What of an accepted file is not in the resolved configuration, or cannot work."""
    free: tuple[str, ...] = ()
    """Patterns of settings whose names and types are the user's own."""


def ask(subject: Subject, file: Path) -> Answer:
    """Let the subject's reader read a file."""
    lines: tuple[str, ...] = ()
    crash = ""
    begun = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            subject.read(file)
        except ConfigError as error:
            lines = tuple(str(error).splitlines())
        except BaseException:
            crash = traceback.format_exc()
    return Answer(lines, crash, time.process_time() - begun)


def verdict(subject: Subject, file: Path, answer: Answer, damage: Damage) -> str:
    """Return "refused" or "accepted" where that is right, and otherwise what is wrong with it."""
    is_free = any(fnmatchcase(damage.path, pattern) for pattern in subject.free)
    is_wrong = damage.is_wrong and not is_free
    if answer.crash:
        return "crashed: " + answer.crash.strip().splitlines()[-1]
    if answer.lines:
        if any("hunter2" in line or not line.isprintable() for line in answer.lines):
            return "the message shows a secret or a control character"
        is_mentioned = not is_wrong and mentions_setting(answer, damage.path)
        if is_mentioned or names_setting(answer, file, damage.path):
            return "refused"
        return f"the message does not name it: {answer.lines[0]}"
    if is_wrong:
        return "was accepted"
    ignored = subject.ignored(file)
    return f"was accepted and ignored: {', '.join(ignored[:3])}" if ignored else "accepted"


def names_setting(answer: Answer, file: Path, path: str) -> bool:
    """Whether a line is about this setting of this file, a section around it, or a part of it."""
    shown = printable(path)
    for line in answer.lines:
        if not line.startswith(f"{file}: "):
            continue
        where = line.removeprefix(f"{file}: ").partition(": ")[0]
        if shown == where or shown.startswith(where + ".") or where.startswith(shown + "."):
            return True
        # A setting whose name is misspelt is named beside the one that is missing for it.
        if shown.rpartition(".")[0] == where.rpartition(".")[0] and shown.rpartition(".")[2] in line:
            return True
    return False


def mentions_setting(answer: Answer, path: str) -> bool:
    """Whether a line mentions the setting, if only as the other side of a contradiction."""
    name = next((part for part in reversed(path.split(".")) if not part.isdigit()), path)
    return any(name in line for line in answer.lines)
