"""Submitting a job: the checks in front of it, the exact command, and that no value is read as more than a value."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from call_watch import Calls
from config_cases import DEEPSPEED, RECIPE, write_json
from forked_verbs import run_verb
from test_job_config import INJECTIONS, JOB

import bert_ds.submit
from bert_ds.configuration.deepspeed_file.ds_config import load_pair
from bert_ds.configuration.job_config import parse_job_config
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.configuration.run_plan import make_plan
from bert_ds.folders.output_folders import open_run_folder
from bert_ds.launch.slurm_job import (
    Speed,
    hours_text,
    job_problems,
    job_rows,
    job_warnings,
    sbatch_command,
    site_settings,
    speed_of_run,
)

ROOT = Path(__file__).resolve().parents[1]

FAKE_SBATCH = """#!{python} -IS
import json, os, sys
with open({record!r}, "a") as file:
    file.write(json.dumps({{"argv": sys.argv[1:], "cwd": os.getcwd()}}) + "\\n")
print("4711;cluster")
"""


def fake_sbatch(folder: Path, text: str = FAKE_SBATCH) -> tuple[Path, dict[str, str]]:
    """A program named sbatch that writes down its arguments; where it writes, and the environment that finds it."""
    programs, record = folder / "bin", folder / "argv.jsonl"
    programs.mkdir(exist_ok=True)
    program = programs / "sbatch"
    program.write_text(text.format(python=sys.executable, record=str(record)), encoding="utf-8")
    program.chmod(0o755)
    return record, {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}


def submit(folder: Path, *arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the verb on a small recipe whose global batch is 48."""
    run, ds = write_json(folder, "run.json", RECIPE), write_json(folder, "zero2.json", DEEPSPEED)
    places = ("--run", run, "--deepspeed_config", ds, "--run_dir", folder / "runs/a")
    with chdir(folder):
        return run_verb(ROOT / "bert_ds/submit.py", *places, *arguments, env=env, timeout_s=60)


def plan_of(folder: Path, world_size: int = 4) -> Any:
    """The plan of the small recipe."""
    run, ds = write_json(folder, "run.json", RECIPE), write_json(folder, "zero2.json", DEEPSPEED)
    return make_plan(*load_pair(run, ds), world_size)


def test_a_whole_job_is_this_command() -> None:
    asked = {
        **{"cpus_per_task": 12, "memory_per_node": "0", "partition": "gpu,long", "account": "nlp", "qos": "high"},
        **{"reservation": "r1", "constraint": "a100&ib", "exclude": "n7", "exclusive": True, "overrides": ["seed=1"]},
    }
    assert sbatch_command(parse_job_config({**JOB, **asked}), Path("/opt/slurm/pretrain.sh")) == [
        *("sbatch", "--parsable", "--job-name=base", "--nodes=2", "--gpus-per-node=8", "--ntasks-per-node=8"),
        *("--cpus-per-task=12", "--mem=0", "--time=24:00:00", "--partition=gpu,long", "--account=nlp", "--qos=high"),
        *("--reservation=r1", "--constraint=a100&ib", "--exclude=n7", "--output=/shared/runs/base/slurm-%j.out"),
        *("--exclusive", "/opt/slurm/pretrain.sh", "/shared/run.json", "/shared/zero2.json", "/shared/runs/base"),
        *("--set", "seed=1"),
    ]


def test_the_least_job_is_this_command() -> None:
    least = {"job_name": "a", "gpus_per_node": 0, "deepspeed_config": "/z.json", "run_dir": "/r"}
    assert sbatch_command(parse_job_config(least), Path("/s/pretrain.sh")) == [
        *("sbatch", "--parsable", "--job-name=a", "--nodes=1", "--ntasks-per-node=1", "--output=/r/slurm-%j.out"),
        *("/s/pretrain.sh", "", "/z.json", "/r"),
    ]


def test_a_job_asks_for_the_preflight_or_does_without_it() -> None:
    for answer in ("on", "off"):
        assert sbatch_command(parse_job_config({**JOB, "preflight": answer}), Path("/s.sh"))[-2:] == [
            "--preflight",
            answer,
        ]
    assert "--preflight" not in sbatch_command(parse_job_config(JOB), Path("/s.sh"))


def test_the_printed_command_is_the_one_that_is_run_and_the_run_folder_keeps_it(tmp_path: Path) -> None:
    record, env = fake_sbatch(tmp_path)
    open_run_folder(tmp_path / "runs/a")
    (tmp_path / "runs/a/submit.json").write_text("mine")
    done = submit(
        tmp_path, "--nodes", 2, "--gpus-per-node", 2, "--time", "2:00:00", "--set", "seed=7", "--exclusive", env=env
    )
    assert done.returncode == 0, done.stderr
    called = json.loads(record.read_text())
    kept = json.loads((tmp_path / "runs/a/submit.json").read_text())
    assert called == {"argv": kept["command"][1:], "cwd": str(ROOT)}
    assert kept["job"] == "4711" and "--exclusive" in called["argv"]
    assert (tmp_path / "runs/a/submit.json.kept-1").read_text() == "mine"
    assert done.stdout.endswith(f"submitted job 4711; its log is {tmp_path}/runs/a/slurm-4711.out\n")
    assert f"cd {ROOT} && sbatch --parsable --job-name=tiny --nodes=2 --gpus-per-node=2" in done.stdout


def test_a_folder_of_somebody_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    record, env = fake_sbatch(tmp_path)
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/submit.json").write_text("mine")
    refused = submit(tmp_path, "--gpus_per_node", 1, env=env)
    assert refused.returncode == 2
    assert "runs/a holds 'submit.json', which is not ours" in refused.stderr
    assert not record.exists()
    assert [(path.name, path.read_text()) for path in (tmp_path / "runs/a").iterdir()] == [("submit.json", "mine")]


def test_a_dry_run_submits_nothing_and_makes_nothing(tmp_path: Path) -> None:
    record, env = fake_sbatch(tmp_path)
    assert submit(tmp_path, "--gpus_per_node", 1, "--dry-run", env=env).returncode == 0
    assert not record.exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--nodes", 5, "--gpus_per_node", 1), "is not a multiple of 5 ranks; with 4 or 6 ranks it is"),
        (("--gpus_per_node", 1, "--gpu_memory_gb", 0.001), "a rank needs at least"),
        (("--gpus_per_node", 1, "--gpu", "H1000"), "--gpu: found 'H1000', wanted one of"),
        (("--gpus_per_node", 1, "--time", "9"), "--time: found 9, wanted at least 10 minutes"),
        (("--gpus_per_node", 1, "--partition", "a b"), '--partition: found "a b", wanted a match of'),
        (("--gpus_per_node", 1, "--set", "optimizer.lrr=1"), "optimizer.lrr: unknown setting"),
        (("--gpus_per_node", 1, "--partion", "gpu"), "did you mean --partition?"),
        (("--gpus_per_node", "two"), "invalid int value: 'two'"),
        (("--gpus_per_node", 1, "--tokens_per_s", "nan"), "--tokens_per_s: found nan, wanted a positive number"),
        (("--gpus_per_node", 1, "--like", "."), "wanted the folder of a run that has logged steps"),
    ],
)
def test_what_cannot_work_is_refused_with_exit_code_2_and_nothing_is_submitted(
    tmp_path: Path, arguments: tuple[object, ...], wanted: str
) -> None:
    record, env = fake_sbatch(tmp_path)
    refused = submit(tmp_path, *arguments, env=env)
    assert refused.returncode == 2
    assert wanted in refused.stderr and "Traceback" not in refused.stderr
    assert not record.exists()


def test_what_sbatch_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    _, env = fake_sbatch(tmp_path, "#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpuu' >&2\nexit 1\n")
    refused = submit(tmp_path, "--gpus_per_node", 1, "--partition", "gpuu", env=env)
    assert refused.returncode == 2
    assert "sbatch refused the job: sbatch: error: invalid partition specified: gpuu" in refused.stderr
    assert not (tmp_path / "runs/a/submit.json").exists()


def test_a_disk_without_room_for_the_checkpoints_is_refused(tmp_path: Path) -> None:
    job = parse_job_config({**JOB, "run_dir": str(tmp_path / "runs/a")})
    plan = plan_of(tmp_path)
    assert job_problems(job, plan, gpu_memory_bytes=None, held_bytes=0) == []
    found = job_problems(job, plan, gpu_memory_bytes=None, held_bytes=-(10**18))
    assert len(found) == 1 and found[0].startswith(f"--run_dir {tmp_path}/runs/a: its checkpoints need")


def test_what_the_checkpoints_of_a_run_hold_already_is_room_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_run_folder(tmp_path / "runs/a")
    plan = plan_of(tmp_path, 1)
    room = shutil._ntuple_diskusage(10**12, 0, plan.disk_bytes - 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    places = ("--run", tmp_path / "run.json", "--deepspeed_config", tmp_path / "zero2.json")
    words = (*places, "--run_dir", tmp_path / "runs/a", "--gpus_per_node", 0, "--dry_run")
    monkeypatch.setattr(sys, "argv", list(map(str, ("submit.py", *words))))
    with pytest.raises(ConfigError, match="its checkpoints need"):
        bert_ds.submit.main()
    for step in (9, 10):
        checkpoint = tmp_path / f"runs/a/checkpoints/global_step{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights.pt").write_bytes(bytes(1000))
    calls = Calls(monkeypatch, bert_ds.submit, job_rows=Calls.THROUGH)
    assert bert_ds.submit.main() == 0 and calls["job_rows"][0]["done_steps"] == 10
    assert "after step 10" not in capsys.readouterr().out  # without a speed there is no estimate


def test_the_estimate_of_time_names_its_source_and_counts_starts(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert plan.max_tokens_per_step == 48 * 128
    job = parse_job_config({**JOB, "time": "0:51:00"})  # of which 5 minutes are left for the save
    rows = dict(job_rows(job, plan, speed=Speed(48 * 128 / 100, "given"), done_steps=10))
    assert rows["time"] == (
        "at most 02:30 h for 90 steps after step 10 at 61 tokens/s (given); 4 starts of 0:51:00"
    )  # 46 minutes each
    warnings = job_warnings(job, plan, speed=Speed(48 * 128 / 100, "given"))
    assert warnings == ["checkpoints are 02:47 h apart and a start lasts 0:51:00: a fault may cost all of it"]
    assert "not known" in dict(job_rows(job, plan, speed=None, done_steps=0))["time"]


def test_a_run_by_the_clock_takes_its_minutes(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    training = plan.run.training.model_copy(update={"total_steps": None, "max_minutes": 150.0})
    plan = replace(plan, run=plan.run.model_copy(update={"training": training}))
    job = parse_job_config({**JOB, "time": "0:51:00"})  # of which 5 minutes are left for the save
    rows = dict(job_rows(job, plan, speed=Speed(61.44, "given"), done_steps=0))
    assert rows["time"].startswith("at most 02:30 h for training.max_minutes at 61 tokens/s")


def test_the_speed_of_another_run_is_taken_per_rank(tmp_path: Path) -> None:
    rows = [{"kind": "start", "step": 0, "plan": {"global batch": "48 = 4 micro-batch x 3 accumulation x 4 ranks"}}]
    rows += [
        {"kind": "train", "step": step, "tokens_per_s": speed} for step, speed in ((1, 10.0), (2, 1000.0), (3, 900.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    speed = speed_of_run(tmp_path, world_size=8)
    assert speed == Speed(1800.0, f"measured in {tmp_path} on 4 ranks, taken 2 times")


def test_an_open_precision_is_planned_as_bf16_for_gpus_and_that_is_said(tmp_path: Path) -> None:
    def rows(*options: object) -> dict[str, str]:
        done = submit(tmp_path, "--dry_run", *options)
        assert done.returncode == 0, done.stderr
        return dict(re.split(r"  +", line, maxsplit=1) for line in done.stdout.splitlines() if "  " in line)

    ds = write_json(tmp_path, "open.json", {"zero_optimization": {"stage": 2}})
    places = ("--deepspeed_config", ds, "--set", "training.precision=auto", "--gpu", "H100", "--gpus_per_node")
    on_gpus, on_cpus = rows(*places, 2), rows(*places, 0, "--tasks_per_node", 2)
    bf16 = rows(*places, 2, "--set", "training.precision=bf16")
    assert on_gpus.pop("precision") == "decided at the launch (planned for bf16, which auto is on a GPU)"
    assert on_gpus == bf16
    assert "precision decided at the launch (planned for fp32)" in on_cpus["run"] and "precision" not in on_cpus


@pytest.mark.parametrize(("seconds", "text"), [(59, "00:01 h"), (7260, "02:01 h"), (90000, "1-01:00 h")])
def test_durations_are_hours_and_minutes(seconds: float, text: str) -> None:
    assert hours_text(seconds) == text


def test_only_plain_values_are_taken_from_a_site_file_and_no_shell_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "site.env"
    path.write_text(
        "PYTHON=/x\nexport SBATCH_PARTITION=gpu # ours\nexport SBATCH_ACCOUNT=$(touch x)\n#export SBATCH_QOS=a\n"
        "export SBATCH_EXPORT='a b'\nexport NCCL_DEBUG=INFO\n"
    )
    assert site_settings(path) == {"SBATCH_PARTITION": "gpu"}
    assert site_settings(tmp_path / "missing") == {}


FIELDS = (
    *("job_name", "partition", "account", "qos", "reservation", "constraint", "exclude", "memory_per_node", "time"),
    *("run", "deepspeed_config", "run_dir", "overrides"),
)


@pytest.mark.parametrize("field", FIELDS)
def test_no_string_in_any_field_has_an_effect_beyond_its_own_word(tmp_path: Path, field: str) -> None:
    """Every string that is accepted arrives at a real program as one word, and nothing else happens."""
    record, env = fake_sbatch(tmp_path)
    harmless = {"constraint": "a100", "partition": "gpu", "exclude": "n1", "overrides": ["seed=1"]}
    words = len(sbatch_command(parse_job_config({**JOB, **{k: v for k, v in harmless.items() if k == field}}), ROOT))
    taken = 0
    for text in (*INJECTIONS, f"$(touch {tmp_path}/canary)", f"; touch {tmp_path}/canary #"):
        value: Any = text
        if field in ("run", "deepspeed_config", "run_dir"):
            value = f"/shared/{text}"
        elif field == "overrides":
            value = [f"name={text}"]
        try:
            command = sbatch_command(parse_job_config({**JOB, field: value}), ROOT / "slurm/pretrain.sh")
        except ConfigError:
            continue
        subprocess.run(command, env=env, cwd=tmp_path, check=True, capture_output=True, timeout=60)
        called = json.loads(record.read_text().splitlines()[-1])["argv"]
        assert called == command[1:]
        assert len(command) == words
        taken += 1
    # Slurm gives the others no character that a shell or sbatch could read.
    assert (taken > 0) == (field in ("run", "deepspeed_config", "run_dir", "overrides", "constraint")), taken
    assert not (tmp_path / "canary").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"bin", "argv.jsonl"}
