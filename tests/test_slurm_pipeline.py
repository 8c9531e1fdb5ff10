"""The jobs that wait for each other, under a real Slurm: shards, phase 1, phase 2, fine-tuning with two seeds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from downstream_cases import review_task
from slurm_cluster import SlurmCluster, cluster
from test_pretrain import losses, workshop

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[1]

__all__ = ["cluster", "workshop"]  # fixtures


def recipe(workshop: Path, name: str, total_steps: int) -> Path:
    """The tiny recipe under another name and length."""
    content = json.loads((workshop / "recipe.json").read_text())
    content["name"] = name
    content["training"]["total_steps"] = total_steps
    path = workshop / f"{name}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def pipeline(cluster: SlurmCluster, workshop: Path, tokenizer: Path, out: Path, *more: object) -> dict[str, str]:
    """Submit the jobs; name -> number."""
    phases = (recipe(workshop, "phase1", 10), recipe(workshop, "phase2", 4))
    text = workshop / "long.txt"  # a hundredth of the documents is held out
    text.write_text("\n\n".join([(workshop / "text.txt").read_text()] * 6))
    places = (text, tokenizer, *phases, ROOT / "ds_configs/zero2.json", out)
    printed = cluster.run("slurm/pipeline.sh", *places, *more, cwd=ROOT)
    return dict(re.findall(r"^(.+): job (\d+)$", printed, re.MULTILINE))


def states(cluster: SlurmCluster, out: Path) -> dict[str, str]:
    """Name of each run below a folder -> its state as runs.py tells it."""
    command = [sys.executable, ROOT / "bert_ds/runs.py", out, "--json"]
    found = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=60, check=True)
    return {Path(one["run_dir"]).name: one["state"] for one in json.loads(found.stdout)}


def test_each_job_starts_from_what_the_one_before_it_made(cluster: SlurmCluster, workshop: Path) -> None:
    out = workshop / "pipeline"
    task = review_task(workshop, training={"epochs": 1, "train_batch_size": 8, "log_every_steps": 1})
    jobs = pipeline(cluster, workshop, workshop / "tokenizer", out, task, 2)
    assert list(jobs) == ["shards", "phase 1", "phase 2", "fine-tuning"]
    assert cluster.job_fact(jobs["phase 2"], "Dependency").startswith(f"afterok:{jobs['phase 1']}")
    waiting = states(cluster, out)
    assert (waiting["phase1"], waiting["phase2"], waiting["finetuned"]) == ("waiting", "waiting", "waiting")
    ended = cluster.wait_for_end(jobs["phase 2"], seconds=240)
    assert ended == ("COMPLETED", 0), [path.read_text()[-2000:] for path in out.glob("*.out")]
    assert losses(out / "phase2")[0][1] < losses(out / "phase1")[0][1] - 0.5
    for seed in (1, 2):
        assert cluster.wait_for_end(f"{jobs['fine-tuning']}_{seed}", seconds=240) == ("COMPLETED", 0)
        results = json.loads((out / f"finetuned/seed_{seed}/results.json").read_text())
        assert set(results["validation"]) >= {"accuracy"}
        assert (out / f"finetuned/seed_{seed}/DONE").exists()
    assert not [path for path in out.glob("*.out") if "outlived its srun" in path.read_text()]
    assert states(cluster, out)["phase2"] == "done"


def test_when_a_job_fails_those_that_wait_for_it_are_cancelled(cluster: SlurmCluster, workshop: Path) -> None:
    empty = workshop / "no_tokenizer"
    empty.mkdir()
    with pytest.raises(subprocess.CalledProcessError) as refused:
        pipeline(cluster, workshop, empty, workshop / "refused")
    assert (refused.value.returncode, "corpus.tokenizer" in refused.value.stderr) == (2, True)

    (workshop / "other").mkdir()
    broken = workshop / "other/tokenizer"
    broken.mkdir()
    (broken / "vocab.txt").write_text("\n".join(f"word{index}" for index in range(120)))  # no special tokens
    jobs = pipeline(cluster, workshop, broken, workshop / "other/out")
    assert cluster.wait_for_end(jobs["shards"], seconds=60) == ("FAILED", 3)
    assert cluster.wait_for_end(jobs["phase 1"], seconds=60)[0] == "CANCELLED"
    assert cluster.wait_for_end(jobs["phase 2"], seconds=60)[0] == "CANCELLED"
