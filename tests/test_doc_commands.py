"""Every command of every document: its verb reads its options, and it runs at a tiny size or is listed with why not."""

from __future__ import annotations

import json
import os
import re
import shlex
from argparse import ArgumentParser
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from config_cases import RECIPE, write_json
from doc_commands import (
    NOT_RUN,
    PAGES,
    ROOT,
    Command,
    blocks_of,
    commands_of,
    shape,
    small_words,
    write_world,
)
from forked_verbs import run_verb
from verb_help import verb_parsers

from bert_ds.configuration.reading.shipped_files import Kind, named_file
from bert_ds.configuration.recipe.run_config import load_run_config
from bert_ds.configuration.task.search_space import load_trials
from bert_ds.configuration.task.task_config import load_task
from bert_ds.launch.command_line import CALLED_BY
from bert_ds.launch.launcher import LAUNCHER_FLAGS, LAUNCHER_OPTIONS
from bert_ds.launch.verbs import VERBS

TUTORIAL = ROOT / "docs/tutorial.md"
NEW_TEXTS = 4
"""Number of the tutorial's block that is no output, but the texts to be answered."""
ALL = [command for page in PAGES for command in commands_of(page)]
NAMED: dict[str, Kind] = {"--run": "recipe", "--task": "task", "--deepspeed_config": "DeepSpeed file"}
"""Options that take a shipped file by its bare name -> its kind."""


def test_every_command_is_of_a_verb_or_listed_and_nothing_is_listed_in_vain() -> None:
    assert len(ALL) > 60
    assert [command for command in ALL if command.verb is None and command.reason is None] == []
    assert [pattern for pattern in NOT_RUN if not any(re.search(pattern, command.text) for command in ALL)] == []


@pytest.fixture(scope="module")
def parsers() -> dict[str, ArgumentParser]:
    return verb_parsers()


def test_every_verb_of_a_command_reads_its_options_and_every_file_of_ours_is_there(
    parsers: dict[str, ArgumentParser],
) -> None:
    targets, wrong = (ROOT / "Makefile").read_text(encoding="utf-8"), []
    for command in ALL:
        words = [word for word in command.words if word.startswith(("ds_configs/", "slurm/", "bert_ds/"))]
        wrong += [(command, word) for word in words if word != "slurm/site.env" and not (ROOT / word).exists()]
        if command.words[0] == "make" and not re.search(rf"^{command.words[1]}\b.*:", targets, re.MULTILINE):
            wrong.append((command, "no such target"))
        if command.verb is None:
            continue
        if command.verb not in VERBS:
            wrong.append((command, "no such verb"))
            continue
        try:
            parsers[command.verb].parse_args(command.verb_words)
        except SystemExit:
            wrong.append((command, "options"))
        for option, name in zip(command.verb_words, command.verb_words[1:], strict=False):
            if option in NAMED and not name.endswith(".json") and name != "R.json":
                named_file(name, NAMED[option])
    assert wrong == []


FOREIGN = {"--array", "--ntasks-per-node", "--signal", "--nproc_per_node", "--na-prob-file"}
"""Options of sbatch, torchrun and SQuAD's script that pages name."""


USER_PAGES = [*ROOT.glob("README*.md"), ROOT / "SERVING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("slurm/*.md")]


@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_that_a_sentence_names_is_one_of_a_verb_or_a_launcher(
    page: Path, parsers: dict[str, ArgumentParser]
) -> None:
    known = {word for parser in parsers.values() for word in parser._option_string_actions}
    known |= {*LAUNCHER_FLAGS, *LAUNCHER_OPTIONS, *FOREIGN}
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", text)
    assert [span for span in spans if not set(re.findall(r"(?:^|\s)(--[\w-]+)", span)) <= known] == []
    verbs = [found[1] for span in spans if (found := re.match(r"bert-ds (\w+)", span))]
    assert set(verbs) <= {*VERBS, "VERB"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder, with the task file that the tutorial shows."""
    folder = tmp_path_factory.mktemp("reader")
    write_world(folder, blocks_of(TUTORIAL, "json")[0], blocks_of(TUTORIAL, "text")[NEW_TEXTS])
    os.symlink(ROOT / "ds_configs", folder / "ds_configs")
    return folder


def run(command: Command, run_dir: str | None = None) -> CompletedProcess[str]:
    """Run a command at a tiny size."""
    return run_verb(ROOT / f"bert_ds/{command.verb}.py", *small_words(command, run_dir))


@pytest.fixture(scope="module")
def tutorial(world: Path) -> dict[Command, str]:
    """The tutorial's commands, run in order in the reader's folder, and what each printed."""
    printed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        for command in commands_of(TUTORIAL):
            if command.reason is None:
                done = run(command)
                assert done.returncode == 0, (command.text, done.stderr)
                printed[command] = done.stdout + done.stderr
    return printed


def test_the_tutorial_leads_from_text_to_answers(world: Path, tutorial: dict[Command, str]) -> None:
    verbs = ["train_wordpiece", "build_shards", "init", "check_run", "pretrain", "report", "export_hf"]
    assert [command.verb for command in tutorial] == [*verbs, "check_run", "finetune", "predict"]
    for left in ("runs/mine/DONE", "runs/mine/hf/model.safetensors", "runs/my_task/hf/config.json"):
        assert (world / left).is_file(), left


def test_what_the_tutorial_shows_is_what_its_commands_print(tutorial: dict[Command, str]) -> None:
    blocks = blocks_of(TUTORIAL, "text")
    del blocks[NEW_TEXTS]
    shown = {shape(line) for block in blocks for line in block.splitlines()}
    missing = shown - {shape(line) for text in tutorial.values() for line in text.splitlines()}
    assert len(shown) > 12
    # A run by the clock needs its seconds: here it has a number of steps.
    assert [line for line in missing if not line.startswith("training.max_minutes #: # steps; a step took # s")] == []


def test_every_other_form_of_a_command_runs_in_the_folder_that_the_tutorial_left(
    world: Path, tutorial: dict[Command, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    forms, complaints = {command.form for command in tutorial}, []
    for command in ALL:
        is_example_of_a_mistake = command.page == "docs/troubles.md"
        if command.verb is None or command.reason is not None or command.form in forms or is_example_of_a_mistake:
            continue
        forms.add(command.form)
        if (done := run(command, f"runs/form_{len(forms)}")).returncode != 0:
            complaints.append((command, done.stderr[-600:]))
    assert complaints == []
    assert len(forms) > 20


def test_a_mistake_looks_as_it_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = blocks_of(ROOT / "docs/troubles.md", "console")[0].splitlines()
    faults = {
        "model": {**RECIPE["model"], "hidden_size": 768, "num_attention_heads": 10},
        "optimizer": {"type": "adamw", "learning_rate": 1e-4},
        "training": {**RECIPE["training"], "train_batch_size": True},
    }
    write_json(tmp_path, "my_run.json", {**RECIPE, **faults})
    write_json(tmp_path, "zero2.json", {"zero_optimisation": {"stage": 2}})
    monkeypatch.chdir(tmp_path)
    done = run_verb(ROOT / "bert_ds/check_run.py", *shlex.split(shown[0])[3:], env={CALLED_BY: "bert-ds"})
    assert done.returncode == int(shown[-1])
    assert done.stderr.splitlines() == shown[1:-2]


def test_the_files_that_pages_show_are_read(tmp_path: Path) -> None:
    def shown(page: str) -> list[dict[str, Any]]:
        return [json.loads(block) for block in blocks_of(ROOT / page, "json")]

    for number, page in enumerate(("docs/finetune.md", "docs/zh/finetune.md")):
        space = write_json(tmp_path, f"space_{number}.json", shown(page)[-1])
        assert len(load_trials(space)) == 12
    assert load_task(write_json(tmp_path, "task.json", shown("docs/finetune.md")[0])).kind == "classification"
    assert load_task(write_json(tmp_path, "tutorial.json", shown("docs/tutorial.md")[0])).optimizer.lr == 3e-4
    (longer,) = shown("docs/long_context.md")
    recipe = json.loads((ROOT / "ds_configs/recipes/modernbert_small.json").read_text(encoding="utf-8"))
    merged = {**recipe, **longer, "model": {**recipe["model"], **longer["model"]}}
    assert load_run_config(write_json(tmp_path, "longer.json", merged)).max_seq_length == 8192


def test_monitors_write_below_the_run_folder(
    world: Path, tutorial: dict[Command, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    (block,) = (json.loads(block) for block in blocks_of(ROOT / "docs/monitors.md", "json"))
    zero1 = json.loads((ROOT / "ds_configs/zero1.json").read_text(encoding="utf-8"))
    words = ["--deepspeed_config", str(write_json(world, "monitored.json", {**zero1, **block}))]
    command = next(command for command in tutorial if command.verb == "pretrain")
    done = run_verb(ROOT / "bert_ds/pretrain.py", *small_words(command, "runs/monitored"), *words)
    assert done.returncode == 0, done.stderr
    assert list((world / "runs/monitored/monitor/mine").glob("*train_loss.csv"))
    assert list((world / "runs/monitored/monitor/mine").glob("events.out.tfevents.*"))
