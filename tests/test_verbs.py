"""What a person asks first: which verbs there are, what each is for, and files and folders by the names they know."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from config_cases import RECIPE, changed, write_json
from corpus_fixtures import random_documents, write_shards
from fork_server import free_port, plain_environment
from forked_verbs import run_verb
from safetensors.numpy import save_file

from bert_ds import __version__, console
from bert_ds.configuration.deepspeed_file.ds_config import load_pair
from bert_ds.configuration.model_folder import folder_problem, weights_problem
from bert_ds.configuration.reading.shipped_files import named_file
from bert_ds.configuration.recipe.run_config import ConfigError, load_run_config
from bert_ds.launch.launcher import LAUNCHER_FLAGS, LAUNCHER_OPTIONS, launcher_words
from bert_ds.launch.verbs import VERBS
from bert_ds.reporting.run_log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
HELPS = """
import contextlib, io, json, runpy, sys
helps = {}
for verb in sys.argv[2:]:
    said = io.StringIO()
    script = f"{sys.argv[1]}/{verb}.py"
    sys.argv[:0] = [script, "--help"]
    path, words = list(sys.path), sys.argv
    sys.argv = [script, "--help"]
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0, verb
    sys.path, sys.argv = path, words[2:]
    heavy = {"torch", "deepspeed", "transformers"} & set(sys.modules)
    assert not heavy, (verb, heavy)
    helps[verb] = said.getvalue()
print(json.dumps(helps))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What every script says of itself, all in one process that must not import torch."""
    command = [sys.executable, "-c", HELPS, str(ROOT / "bert_ds"), *VERBS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_verb_says_without_torch_what_it_is_for_with_an_example_of_its_own_options(helps: dict[str, str]) -> None:
    assert set(helps) == {path.stem for path in (ROOT / "bert_ds").glob("*.py")} - {"__init__", "console"}
    for name, text in helps.items():
        verb, flat = VERBS[name], " ".join(text.split())
        assert verb.purpose in flat and f"bert-ds {name} {verb.example}" in text
        options = set(re.findall(r"--\w+", verb.example)) - set(LAUNCHER_OPTIONS)
        assert options <= set(re.findall(r"--\w+", text.partition("example:")[0])), name


def main_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["bert-ds", *words])
    return console.main()


def test_bert_ds_lists_the_verbs_in_the_order_of_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_of(["--help"], monkeypatch) == 0
    listed = re.findall(r"^  (\w+)\*? ", capsys.readouterr().out, re.MULTILINE)
    assert listed == list(VERBS)
    order = ["train_wordpiece", "build_shards", "check_run", "pretrain", "export_hf", "finetune", "score"]
    assert [name for name in listed if name in order] == order
    assert main_of(["--version"], monkeypatch) == 0
    assert capsys.readouterr().out == f"bert-ds {__version__}\n"
    assert main_of(["exprot_hf"], monkeypatch) == 2
    assert 'did you mean "export_hf"?' in capsys.readouterr().err


def test_a_verb_speaks_under_the_name_that_it_was_called_by() -> None:
    command = [sys.executable, "-m", "bert_ds.console", "show-masks", "--model", "nope"]
    refused = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert refused.returncode == 2
    assert refused.stderr.startswith("bert-ds show_masks: error: --model nope: there is no such folder")


def test_the_launcher_s_options_are_those_of_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.launcher import runner

    parsers: list[argparse.ArgumentParser] = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, args=None: parsers.append(self))
    runner.parse_args([])
    actions = {name: action for action in parsers[0]._actions for name in action.option_strings}
    del actions["-h"], actions["--help"]
    assert {name for name, action in actions.items() if action.nargs == 0} == set(LAUNCHER_FLAGS)
    assert {name for name, action in actions.items() if action.nargs is None} == set(LAUNCHER_OPTIONS)


@pytest.mark.parametrize(
    ("words", "theirs", "own"),
    [
        (["--run", "a", "--num_gpus", "2", "--dry_run"], ["--num_gpus", "2"], ["--run", "a", "--dry_run"]),
        (["--num-gpus=2", "--no_ssh", "--run=a"], ["--num_gpus=2", "--no_ssh"], ["--run=a"]),
        (
            ["-i", "node1:0", "--num_gpus", "2", "--", "--num_gpus"],
            ["-i", "node1:0", "--num_gpus", "2"],
            ["--num_gpus"],
        ),
        (["--run", "a", "--num_gpus"], ["--num_gpus"], ["--run", "a"]),
        (["--set", "x.y=--quiet"], [], ["--set", "x.y=--quiet"]),
    ],
)
def test_words_are_divided_between_launcher_and_verb(words: list[str], theirs: list[str], own: list[str]) -> None:
    assert launcher_words(words) == (theirs, own)


def test_shipped_files_go_by_their_bare_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run, ds = load_pair("bert_base_phase1", "zero3")
    assert (run.name, ds.zero_stage) == ("bert_base_phase1", 3)
    assert named_file("sst2", "task") == ROOT / "ds_configs/tasks/sst2.json"
    with pytest.raises(
        ConfigError, match=r'--run: found "bert_bas_zh", wanted one of .* did you mean "bert_base_zh"\?'
    ):
        load_run_config("bert_bas_zh")
    with pytest.raises(ConfigError) as both:
        load_pair("bert_bas_zh", "zero4")
    assert "--run: found" in str(both.value) and '--deepspeed_config: found "zero4"' in str(both.value)
    write_json(tmp_path, "mine", RECIPE)
    write_json(tmp_path, "zero1", {"zero_optimization": {"stage": 3}})
    assert load_run_config("mine").name == "tiny"  # a file without an ending is a file
    assert load_pair("mine", "zero1")[1].zero_stage == 1  # and never hides a shipped one
    assert load_pair("mine", "./zero1")[1].zero_stage == 3


def test_a_folder_that_is_no_model_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/mine/hf", "runs/seeds/seed_1/hf", "runs/young", "empty"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("runs/mine/run_config.json", "runs/seeds/task_config.json", "runs/young/run_config.json"):
        (tmp_path / name).write_text("{}")
    for name in ("runs/mine/hf/config.json", "runs/seeds/seed_1/hf/config.json"):
        (tmp_path / name).write_text("{}")
    texts = {
        "nope": ": there is no such folder; names of the Hugging Face hub are not looked up",
        "bert-base-uncased": ": there is no such folder; names of the Hugging Face hub are not looked up",
        "runs/mien": ': there is no such folder; did you mean "mine"?',
        "runs/mine": " is a run folder, not a model: did you mean runs/mine/hf?",
        "runs/seeds": " is a run folder, not a model: did you mean runs/seeds/seed_1/hf?",
        "runs/young": " is a run folder without an export: bert-ds export_hf --run_dir runs/young makes runs/young/hf",
        "empty": " has no config.json: wanted the Hugging Face folder of an encoder",
    }
    for name, text in texts.items():
        assert str(folder_problem(Path(name))).startswith(text), name
    assert folder_problem(Path("runs/mine/hf")) is None


def test_weights_of_another_form_name_it_when_they_are_loaded(tmp_path: Path) -> None:
    from downstream_cases import CONFIG, write_tiny_export

    from bert_ds.basics.ranks import CheckpointError
    from bert_ds.encoder.initial_weights import load_initial_weights
    from bert_ds.encoder.pretraining_model import PretrainingModel

    folder = write_tiny_export(tmp_path / "hf", has_pair_head=False)
    model = PretrainingModel(CONFIG, has_pair_head=True)
    with pytest.raises(CheckpointError, match=r"has no head for sentence pairs: wanted sequences\.sentence_pair=none"):
        load_initial_weights(model, folder, read_run=lambda path: {})


@pytest.mark.parametrize("source", ["hub", "run"])
def test_weights_without_a_pair_head_name_the_setting_that_takes_them(source: str, tmp_path: Path) -> None:
    import numpy as np

    folder = tmp_path / "from"
    folder.mkdir()
    if source == "hub":
        write_json(
            folder, "config.json", {"model_type": "bert", "architectures": ["BertForPreTraining"], **RECIPE["model"]}
        )
        save_file({"cls.predictions.bias": np.zeros(2)}, folder / "model.safetensors")
    else:
        write_json(folder, "run_config.json", changed(RECIPE, "sequences.sentence_pair", "none"))
    run = load_run_config(write_json(tmp_path, "run.json", RECIPE))
    wanted = f"{folder} has no head for sentence pairs: wanted sequences.sentence_pair=none"
    assert weights_problem(folder, run) == wanted
    single = load_run_config(tmp_path / "run.json", ["sequences.sentence_pair=none"])
    assert weights_problem(folder, single) is None
    if source == "hub":
        save_file({"cls.seq_relationship.bias": np.zeros(2)}, folder / "model.safetensors")
    else:
        write_json(folder, "run_config.json", RECIPE)
    assert weights_problem(folder, run) is None


def test_torchrun_starts_the_ranks_of_a_run_as_any_other_launcher_does(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", random_documents(60), random_documents(20, seed=1))
    corpus = {"type": "shards", "sources": [{"path": "shards"}], "tokenizer": "shards/tokenizer"}
    training = {"total_steps": 2, "train_batch_size": 8, "num_workers": 0, "log_every_steps": 1, "precision": "fp32"}
    recipe = {**RECIPE, "corpus": corpus, "training": training, "schedule": {"type": "constant", "warmup_steps": 1}}
    recipe["model"] = {**RECIPE["model"], "vocab_size": 1000, "hidden_size": 16, "num_hidden_layers": 1}
    words = ["--run", write_json(tmp_path, "run.json", recipe), "--run_dir"]
    script = str(ROOT / "bert_ds/pretrain.py")
    command = ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "--", script, *words]
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command), str(tmp_path / "torchrun")],
        env=plain_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    forked = run_verb(script, *words, tmp_path / "forked", world_size=2)
    assert forked.returncode == 0, forked.stderr
    of_torchrun, of_forked = (
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl", "train")]
        for name in ("torchrun", "forked")
    )
    assert len(of_torchrun) == 2 and of_torchrun == of_forked
