"""What a user without a checkout gets: a wheel, in an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from corpus_fixtures import random_documents, write_shards

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("bert_ds", "kernels", "ds_configs", "slurm", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, without network."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PARTS:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        elif path.is_file():
            shutil.copyfile(path, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        output,
        source,
    ]
    subprocess.run([str(word) for word in command], check=True)
    return next(output.glob("bert_ds-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content in a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def bert_ds(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the console command in an empty folder, with the wheel's content in front of everything else."""
    code = "import sys; from bert_ds.console import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(installed), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_the_wheel_holds_two_packages_and_none_named_kernels(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"bert_ds", "bert_kernels"}


def test_the_wheel_carries_every_shipped_configuration(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {path.relative_to(ROOT) for path in (ROOT / "ds_configs").rglob("*.json")}
    assert {f"bert_ds/_shipped/{path}" for path in shipped} <= names


def test_the_wheel_carries_the_job_scripts(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        f"bert_ds/_shipped/slurm/{path.name}" for path in (ROOT / "slurm").iterdir() if path.name != "site.env"
    } <= names


def test_the_installed_command_renders_a_job_around_the_wheel_s_own_script(installed: Path, tmp_path: Path) -> None:
    config = str(installed / "bert_ds/_shipped/ds_configs/zero2.json")
    places = ("--deepspeed_config", "zero2", "--run_dir", "runs/a", "--gpus_per_node", "2", "--dry_run")
    printed = bert_ds(installed, tmp_path, "submit", *places)
    assert printed.returncode == 0, printed.stderr
    script, run_dir = installed / "bert_ds/_shipped/slurm/pretrain.sh", tmp_path / "runs/a"
    assert script.is_file()
    assert printed.stdout.splitlines()[-1] == (
        f"cd {installed} && sbatch --parsable --job-name=embedded_default --nodes=1 --gpus-per-node=2 "
        f"--ntasks-per-node=2 --output={run_dir}/slurm-%j.out {script} '' {config} {run_dir}"
    )


def test_the_installed_command_checks_a_run_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    words = ("check_run", "--run", "bert_base_phase1", "--deepspeed_config", "zero2", "--world_size", "8")
    checked = bert_ds(installed, tmp_path, *words)
    assert checked.returncode == 0, checked.stderr
    assert "bert_base_phase1: lamb" in checked.stdout and "ZeRO stage 2" in checked.stdout


def test_the_installed_command_writes_a_recipe_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", random_documents(60), random_documents(20, seed=1))
    made = bert_ds(installed, tmp_path, "init", "my.json", "--corpus", "shards", "--gpu", "H100", "--hours", "1")
    assert made.returncode == 0, made.stderr
    schema = json.loads((tmp_path / "my.json").read_text())["$schema"]
    assert Path(schema) == installed / "bert_ds/_shipped/ds_configs/schema.json" and Path(schema).is_file()


def test_the_installed_command_passes_a_verb_s_exit_code_on(installed: Path, tmp_path: Path) -> None:
    missing = bert_ds(installed, tmp_path, "check-run", "--deepspeed_config", "nowhere.json")
    assert missing.returncode == 2
    assert "nowhere.json" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_an_unknown_verb_is_refused_with_the_nearest_one(installed: Path, tmp_path: Path) -> None:
    unknown = bert_ds(installed, tmp_path, "pretrian")
    assert unknown.returncode == 2
    assert "pretrain" in unknown.stderr
