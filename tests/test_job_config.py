"""The job model: what it takes, what it refuses, and that a refusal names the option."""

from __future__ import annotations

from typing import Any

import pytest

from bert_ds.configuration.job_config import parse_job_config, seconds_of
from bert_ds.configuration.recipe.run_config import ConfigError

JOB: dict[str, Any] = {
    "job_name": "base",
    "nodes": 2,
    "gpus_per_node": 8,
    "time": "24:00:00",
    "run": "/shared/run.json",
    "deepspeed_config": "/shared/zero2.json",
    "run_dir": "/shared/runs/base",
}

INJECTIONS = (
    *("a\n#SBATCH --output=/tmp/x", "a\r#SBATCH -o x", "a\x00b", "a\x1b[2J", "$(touch x)", "`touch x`", "a;touch x"),
    *("a&touch x", "a|touch x", "a>x", "a<x", "a b", "a\tb", "'a'", '"a"', "a,BAR=injected", "ALL,LD_PRELOAD=x"),
    *("--wrap=touch x", "-o/tmp/x", "%j", "a%x", "a\\b", "../a", "~/a", "{a,b}", "*", "?", "[a]", "!a", "#a", "a=b"),
    *("\u2028a", "\u202ea", "\ud800", "a\u00a0b", "", " ", "a" * 5000, "a:b", "a@b"),
)
"""Strings that a shell, sbatch or a terminal could read as more than a name."""


def refusal(**changes: Any) -> str:
    """The message of a job with these changes."""
    with pytest.raises(ConfigError) as refused:
        parse_job_config({**JOB, **changes})
    return str(refused.value)


def test_ranks_are_nodes_times_gpus_and_on_a_cpu_partition_nodes_times_tasks() -> None:
    assert parse_job_config(JOB).world_size == 16
    assert parse_job_config({**JOB, "gpus_per_node": 0}).world_size == 2
    assert parse_job_config({**JOB, "gpus_per_node": 0, "tasks_per_node": 3}).world_size == 6


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 300), ("5:06", 306), ("1:02:03", 3723), ("1-2", 93600), ("1-2:3", 93780), ("2-3:4:5", 183845)],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


def test_every_mistake_is_told_at_once_with_the_option_it_was_made_in() -> None:
    assert refusal(nodes="2", partion="gpu", time="1:2:3:4", tasks_per_node=0).splitlines() == [
        '--nodes: found "2", wanted a whole number',
        "--tasks_per_node: found 0, wanted >= 1",
        '--time: found "1:2:3:4", wanted at least a minute, as in 90, 36:00:00 or 2-12:00:00',
        '--partion: unknown setting; did you mean "partition"?',
    ]


def test_ranks_beside_those_of_the_gpus_are_refused() -> None:
    assert refusal(tasks_per_node=4) == (
        "--tasks_per_node: found 4, but every one of the 8 GPUs of a node has one rank; leave it out"
    )


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1], {"a": 1}, 0, -1, 2**63, float("nan")])
def test_a_number_of_nodes_is_a_whole_number_and_nothing_else(value: Any) -> None:
    assert refusal(nodes=value).startswith("--nodes: found")


@pytest.mark.parametrize("text", INJECTIONS)
@pytest.mark.parametrize("field", ["job_name", "account", "partition", "qos", "reservation", "exclude", "time"])
def test_a_name_that_could_be_read_as_more_is_refused(field: str, text: str) -> None:
    assert field in refusal(**{field: text}) or refusal(**{field: text}).startswith("job:")


@pytest.mark.parametrize("text", [one for one in INJECTIONS if set(one) & set("\n\r\x00\x1b%\\\u2028\u202e\ud800")])
@pytest.mark.parametrize("field", ["run", "deepspeed_config", "run_dir"])
def test_a_path_with_control_characters_or_with_what_slurm_expands_is_refused(field: str, text: str) -> None:
    assert field in refusal(**{field: f"/shared/{text}"}) or refusal(**{field: text}).startswith("job:")


@pytest.mark.parametrize("text", ["/a b/ü/$(x);'\".json", "/模型/run.json", "/a,b"])
def test_a_path_may_hold_spaces_quotes_and_any_script(text: str) -> None:
    assert parse_job_config({**JOB, "run_dir": text}).run_dir == text
