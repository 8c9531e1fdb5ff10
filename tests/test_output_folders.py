"""Whose a folder is: runs and results."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from campaign_folders import VERBS, Workshop, measure
from forked_verbs import run_verb

from bert_ds.configuration.reading.config_files import shipped_file
from bert_ds.configuration.recipe.run_config import ConfigError, dump_run_config, load_run_config
from bert_ds.folders.output_folders import (
    MARKER,
    claim,
    claim_run_folder,
    first_entry,
    open_results_folder,
    open_run_folder,
)

RECIPE = dump_run_config(load_run_config(shipped_file("recipes/embedded_default.json")))
TASK = shipped_file("tasks/sst2.json").read_text(encoding="utf-8")


def fill(folder: Path, files: dict[str, str]) -> Path:
    """A folder with these files; a name that ends in "/" is an empty folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text(text, encoding="utf-8")
    return folder


def content(folder: Path) -> dict[str, str]:
    """Everything in a folder: path -> what it is."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


OUR_RUNS: dict[str, dict[str, str]] = {
    "empty": {},
    "an earlier pre-training": {"run_config.json": RECIPE, "environment.json": "{}", "notes.txt": "mine"},
    "an earlier fine-tuning": {"task_config.json": TASK, "metrics.jsonl": "", "hf/config.json": "{}"},
    "a copied pre-training": {"run_config.json": RECIPE, "checkpoints/global_step4/manifest.json": "{}"},
    "submitted": {"submit.json": '{"job": "17"}', "slurm-17.out": "waits"},
    "started by a job script": {
        "slurm_job": "17\n",
        "logs/exits/started": "",
        "logs/exits/srun.err": "srun: error",
        "logs/rank_0.out": "Traceback",
    },
    "started by bert-ds": {"logs/launcher.log": "cmd = ..."},
    "refused at the lock": {"run.lock": '{"host": "a", "pid": 3}', "restarts.json": '{"action": "stop"}'},
    "locked on a full disk": {"run.lock": ""},
    "seeds": {"seed_1/task_config.json": TASK, "seed_1/run.lock": "", "seed_2/": "", "results.json": '{"seeds": [1]}'},
}


@pytest.mark.parametrize("name", OUR_RUNS)
def test_a_run_enters_what_is_empty_or_ours_and_leaves_it_as_it_is(tmp_path: Path, name: str) -> None:
    run_dir = fill(tmp_path / "run", OUR_RUNS[name])
    before = content(run_dir)
    claim_run_folder(run_dir)
    assert content(run_dir) == before
    open_run_folder(run_dir)
    assert content(run_dir).keys() - before.keys() == {MARKER}
    assert {path: text for path, text in content(run_dir).items() if path != MARKER} == before


def test_the_marker_alone_makes_a_run_ours(tmp_path: Path) -> None:
    open_run_folder(tmp_path / "a/b")
    fill(tmp_path / "a/b", {"notes.txt": "mine", "run_config.json": "of a release to come"})
    claim_run_folder(tmp_path / "a/b")
    with pytest.raises(ConfigError, match=f"holds '{MARKER}'"):
        open_results_folder(tmp_path / "a/b")


FOREIGN_RUNS: dict[str, tuple[dict[str, str], str]] = {
    "a tokenizer": ({"tokenizer/vocab.txt": "mine"}, "tokenizer"),
    "predictions": ({"predictions/p.tsv": "mine"}, "predictions"),
    "logs": ({"logs/run.log": "mine"}, "logs"),
    "logs below": ({"logs/exits/mine": "mine"}, "logs"),
    "where recipes are kept": ({"run_config.json": RECIPE, "ds_config.json": "{}", "tokenizer/": ""}, "ds_config.json"),
    "where tasks are kept": ({"task_config.json": TASK, "checkpoints/mine/": ""}, "checkpoints"),
    "a recipe that is none": ({"run_config.json": "{}"}, "run_config.json"),
    "a recipe of something else": ({"run_config.json": '{"model": "gpt"}'}, "run_config.json"),
    "a task that is none": ({"task_config.json": "[1]"}, "task_config.json"),
    "a submission of something else": ({"submit.json": "[]"}, "submit.json"),
    "a lock of something else": ({"run.lock": "locked"}, "run.lock"),
    "a job of something else": ({"slurm_job": "night run"}, "slurm_job"),
    "results without a seed": ({"results.json": '{"seeds": [1]}'}, "results.json"),
    "a seed of something else": ({"seed_1/model.py": "mine"}, "seed_1"),
    "a clone": ({".git/HEAD": "ref", "README.md": "mine"}, ".git"),
    "a marker of something else": ({MARKER: "{}"}, MARKER),
    "an empty folder": ({"data/": ""}, "data"),
    "ours and more": ({"run.lock": "", "thesis.tex": "mine"}, "thesis.tex"),
}


@pytest.mark.parametrize("name", FOREIGN_RUNS)
def test_a_run_refuses_what_is_foreign_with_its_name_and_leaves_it_as_it_is(tmp_path: Path, name: str) -> None:
    files, entry = FOREIGN_RUNS[name]
    before = content(fill(tmp_path / "run", files))
    with pytest.raises(ConfigError, match=f"run holds '{entry}', which is not ours .*wanted a new or an empty run"):
        open_run_folder(tmp_path / "run")
    assert content(tmp_path / "run") == before


def test_a_link_to_a_recipe_or_a_marker_makes_nothing_ours(tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    open_run_folder(ours)
    fill(tmp_path / "run", {"notes.txt": "mine"})
    (tmp_path / "run" / MARKER).symlink_to(ours / MARKER)
    with pytest.raises(ConfigError, match="which is not ours"):
        claim_run_folder(tmp_path / "run")


def test_a_link_to_a_run_folder_is_followed_and_one_to_nothing_is_refused(tmp_path: Path) -> None:
    open_run_folder(tmp_path / "scratch")
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    open_run_folder(tmp_path / "run")
    (tmp_path / "nothing").symlink_to(tmp_path / "gone")
    (tmp_path / "file").touch()
    for name in ("nothing", "file"):
        with pytest.raises(ConfigError, match="is a file, or a link to nothing"):
            open_run_folder(tmp_path / name)


@pytest.mark.parametrize("place", ["/proc/run", "file/run"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_made(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        claim_run_folder(tmp_path / place)
    assert os.listdir(tmp_path) == ["file"]


def test_trying_to_write_leaves_nothing_behind(tmp_path: Path) -> None:
    claim(tmp_path / "a/b/c", first_entry, wanted="wanted another")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"), trained=False)


def test_every_verb_refuses_a_foreign_folder_and_leaves_it_as_it_is(workshop: Workshop) -> None:
    rows = [row for verb in VERBS for row in measure(workshop, verb, ("foreign",))]
    found = {row["verb"]: (row["code"], row["unchanged"], "which is not ours" in str(row["said"])) for row in rows}
    assert found == dict.fromkeys(VERBS, (2, True, True))


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_a_foreign_folder_is_refused_before_the_preflight_tries_it(workshop: Workshop, verb: str) -> None:
    folder = fill(workshop.folder / f"theirs of {verb}", {"thesis.tex": "mine"})
    before = folder.stat().st_mtime_ns
    done = run_verb(*workshop.command(verb, folder), "--preflight", "on")
    assert done.returncode == 2 and "'thesis.tex', which is not ours" in done.stderr
    assert folder.stat().st_mtime_ns == before


def test_results_go_where_earlier_results_are_and_nowhere_else(tmp_path: Path) -> None:
    earlier = {"results.json": '{"task": "t"}', "predictions/test/predictions.tsv": "x", "figures/test_classes.txt": ""}
    open_results_folder(fill(tmp_path / "earlier", earlier))
    open_results_folder(fill(tmp_path / "probes", {"probes.json": json.dumps({"task": "t"}), "probes.png": ""}))
    open_results_folder(tmp_path / "new")
    (tmp_path / "new" / "notes.txt").touch()
    open_results_folder(tmp_path / "new")
    for entry, files in (
        ("predictions/mine.tsv", {**earlier, "predictions/mine.tsv": "mine"}),
        ("results.json", {"results.json": '{"accuracy": 1}'}),
        ("figures", {"figures/test_classes.txt": "mine"}),
    ):
        folder = fill(tmp_path / f"foreign {len(files)} {entry[:3]}", files)
        before = content(folder)
        with pytest.raises(ConfigError, match=f"holds '{entry}', which is not ours"):
            open_results_folder(folder)
        assert content(folder) == before
