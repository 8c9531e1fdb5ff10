"""The job: what is asked of Slurm for one run, validated before anything is submitted.

Every value goes to `sbatch` as one word of an argument list; no shell ever reads it. Slurm itself reads some words
further (`%j` in a file name, a comma in a list), so whatever it could read as more than a plain value is refused.
Standard library and pydantic only, like the recipe.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from bert_ds.configuration.reading.config_files import MAX_DEPTH, ConfigError
from bert_ds.configuration.reading.config_problems import Problem, describe, section_problems
from bert_ds.configuration.reading.config_section import Section

MAX_RANKS = 2**20

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""What Slurm calls jobs, partitions, accounts: no space, comma, quote or newline."""
Names = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}(,[A-Za-z0-9][A-Za-z0-9._-]{0,63}){0,31}$")]
"""Several names with commas between them."""
PlainPath = Annotated[str, Field(pattern=r"^/[^%\\]*$", max_length=4000)]
"""An absolute path; Slurm reads % and \\ in the names of its output files."""
Override = Annotated[str, Field(pattern=r"^[A-Za-z$_][A-Za-z0-9$._-]{0,200}=", max_length=4000)]
"""section.name=value."""
Constraint = Annotated[str, Field(pattern=r"^[A-Za-z0-9._&|*()\[\]-]{1,200}$")]
Memory = Annotated[str, Field(pattern=r"^[0-9]{1,9}[KMGT]?$")]
_TIME = re.compile(r"[0-9]{1,3}-[0-9]{1,2}(:[0-9]{1,2}){0,2}|[0-9]{1,6}(:[0-9]{1,2}){0,2}")


def _check_time(text: str) -> str:
    if not _TIME.fullmatch(text) or seconds_of(text) < 60:
        raise ValueError(f"found {describe(text)}, wanted at least a minute, as in 90, 36:00:00 or 2-12:00:00")
    return text


TimeLimit = Annotated[str, AfterValidator(_check_time)]
"""As sbatch takes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""


class JobConfig(Section):
    """What a run asks of Slurm."""

    job_name: Name
    """Name of the job in the queue."""
    nodes: Annotated[int, Field(ge=1, le=65536)] = 1
    """Machines."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)]
    """GPUs of each machine, one rank each; 0 trains on CPUs."""
    tasks_per_node: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Ranks of each machine without GPUs; null is one."""
    cpus_per_task: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Processor cores of each rank; null leaves it to the cluster."""
    memory_per_node: Memory | None = None
    """Host memory of each machine, as in 200G; 0 is all of it; null leaves it to the cluster."""
    time: TimeLimit | None = None
    """Longest time of one start; the run saves and queues again before it is over. null is the partition's."""
    partition: Names | None = None
    """Partition, or several with commas."""
    account: Name | None = None
    """Account that is charged."""
    qos: Name | None = None
    """Quality of service."""
    reservation: Name | None = None
    """Reservation."""
    constraint: Constraint | None = None
    """Features that the nodes must have."""
    exclude: Names | None = None
    """Nodes that must not be used."""
    exclusive: bool = False
    """Whole machines."""
    run: PlainPath | None = None
    """Recipe; null is the embedded default."""
    deepspeed_config: PlainPath
    """DeepSpeed file."""
    run_dir: PlainPath
    """Run folder, on a file system that all nodes share."""
    overrides: tuple[Override, ...] = ()
    """Overrides of the recipe, section.name=value each."""
    preflight: Literal["auto", "on", "off"] = "auto"
    """Whether every node is measured before the first step; auto is on for several nodes."""

    @property
    def ranks_per_node(self) -> int:
        """Ranks of each machine: one per GPU, or tasks_per_node."""
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.ranks_per_node

    @property
    def time_s(self) -> int | None:
        """The time limit in seconds."""
        return None if self.time is None else seconds_of(self.time)


def parse_job_config(values: Mapping[str, Any]) -> JobConfig:
    """Validate a job given as JSON values by the names of the fields.

    Raises:
        ConfigError: with one line per problem, all at once; each begins with the option that is wrong.
    """
    problems: list[Problem] = []
    job = None
    try:
        job = JobConfig.model_validate_json(json.dumps(values))
    except ValidationError as error:
        problems = section_problems(error, JobConfig)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"job: wanted JSON values, at most {MAX_DEPTH} levels deep: {describe(str(error))}") from None
    if job is not None:
        problems = _problems(job)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(_line(one) for one in problems)))
    assert job is not None
    return job


def _line(problem: Problem) -> str:
    option, _, rest = problem.path.partition(".")
    return Problem(rest, problem.text).line(f"--{option}" if option else "job")


def seconds_of(time: str) -> int:
    """Return a time limit as sbatch spells it in seconds."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return (int(days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds


def _problems(job: JobConfig) -> list[Problem]:
    problems = []
    if job.gpus_per_node and job.tasks_per_node not in (None, job.gpus_per_node):
        text = f"found {job.tasks_per_node}, but every one of the {job.gpus_per_node} GPUs of a node has one rank"
        problems.append(Problem("tasks_per_node", f"{text}; leave it out"))
    if job.world_size > MAX_RANKS:
        problems.append(Problem("nodes", f"{job.world_size} ranks are more than {MAX_RANKS}"))
    for name in ("run", "deepspeed_config", "run_dir", "overrides"):
        value = getattr(job, name) or ""
        problems += [
            Problem(name, f"found {describe(text)}, wanted printable text")
            for text in ([value] if isinstance(value, str) else value)
            if not text.isprintable()
        ]
    return problems
