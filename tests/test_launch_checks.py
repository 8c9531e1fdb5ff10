"""A mistake in the words or the files of a verb that trains is answered by `bert-ds` itself, before any launcher."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from config_cases import RECIPE, changed, write_json
from downstream_cases import review_task

from bert_ds import console
from bert_ds.basics.ranks import Ranks
from bert_ds.configuration.deepspeed_file.ds_config import load_ds_config
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.launch.launcher_log import logged_command
from bert_ds.reporting.run_log import RunLog

ROOT = Path(__file__).resolve().parents[1]
ZERO2 = str(ROOT / "ds_configs/zero2.json")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: files that are right, and one of each that is not."""
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path, "run.json", RECIPE)
    write_json(tmp_path, "typo.json", changed(RECIPE, "training.total_stesp", 3))
    write_json(tmp_path, "ds_typo.json", {"zero_optimisation": {"stage": 2}})
    write_json(tmp_path, "fp32.json", {"bf16": {"enabled": False}})
    write_json(tmp_path, "cut.json", '{"bf16": ')
    corpus = {"type": "shards", "tokenizer": "no_tokenizer", "sources": [{"path": "no_shards"}]}
    write_json(tmp_path, "shards.json", changed(RECIPE, "corpus", corpus))
    review_task(tmp_path)
    for place in ("mine", "seeds/seed_1"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "thesis.tex").touch()
    model = tmp_path / "model"
    model.mkdir()
    write_json(model, "config.json", {})
    write_json(tmp_path, "vocabulary.json", {"vocabulary_size": 30522})
    (tmp_path / "modern").mkdir()
    write_json(tmp_path / "modern", "config.json", {"model_type": "modernbert", "vocab_size": 500})
    return tmp_path


def start(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[list[str]]]:
    """Return the exit code of `bert-ds`, and the commands that it started a launcher with."""
    started: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["bert-ds", *words])
    monkeypatch.setattr(console, "run_launcher", lambda command: started.append(command) or 0)
    try:
        return console.main(), started
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return ended.code, started


PRETRAIN = ("pretrain", "--run", "run.json", "--deepspeed_config", ZERO2)
FINETUNE = ("finetune", "--task", "task.json", "--model", "model", "--deepspeed_config", ZERO2)
SCORE = ("score", "--task", "task.json", "--model", "model")
MISTAKES = [
    ((*PRETRAIN[:3], "--deepspeed_config", "none.json"), "none.json: No such file or directory"),
    ((*PRETRAIN[:3], "--deepspeed_config", "ds_typo.json"), 'did you mean "zero_optimization"?'),
    ((*PRETRAIN[:3], "--deepspeed_config", "cut.json"), "cut.json: not JSON"),
    (
        (*PRETRAIN[:3], "--deepspeed_confg", ZERO2),
        "unknown argument --deepspeed_confg; did you mean --deepspeed_config?",
    ),
    ((*PRETRAIN, "--dry_rum"), "unknown argument --dry_rum; did you mean --dry_run?"),
    ((*PRETRAIN, "--resume", "always"), "argument --resume: invalid choice: 'always'"),
    (("pretrain", "--run", "none.json", *PRETRAIN[3:]), "none.json: No such file or directory"),
    (("pretrain", "--run", "typo.json", *PRETRAIN[3:]), 'did you mean "total_steps"?'),
    (("pretrain", "--run", "shards.json", *PRETRAIN[3:]), "no_tokenizer does not exist here"),
    (("pretrain", *PRETRAIN[3:], "--set", "training.total_stesp=3"), 'did you mean "total_steps"?'),
    ((*PRETRAIN, "--init_from", "none"), "none does not exist here"),
    ((*PRETRAIN, "--set", "sequences.max_seq_length=512"), "is more than model.max_position_embeddings 128"),
    ((*PRETRAIN, "--run_dir", "mine"), "mine holds 'thesis.tex', which is not ours"),
    ((*FINETUNE, "--run_dir", "mine"), "mine holds 'thesis.tex', which is not ours"),
    ((*FINETUNE, "--run_dir", "seeds", "--seeds", "1"), "seeds/seed_1 holds 'thesis.tex', which is not ours"),
    ((*SCORE, "--output", "mine"), "mine holds 'thesis.tex', which is not ours"),
    (("finetune", "--task", "sst3", *FINETUNE[3:]), 'did you mean "sst2"?'),
    (("finetune", "--task", "none.json", *FINETUNE[3:]), "none.json: No such file or directory"),
    ((*FINETUNE[:3], "--model", "none", *FINETUNE[5:]), "--model none: there is no such folder"),
    ((*FINETUNE[:5], "--deepspeed_config", "none.json"), "none.json: No such file or directory"),
    ((*FINETUNE, "--data", "none"), "does not exist; --data names the folder that data files are in"),
    ((*FINETUNE, "--set", "trianing.epochs=3"), 'did you mean "training"?'),
    (
        (*FINETUNE[:5], "--deepspeed_config", "fp32.json", "--set", "training.precision=bf16"),
        "bf16.enabled: found false",
    ),
    (
        (*FINETUNE[:3], "--model", "modern", "--deepspeed_config", "vocabulary.json"),
        "vocabulary_size: found 30522, ",
    ),
    (("finetune", "--task", "blimp", *FINETUNE[3:]), "has nothing to train"),
    ((*SCORE, "--side", "tset"), "argument --side: invalid choice: 'tset'"),
    ((*SCORE[:3], "--model", "none"), "--model none: there is no such folder"),
    ((*SCORE, "--data", "none"), "does not exist; --data names the folder that data files are in"),
]


@pytest.mark.parametrize(("words", "wanted"), MISTAKES)
def test_a_mistake_is_answered_before_the_launcher_in_a_rank_s_words(
    words: tuple[str, ...],
    wanted: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for before in ((), ("--num_gpus", "2", "--"), ("--num-gpus", "2")):  # with and without words for the launcher
        code, started = start([words[0], *before, *words[1:]], monkeypatch)
        said = capsys.readouterr()
        assert (code, started, said.out) == (2, [], "")
        assert said.err.startswith(f"bert-ds {words[0]}: error: ") and wanted in said.err
    assert {path.name for path in folder.iterdir()}.isdisjoint({"runs", "logs"})


@pytest.mark.parametrize("after", [("--",), ()])
@pytest.mark.parametrize("words", [PRETRAIN, PRETRAIN[:1] + PRETRAIN[3:], PRETRAIN[:3], FINETUNE, SCORE])
def test_what_is_right_reaches_the_launcher_unchanged(
    words: tuple[str, ...], after: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, started = start([words[0], "--num_gpus", "2", *after, *words[1:]], monkeypatch)
    script = str(ROOT / f"bert_ds/{words[0]}.py")
    quiet = ["--log_level", "warning", "--num_gpus", "2"]
    run_dir = {"pretrain": folder / "runs/default", "finetune": folder / "runs/tiny"}.get(words[0])
    logged = [] if run_dir is None else ["bert_ds.launch.launcher_log", str(run_dir / "logs/launcher.log")]
    assert (code, started) == (
        0,
        [[sys.executable, "-m", *logged, "deepspeed.launcher.runner", *quiet, script, *words[1:]]],
    )


@pytest.mark.parametrize("words", [PRETRAIN, FINETUNE, SCORE])
def test_one_rank_is_checked_and_started_as_itself(
    words: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    script = str(ROOT / f"bert_ds/{words[0]}.py")
    assert start([words[0], "--num_gpus=1", *words[1:]], monkeypatch) == (0, [[sys.executable, script, *words[1:]]])
    assert start([words[0], "--num_gpus=1", *words[1:], "--sett", "x=1"], monkeypatch) == (2, [])
    assert "unknown argument --sett" in capsys.readouterr().err


def test_what_the_launcher_says_goes_into_its_log_and_its_warnings_to_the_terminal_too(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text("print('the rank speaks')")
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", *console.QUIET, "--num_gpus", "1", "rank.py"]
    log = tmp_path / "run/logs/launcher.log"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests/light_launcher'}:{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        logged_command(runner, log), cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "the rank speaks" in done.stdout and "[INFO]" not in done.stdout + done.stderr
    said = log.read_text()
    assert "INFO cmd = " in said  # of the upper process, which starts the lower one
    assert "INFO WORLD INFO DICT" in said and "spawned with command" in said and "exits successfully" in said
    assert ("WARNING Unable to find hostfile" in said) == ("Unable to find hostfile" in done.stdout + done.stderr)


def test_a_launcher_whose_log_cannot_be_written_starts_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "rank.py").write_text("print('the rank speaks')")
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", *console.QUIET, "--num_gpus", "1", "rank.py"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests/light_launcher'}:{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    command = logged_command(runner, tmp_path / "file/run/logs/launcher.log")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
    assert "the rank speaks" in done.stdout


def test_the_checks_need_no_torch() -> None:
    heavy = "{'torch', 'deepspeed', 'transformers', 'numpy', 'tokenizers'}"
    code = f"import sys, bert_ds.console; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_make_pretrain_goes_through_the_same_door() -> None:
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "--resume auto" in line]
    assert "$(BIN)/python -m bert_ds.console pretrain --deepspeed_config" in line


@pytest.mark.parametrize(
    ("stage", "settings", "wanted"),
    [
        (2, {"gradient_predivide_factor": 2.0}, "gradient_predivide_factor: found 2.0, wanted 1.0"),
        (3, {"gradient_predivide_factor": 2.0}, "gradient_predivide_factor: found 2.0, wanted 1.0"),
        (2, {"prescale_gradients": True}, "prescale_gradients: found true, wanted false"),
        (3, {"prescale_gradients": True}, "prescale_gradients: found true, wanted false"),
        (0, {"gradient_predivide_factor": 2.0}, ""),
        (1, {"gradient_predivide_factor": 2.0}, ""),
        (1, {"prescale_gradients": True}, ""),
        (2, {"gradient_predivide_factor": 1.0, "prescale_gradients": False}, ""),
    ],
)
def test_scaled_gradients_are_refused_where_deepspeed_refuses_them(
    tmp_path: Path, stage: int, settings: dict, wanted: str
) -> None:
    path = write_json(tmp_path, "ds.json", {"zero_optimization": {"stage": stage}, **settings})
    if not wanted:
        load_ds_config(path)
        return
    with pytest.raises(ConfigError, match=wanted):
        load_ds_config(path)


def test_stage_2_that_does_not_scatter_may_scale(tmp_path: Path) -> None:
    zero = {"zero_optimization": {"stage": 2, "reduce_scatter": False}}
    load_ds_config(write_json(tmp_path, "ds.json", {**zero, "gradient_predivide_factor": 2.0}))


def test_a_monitor_without_its_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_json(tmp_path, "ds.json", {"tensorboard": {"enabled": True}})
    monkeypatch.setattr("bert_ds.configuration.deepspeed_file.ds_support.find_spec", lambda name: object())
    load_ds_config(path)
    monkeypatch.setattr("bert_ds.configuration.deepspeed_file.ds_support.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tensorboard.enabled: found true, but tensorboard is not installed here"):
        load_ds_config(path)
    load_ds_config(write_json(tmp_path, "off.json", {"tensorboard": {"enabled": False}}))


def test_deepspeed_s_small_talk_goes_to_the_rank_s_log_and_its_warnings_to_both(tmp_path: Path) -> None:
    deepspeed, terminal = logging.getLogger("DeepSpeed"), io.StringIO()
    shown = logging.StreamHandler(terminal)
    deepspeed.addHandler(shown)
    level = deepspeed.level
    try:
        log = RunLog(tmp_path, Ranks(1, 1, 2), total_steps=3)
        deepspeed.info("small talk")
        deepspeed.warning("a warning")
        log.close()
    finally:
        deepspeed.removeHandler(shown)
        deepspeed.setLevel(level)
    lines = (tmp_path / "logs/rank_1.log").read_text().splitlines()
    assert "rank 1 of 2, local rank 1, process" in lines[0]
    assert [line.split(" ", 2)[2] for line in lines[1:]] == ["INFO small talk", "WARNING a warning"]
    assert terminal.getvalue() == "a warning\n"
