"""The job scripts without a Slurm: what they hand to srun, tried with programs that only write down their arguments.

What Slurm makes of it is tried in test_slurm.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

RECORDER = """#!{python} -IS
import json, os, pathlib, sys
with open({folder!r} + "/calls.jsonl", "a") as file:
    names = ("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "BERT_DS_EXITS")
    environment = {{name: os.environ.get(name) for name in names}}
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:], environment]) + "\\n")
if sys.argv[0].endswith("scontrol") and sys.argv[1:2] == ["show"]:
    print("nid1\\nnid2")
if sys.argv[0].endswith("srun") and any(word.endswith(("pretrain.py", "finetune.py")) for word in sys.argv):
    run_dir = pathlib.Path(sys.argv[sys.argv.index("--run_dir") + 1])
    if "--trial" in sys.argv:
        run_dir /= "trial_" + sys.argv[sys.argv.index("--trial") + 1].zfill(3)
    (run_dir / "DONE").write_text("{{}}")
"""


def run_job(
    folder: Path, *arguments: object, script: str = "pretrain.sh", site: str = "", **slurm: str
) -> tuple[int, str, list]:
    """Run a job script of two nodes as Slurm would; its exit code, its log, and the calls of Slurm's programs."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("srun", "scontrol", "squeue", "scancel"):
        (programs / name).write_text(RECORDER.format(python=sys.executable, folder=str(folder)), encoding="utf-8")
        (programs / name).chmod(0o755)
    (folder / "site.env").write_text(f"PYTHON={sys.executable}\n{site}\n", encoding="utf-8")
    facts = {
        **{"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "nid[1-2]"},
        **{"SLURM_JOB_NAME": "bert", "SLURM_CPUS_ON_NODE": "16", "SLURM_SUBMIT_DIR": str(ROOT)},
    }
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    environment = {**kept, **facts, **slurm, "PATH": f"{programs}:{os.environ['PATH']}"}
    environment["BERT_DS_SITE"] = str(folder / "site.env")
    command = ["bash", str(ROOT / "slurm" / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    calls = folder / "calls.jsonl"
    return (
        done.returncode,
        done.stdout + done.stderr,
        [json.loads(one) for one in calls.read_text().splitlines()] if calls.exists() else [],
    )


def launch(calls: list) -> list:
    """The call of srun that starts the ranks."""
    return next(call for call in calls if call[0] == "srun" and any(str(word).endswith("pretrain.py") for word in call))


def test_a_job_of_16_gpus_starts_16_ranks_that_see_all_gpus_of_their_node(tmp_path: Path) -> None:
    ds = ROOT / "ds_configs/zero2.json"
    code, log, calls = run_job(
        tmp_path, "", ds, tmp_path / "a b", "--set", "seed=1", "--hang_limit", 5, SLURM_GPUS_ON_NODE="8"
    )
    assert code == 0, log
    *words, environment = launch(calls)
    assert words == [
        *("srun", "--kill-on-bad-exit=1", "--wait=600", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8"),
        *("--cpus-per-task=2", "--input=none", "--open-mode=append", f"--output={tmp_path}/a b/logs/rank_%t.out"),
        *("--gpu-bind=none", sys.executable, f"{ROOT}/bert_ds/pretrain.py", "--deepspeed_config", str(ds)),
        *("--run_dir", f"{tmp_path}/a b", "--resume", "auto", "--set", "seed=1", "--hang_limit", "5"),
    ]
    assert environment == {
        "MASTER_ADDR": "nid1",
        "MASTER_PORT": str(12000 + (4711 * 16 + 1) % 20000),
        "OMP_NUM_THREADS": "2",
        "BERT_DS_EXITS": f"{tmp_path}/a b/logs/exits",
    }
    assert log.splitlines()[-1] == "job 4711: done at step 0"


@pytest.mark.parametrize(
    ("slurm", "ranks", "cores"),
    [
        ({}, "2", "16"),
        ({"SLURM_NTASKS_PER_NODE": "4"}, "8", "4"),
        ({"SLURM_NTASKS": "4"}, "4", "8"),
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "3"}, "8", "3"),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS_PER_NODE": "4"}, "8", "4"),
    ],
)
def test_ranks_and_cores_follow_from_what_was_asked_of_sbatch(
    tmp_path: Path, slurm: dict[str, str], ranks: str, cores: str
) -> None:
    code, log, calls = run_job(tmp_path, "", "", tmp_path / "run", **slurm)
    assert code == 0, log
    assert {f"--ntasks={ranks}", f"--cpus-per-task={cores}"} <= set(map(str, launch(calls)))


def test_in_a_container_every_python_process_runs_in_it(tmp_path: Path) -> None:
    site = "SRUN_FLAGS=(--container-image=/x.sqsh)\nCONTAINER=(apptainer exec x.sif)"
    code, log, calls = run_job(tmp_path, "", "", tmp_path / "run", site=site)
    assert code == 1
    assert log.endswith('judge_launch.py answered ""\n'), "the recorder in the place of srun runs no judge"
    *words, _ = next(call for call in calls if "check_run.py" in str(call))
    assert words[:5] == ["srun", "--nodes=1", "--ntasks=1", "--overlap", "--input=none"]
    assert words[5:9] == ["--container-image=/x.sqsh", "apptainer", "exec", "x.sif"]
    launched = launch(calls)
    assert launched[launched.index("--container-image=/x.sqsh") + 1 :][:4] == [
        "apptainer",
        "exec",
        "x.sif",
        sys.executable,
    ]


@pytest.mark.parametrize(
    ("arguments", "slurm", "wanted"),
    [
        (("", "", "run"), {"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "2"}, "2 tasks per node, but every one"),
        (("", "", "run"), {"SLURM_GPUS_ON_NODE": "32"}, "16 cores for 32 ranks of a node: add --exclusive, or"),
        (("", "", "a%j"), {}, "Slurm would read % and"),
        (("nowhere.json", "", "run"), {}, "nowhere.json: No such file or directory"),
        (("", "", "run", "--set", "seed=-1"), {}, "--set: seed: found -1, wanted >= 0"),
        (("", "", "run", "--set=seed=-1"), {}, "--set: seed: found -1, wanted >= 0"),
        (("", "", "run"), {"SLURM_SUBMIT_DIR": "/"}, "holds no bert_ds/: submit from there, or set BERT_DS_ROOT"),
        (("", "", "run"), {"SLURM_JOB_NUM_NODES": "7"}, "ranks"),
    ],
)
def test_what_cannot_work_ends_the_job_with_exit_code_2_before_a_rank_starts(
    tmp_path: Path, arguments: tuple[str, ...], slurm: dict[str, str], wanted: str
) -> None:
    code, log, calls = run_job(tmp_path, *arguments, **slurm)
    assert code == 2, log
    assert wanted in log and "Traceback" not in log
    assert [call for call in calls if call[0] == "srun"] == []


def test_a_folder_of_somebody_else_is_left_as_it_is_and_no_rank_starts(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/slurm_job").write_text("night run")
    code, log, calls = run_job(tmp_path, "", "", tmp_path / "run")
    assert code == 2
    assert "run holds 'slurm_job', which is not ours" in log
    assert [call for call in calls if call[0] == "srun"] == []
    assert [(path.name, path.read_text()) for path in (tmp_path / "run").iterdir()] == [("slurm_job", "night run")]
    (tmp_path / "run/slurm_job").write_text("4710\n")
    code, log, calls = run_job(tmp_path, "", "", tmp_path / "run")
    assert code == 0, log


def test_fine_tuning_of_an_array_is_a_run_per_seed(tmp_path: Path) -> None:
    array = {
        "SLURM_ARRAY_JOB_ID": "4710",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_NUM_NODES": "1",
    }
    _, _, calls = run_job(
        tmp_path, "sst2", tmp_path, "", tmp_path / "run", "--data", "d", script="finetune.sh", **array
    )
    *words, _ = next(call for call in calls if "finetune.py" in str(call))
    assert words[words.index(f"{ROOT}/bert_ds/finetune.py") + 1 :] == [
        *("--task", "sst2", "--model", str(tmp_path), "--deepspeed_config", f"{ROOT}/ds_configs/zero1.json"),
        *("--run_dir", f"{tmp_path}/run/seed_3", "--resume", "auto", "--data", "d", "--seed", "3"),
    ]


def test_fine_tuning_of_an_array_beside_a_search_is_a_run_per_trial(tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "4710", "SLURM_ARRAY_TASK_ID": "3"}
    run_dir = tmp_path / "run"
    _, log, calls = run_job(
        tmp_path, "sst2", tmp_path, "", run_dir, "--search", "space.json", script="finetune.sh", **array
    )
    *words, _ = next(call for call in calls if "finetune.py" in str(call))
    assert words[words.index("--run_dir") :] == [
        *("--run_dir", str(run_dir), "--resume", "auto", "--search", "space.json", "--trial", "3")
    ]
    assert f"in {run_dir}/trial_003" in log and [path.name for path in run_dir.iterdir()] == ["trial_003"]


@pytest.mark.parametrize("script", ["finetune.sh", "build_shards.sh"])
def test_a_missing_argument_is_told_with_what_is_wanted(tmp_path: Path, script: str) -> None:
    code, log, _ = run_job(tmp_path, "only_one", script=script)
    assert code == 2
    assert "wanted" in log


def test_the_example_of_a_site_file_is_a_script_that_changes_nothing(tmp_path: Path) -> None:
    site = (ROOT / "slurm/site.env.example").read_text(encoding="utf-8")
    code, log, _ = run_job(tmp_path, "", "", tmp_path / "run", site=site)
    assert code == 0, log
    everything = "\n".join(
        line.removeprefix("#") for line in site.splitlines() if line.startswith("#") and line[1:2] != " "
    )
    assert subprocess.run(["bash", "-n"], input=everything, text=True).returncode == 0


def test_make_test_slurm_names_the_packages_that_are_missing() -> None:
    command = [sys.executable, str(ROOT / "tests/slurm_cluster.py")]
    missing = subprocess.run(command, env={"PATH": "/nowhere"}, capture_output=True, text=True, timeout=60)
    assert missing.returncode == 1
    assert "apt-get install" in missing.stderr and "slurm-client" in missing.stderr and "shellcheck" in missing.stderr
