"""What every verb's command line has in common: spelling of options, exit codes, one-line errors, progress."""

from __future__ import annotations

import argparse
import atexit
import difflib
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO, cast

from bert_ds import __version__
from bert_ds.basics.exit_record import record_exit
from bert_ds.basics.ranks import (
    EXIT_CHECKPOINT,
    EXIT_CONFIG,
    EXIT_DATA,
    EXIT_DIVERGED,
    EXIT_DONE,
    CheckpointError,
    DataError,
    DivergedError,
    LauncherError,
)
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.launch.start_watch import START_LIMIT_S, say_ended

Report = Callable[[int, str], None]
"""Called with the amount done so far and a short text about it."""

_EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (ConfigError, EXIT_CONFIG),
    (LauncherError, EXIT_CONFIG),
    (DataError, EXIT_DATA),
    (CheckpointError, EXIT_CHECKPOINT),
    (DivergedError, EXIT_DIVERGED),
)
USER_ERRORS = tuple(kind for kind, _ in _EXIT_CODES)
"""What the user can act upon."""
CALLED_BY = "BERT_DS_CALLED_BY"
"""Environment variable: what has started this script, where that is not a person with its path."""
SPIN_COUNT = "5000"
"""How long a thread of GNU OpenMP spins for the next piece of work: enough for the next operator of a step, as waking
takes time, and short beside the default, which keeps the core from a thread that others hold up."""
_PLAIN_LINE_EVERY_S = 10.0


def make_parser(description: str, *, example: str = "") -> argparse.ArgumentParser:
    """Return a parser whose options are spelled with underscores and understood with hyphens too.

    Options cannot be abbreviated. A mistake ends the process with exit code 2 and one line on stderr.
    """
    parser = _Parser(
        prog=program_name(),
        description=description,
        epilog=f"example:\n  {example}" if example else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"bert-ds {__version__}")
    return parser


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """Add what every verb that trains is told about a launch, not about the recipe.

    What a launcher or habit adds (--local_rank, --deepspeed) is accepted and unused.
    """
    parser.add_argument(
        "--resume",
        choices=("never", "auto", "must"),
        default="never",
        help="auto: continue from the newest whole checkpoint if there is one (default: %(default)s)",
    )
    parser.add_argument(
        "--hang_limit",
        type=_limit_s,
        default=600.0,
        metavar="SECONDS",
        help="end with exit code 75 and the stacks of all ranks after so long without progress, 0: never "
        "(default: %(default)s; three times as long in the first step, an evaluation or a save)",
    )
    parser.add_argument(
        "--start_limit",
        type=_limit_s,
        default=START_LIMIT_S,
        metavar="SECONDS",
        help="end with exit code 75 and their names when ranks have not come after so long, 0: never "
        "(default: %(default)s; a rank that has come and died ends the start at once)",
    )
    parser.add_argument(
        "--preflight",
        choices=("auto", "on", "off"),
        default="auto",
        help="measure every node before the first step, refuse one that is slow, full or late (default: %(default)s, "
        "which is on for several nodes)",
    )
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def positive(text: str) -> float:
    """Return the positive number that a word is; for `type` of an option."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e7:
        raise argparse.ArgumentTypeError(f"found {text}, wanted a positive number")
    return value


def run_main(main: Callable[[], int | None], *, leave_at_once: bool = False) -> NoReturn:
    """Run a verb and end the process with the documented exit code.

    Errors that the user can act upon become one message on stderr without a traceback; anything else is a defect of
    this program and keeps its traceback.

    Args:
        main: the verb; returns an exit code, None for 0.
        leave_at_once: skip the teardown of the interpreter once the exit handlers have run. For verbs that join a
            process group: a background thread of gloo that is still there aborts the teardown now and then, and the
            launcher then takes a finished run for a failed one. What such a verb prints is lost, and not the run with
            it, where the terminal is closed or the other end of the pipe has gone.
    """
    message = ""
    if not gc.isenabled():
        gc.freeze()  # what has been imported stays, and need not be looked at in a step
        gc.enable()
    if leave_at_once:
        sys.stdout, sys.stderr = cast("TextIO", _Unfailing(sys.stdout)), cast("TextIO", _Unfailing(sys.stderr))
    try:
        code = main() or EXIT_DONE
    except USER_ERRORS as error:
        code, message = report_error(error), str(error)
    except KeyboardInterrupt:
        print(f"{program_name()}: interrupted", file=sys.stderr)
        code = 130
    except SystemExit as error:
        say_ended(error.code if isinstance(error.code, int) else int(error.code is not None))
        raise
    except Exception as error:
        record_exit(1, f"{type(error).__name__}: {error}")
        if not leave_at_once:
            raise
        traceback.print_exc()
        code, message = 1, f"{type(error).__name__}: {error}"
    record_exit(code, message)
    say_ended(code, message)
    if leave_at_once:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def answer_early(check: Callable[[], object]) -> None:
    """Do what can be done before torch is imported; a mistake, or --help, ends the process as in `run_main`.

    OpenMP, which torch brings, reads its settings when it is loaded: SPIN_COUNT takes the place of its default. Until
    `run_main` no garbage is looked for: imports leave none, and what they bring would be looked at again and again.

    Args:
        check: reads the command line, and says what of it and of its files is wrong without torch.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    gc.disable()
    failures: tuple[type[BaseException], ...] = (SystemExit, *USER_ERRORS)
    try:
        check()
    except failures as error:
        ending = error

        def end() -> NoReturn:
            raise ending

        run_main(end)


def report_error(error: Exception) -> int:
    """Print one of USER_ERRORS on stderr and return its exit code."""
    print(f"{program_name()}: error: {error}", file=sys.stderr)
    return next(code for kind, code in _EXIT_CODES if isinstance(error, kind))


def program_name() -> str:
    """Return how this program was called: `bert-ds VERB`, or the file name of a script that was started by path."""
    name = os.path.basename(sys.argv[0])
    return f"bert-ds {name.removesuffix('.py')}" if os.environ.get(CALLED_BY) == "bert-ds" else name


@contextmanager
def show_progress(label: str, *, total: int | None = None) -> Iterator[Report]:
    """Yield a function that shows how far a long piece of work is.

    A bar on a terminal; elsewhere a plain line every ten seconds, so that log files stay readable.
    `total` is in the unit the reports use, None where it is not known.
    """
    if sys.stderr.isatty():
        with _progress_bar(label, total) as report:
            yield report
    else:
        yield _plain_lines(label, total)


class _Parser(argparse.ArgumentParser):
    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([_with_underscores(word) for word in given], namespace)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        # A misspelt option comes before what argparse says of it: that the one which was meant is missing.
        words = [_with_underscores(word) for word in (sys.argv[1:] if args is None else args)]
        options = [word for word in words if word.startswith("--") and word != "--"]
        self._refuse_unknown([word for word in options if word.partition("=")[0] not in self._option_string_actions])
        parsed, unknown = self.parse_known_args(args, namespace)
        self._refuse_unknown(unknown)
        return parsed

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        if words:
            name = words[0].partition("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unknown argument {name}{hint}")

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_CONFIG, f"{self.prog}: error: {message} (--help lists the options)\n")


class _Unfailing:
    """A text stream whose reader may go away; its log file has every line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def _limit_s(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text}, wanted a number of seconds, or 0")
    return value


def _with_underscores(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


@contextmanager
def _progress_bar(label: str, total: int | None) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[text]}"), console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, text="")
        yield lambda done, text: progress.update(task, completed=done, text=text)


def _plain_lines(label: str, total: int | None) -> Report:
    last = time.monotonic()

    def report(done: int, text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _PLAIN_LINE_EVERY_S:
            last = time.monotonic()
            share = f" {100 * done / total:.0f} %" if total else ""
            print(f"{label}:{share} {text}", file=sys.stderr, flush=True)

    return report
