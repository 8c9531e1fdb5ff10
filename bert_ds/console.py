"""The `bert-ds VERB` command of an installed package.

Each verb is a script of this folder. It runs exactly as when it is started by path, so that a script has one way to
start and is never imported: in place of this process, or on every rank through the DeepSpeed launcher.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bert_ds import __version__
from bert_ds.configuration.reading.config_problems import did_you_mean
from bert_ds.launch.command_line import CALLED_BY, USER_ERRORS, report_error
from bert_ds.launch.launch_checks import CHECKS
from bert_ds.launch.launcher import launcher_words, run_launcher, starts_one_rank
from bert_ds.launch.launcher_log import RUNNER, logged_command
from bert_ds.launch.verbs import VERBS

QUIET = ("--log_level", "warning")
"""What the launcher says of every launch stands in logs/launcher.log; a --log_level of the user comes later."""

USAGE = """usage: bert-ds VERB [arguments]

verbs, in the order of use:
{verbs}

Those with a * are started on every rank through the DeepSpeed launcher, whose options, as --num_gpus, may stand
anywhere. bert-ds VERB --help shows the arguments of a verb and an example."""


def verb_command(verb: str, arguments: list[str]) -> list[str]:
    """Return the command line that runs one verb.

    Of a training verb, the options that the DeepSpeed launcher knows go to it, and all that stands before a lone "--".
    """
    script = script_of(verb)
    if not is_launched(verb, arguments):
        return [sys.executable, script, *arguments]
    for_launcher, own = launcher_words(arguments)
    if starts_one_rank(for_launcher):
        return [sys.executable, script, *own]
    return [sys.executable, "-m", RUNNER, *QUIET, *for_launcher, script, *own]


def is_launched(verb: str, arguments: list[str]) -> bool:
    """Whether this runs on every rank; a search does not, which starts its trials itself."""
    given = {word.partition("=")[0] for word in arguments}
    return VERBS[verb].is_launched and ("--search" not in given or "--trial" in given)


def script_of(verb: str) -> str:
    """Return the path of a verb's script."""
    return str(Path(__file__).resolve().parent / f"{verb}.py")


def usage() -> str:
    """Return what `bert-ds --help` says."""
    width = max(map(len, VERBS)) + 1
    rows = [f"  {name + '*' * verb.is_launched:<{width}}  {verb.purpose}" for name, verb in VERBS.items()]
    return USAGE.format(verbs="\n".join(rows))


def main() -> int:
    """Run the verb named on the command line and return its exit code."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"bert-ds {__version__}")
        return 0
    verb = arguments[0].replace("-", "_")
    if verb not in VERBS:
        hint = did_you_mean(verb, VERBS)
        print(f"bert-ds: unknown verb {arguments[0]!r}{hint} (bert-ds --help lists them)", file=sys.stderr)
        return 2
    command = verb_command(verb, arguments[1:])
    if is_launched(verb, arguments[1:]):
        return launch(verb, command)
    sys.stdout.flush()
    os.execve(command[0], command, {**os.environ, CALLED_BY: "bert-ds"})


def launch(verb: str, command: list[str]) -> int:
    """Refuse what is wrong, in a rank's words; else run the launcher. Return the exit code."""
    words = command[command.index(script_of(verb)) + 1 :]
    sys.argv = [f"bert-ds {verb}", *words]
    try:
        run_dir = CHECKS[verb](words)
    except USER_ERRORS as error:
        return report_error(error)
    return run_launcher(command if run_dir is None else logged_command(command, run_dir / "logs/launcher.log"))


if __name__ == "__main__":
    sys.exit(main())
