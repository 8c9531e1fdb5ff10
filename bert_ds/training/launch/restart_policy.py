"""What a job does when a launch has ended: it is done, the launch is repeated, the job is queued again, or it stops.

Restarting inside the job takes a second, being queued again two minutes, so the first is preferred. A launch counts as
progress only if it left a newer checkpoint; too many in a row without one end the job. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from bert_ds.basics.exit_record import ExitRecord
from bert_ds.basics.input_gate import read_json
from bert_ds.basics.ranks import EXIT_CHECKPOINT, EXIT_CONFIG, EXIT_DATA, EXIT_DIVERGED, EXIT_DONE, EXIT_RUN_AGAIN

PERMANENT = {
    EXIT_CONFIG: "the configuration is wrong",
    EXIT_DATA: "the data are unusable",
    EXIT_CHECKPOINT: "no checkpoint can be used or written",
    EXIT_DIVERGED: "the run has diverged",
}
"""Exit codes that another launch would meet again."""
MAX_DELAY_S = 60
_SRUN_TASK = re.compile(r"^srun: error: (?P<node>[^ :]+): tasks? (?P<ranks>[0-9][0-9,-]*): (?P<how>.*)$", re.MULTILINE)
"""The first such line is of the rank that began it; what --kill-on-bad-exit then ends comes after it."""

Action = Literal["done", "again", "requeue", "stop"]


@dataclass(frozen=True)
class LaunchEnd:
    """Facts about a launch that has ended."""

    exits: Mapping[int, ExitRecord]
    """Of the ranks that ended in an orderly way."""
    world_size: int
    srun_code: int
    """Exit code of the launcher."""
    newest_step: int
    """Step of the newest checkpoint, 0 without one."""
    is_done: bool
    """This launch has marked the run as done."""
    stop: Literal["", "USR1", "TERM"] = ""
    """Signal that the job has received: the time is nearly up, or Slurm ends the job."""
    nodes_answer: bool = True
    """Every node of the job starts a task when asked to."""
    srun_said: str = ""
    """What srun wrote on stderr: which task ended first, on which node and how."""


class Progress(NamedTuple):
    """What a job remembers from launch to launch, through being queued again too."""

    job: str = ""
    """Slurm's number of the job; another job starts to count anew, as a human has looked."""
    best_step: int = 0
    """Step of the newest checkpoint so far."""
    without_progress: int = 0
    """Launches in a row that left no newer checkpoint."""
    launches: int = 0
    """Launches of the job in all."""

    @classmethod
    def load(cls, path: Path, job: str) -> Progress:
        """Return what this job has stored, else a fresh start."""
        try:
            value = read_json(path)
            numbers = [value[name] for name in cls._fields[1:]]
        except (OSError, ValueError, KeyError, TypeError):
            return cls(job)
        return cls(job, *numbers) if value["job"] == job and all(type(one) is int for one in numbers) else cls(job)

    def after(self, newest_step: int) -> Progress:
        """Count one launch."""
        stuck = 0 if newest_step > self.best_step else self.without_progress + 1
        return Progress(self.job, max(newest_step, self.best_step), stuck, self.launches + 1)


class Verdict(NamedTuple):
    """What happens next."""

    action: Action
    exit_code: int
    """Of the job, where it ends now."""
    delay_s: int
    """Before the next launch."""
    sentence: str
    """Why, for the log."""


def judge(end: LaunchEnd, progress: Progress, *, limit: int) -> tuple[Verdict, Progress]:
    """Decide what happens after a launch.

    Args:
        end: facts about the launch.
        progress: of the job, before this launch.
        limit: launches in a row without a newer checkpoint after which the job stops.

    Returns:
        the verdict, and the progress to remember.
    """
    after = progress.after(end.newest_step)
    at = f"at step {end.newest_step}"
    saved = f"saved {at}" if end.newest_step else "no checkpoint yet"
    if (failed := _permanent(end)) is not None:
        code, who = failed
        return Verdict("stop", code, 0, f"stopped, {PERMANENT[code]}: {who}"), after
    if end.is_done:
        return Verdict("done", EXIT_DONE, 0, f"done {at}"), after
    why = how_it_ended(end)
    if end.stop == "TERM":
        text = f"ended by Slurm, {saved}; it continues if Slurm starts the job again or it is submitted once more"
        return Verdict("stop", EXIT_RUN_AGAIN, 0, text), after
    if after.without_progress >= limit:
        text = f"stopped: {after.without_progress} launches in a row left no checkpoint newer than step "
        return Verdict("stop", 1, 0, f"{text}{after.best_step}; the last one: {why}"), after
    if end.stop == "USR1":
        return Verdict("requeue", EXIT_RUN_AGAIN, 0, f"the time is nearly up, {saved}: queueing the job again"), after
    if _all_asked_to_stop(end):
        return Verdict("requeue", EXIT_RUN_AGAIN, 0, f"asked to stop, {saved}: queueing the job again"), after
    if not end.nodes_answer:
        return Verdict(
            "requeue", EXIT_RUN_AGAIN, 0, f"{why}, and a node does not answer: queueing the job again"
        ), after
    delay = min(MAX_DELAY_S, 10 * max(0, after.without_progress - 1))
    return Verdict("again", EXIT_RUN_AGAIN, delay, f"{why}; launching again from step {end.newest_step}"), after


def how_it_ended(end: LaunchEnd) -> str:
    """Return one clause about the ranks of a launch."""
    hangs = [record.message for record in end.exits.values() if record.code == EXIT_RUN_AGAIN and record.message]
    if hangs:
        return hangs[0]  # the error of a rank that lost its neighbour then is a consequence
    for rank, record in end.exits.items():
        if record.code not in (EXIT_DONE, EXIT_RUN_AGAIN):
            return f"rank {rank} ended with exit code {record.code}" + (
                f" ({record.message})" if record.message else ""
            )
    if first := _SRUN_TASK.search(end.srun_said):
        return f"rank {first['ranks']} on {first['node']} ended without a word (srun: {first['how'].strip()})"
    silent = sorted(set(range(end.world_size)) - set(end.exits))
    if len(silent) == end.world_size:
        return f"all ranks ended without a word (srun: {end.srun_code})"
    if silent:
        shown = ", ".join(map(str, silent[:8])) + (", ..." if len(silent) > 8 else "")
        return f"rank {shown} ended without a word (srun: {end.srun_code})"
    return f"the ranks ended although the run is not done (srun: {end.srun_code})"


def _permanent(end: LaunchEnd) -> tuple[int, str] | None:
    for rank, record in end.exits.items():
        if record.code in PERMANENT:
            return record.code, f"rank {rank}: {record.message}"
    if not end.exits and end.srun_code in PERMANENT:
        return end.srun_code, "see the logs of the ranks"
    return None


def _all_asked_to_stop(end: LaunchEnd) -> bool:
    return len(end.exits) == end.world_size and set(end.exits.values()) == {ExitRecord(EXIT_RUN_AGAIN, "")}
