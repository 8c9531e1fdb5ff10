"""The `bert-ds VERB` command of an installed package.

Each verb is a script of this folder. It runs exactly as when it is started by path, so that a script has one way to
start and is never imported: in place of this process, or on every rank through the DeepSpeed launcher.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bert_ds.launch.command_line import USER_ERRORS, report_error
from bert_ds.launch.launch_checks import CHECKS
from bert_ds.launch.launcher import run_launcher
from bert_ds.launch.launcher_log import RUNNER, logged_command

TRAINING_VERBS = ("pretrain", "finetune", "score")
"""Verbs that run on every rank, through the DeepSpeed launcher."""

SINGLE_VERBS = (
    "train_wordpiece",
    "build_shards",
    "check_run",
    "submit",
    "runs",
    "judge_launch",
    "export_hf",
    "report",
    "show_masks",
    "probe",
)
"""Verbs that run once, on one machine."""

QUIET = ("--log_level", "warning")
"""What the launcher says of every launch stands in logs/launcher.log; a --log_level of the user comes later."""

USAGE = """usage: bert-ds VERB [arguments]
       bert-ds pretrain [launcher arguments --] [arguments]

verbs that train (started through the deepspeed launcher): {training}
other verbs: {single}

bert-ds VERB --help shows the arguments of a verb."""


def verb_command(verb: str, arguments: list[str]) -> list[str]:
    """Return the command line that runs one verb.

    Arguments of a training verb that stand before a lone "--" go to the DeepSpeed launcher.
    """
    script = script_of(verb)
    if verb not in TRAINING_VERBS or arguments in (["-h"], ["--help"]):
        return [sys.executable, script, *arguments]
    split = arguments.index("--") if "--" in arguments else 0
    launcher_arguments = arguments[:split]
    script_arguments = arguments[split + 1 :] if "--" in arguments else arguments
    return [sys.executable, "-m", RUNNER, *QUIET, *launcher_arguments, script, *script_arguments]


def script_of(verb: str) -> str:
    """Return the path of a verb's script."""
    return str(Path(__file__).resolve().parent / f"{verb}.py")


def main() -> int:
    """Run the verb named on the command line and return its exit code."""
    usage = USAGE.format(training=", ".join(TRAINING_VERBS), single=", ".join(SINGLE_VERBS))
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0 if arguments else 2
    verb = arguments[0].replace("-", "_")
    if verb not in TRAINING_VERBS + SINGLE_VERBS:
        print(f"bert-ds: unknown verb {arguments[0]!r}\n{usage}", file=sys.stderr)
        return 2
    command = verb_command(verb, arguments[1:])
    if RUNNER in command:
        sys.argv = command[command.index(script_of(verb)) :]  # what is wrong is said in a rank's words
        try:
            run_dir = CHECKS[verb](sys.argv[1:])
        except USER_ERRORS as error:
            return report_error(error)
        return run_launcher(command if run_dir is None else logged_command(command, run_dir / "logs/launcher.log"))
    sys.stdout.flush()
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
