"""Searches over the settings of a task: the file, the trials, what is chosen, what goes on, what is refused."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from downstream_cases import review_rows, review_task, write_lines
from forked_verbs import run_verb
from matplotlib.figure import Figure

from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.task.search_space import load_trials
from bert_ds.console import verb_command
from bert_ds.launch import search
from bert_ds.launch.verb_arguments import finetune_arguments
from bert_ds.reporting import search_page

ROOT = Path(__file__).resolve().parents[1]
RATES = [1e-6, 5e-3, 1e-3]


def write_space(folder: Path, settings: dict[str, Any], **rest: Any) -> Path:
    path = folder / f"space_{len(list(folder.glob('space_*')))}.json"
    path.write_text(json.dumps({"settings": settings, **rest}), encoding="utf-8")
    return path


def run_search(words: list[object], **env: str) -> subprocess.CompletedProcess[str]:
    return run_verb(ROOT / "tests/forked_search.py", *words, env=env)


@pytest.fixture(scope="module")
def words(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The command line of a search of three rates over a task with test rows, of which some hold a training row."""
    folder = tmp_path_factory.mktemp("search")
    rows = review_rows(80)
    longer = [row.replace("\t", " we saw it\t") for row in rows[:4]]
    for name, lines in {"train": rows[:48], "validation": rows[48:64], "test": [*rows[64:], *longer]}.items():
        write_lines(folder / name, ["text\tlabel", *lines])
    data: dict[str, Any] = {name: [{"path": name, "format": "tsv"}] for name in ("train", "validation", "test")}
    data |= {"fields": {"text": "text", "label": "label"}, "official": ["test"]}
    training = {"epochs": 12, "train_batch_size": 8, "precision": "fp32"}
    task = review_task(folder, data=data, training=training, evaluation={"every_epochs": 4})
    space = write_space(folder, {"optimizer.lr": RATES})
    return ["--task", task, "--model", tiny_export, "--run_dir", folder / "run", "--search", space]


@pytest.fixture(scope="module")
def finished(words: list[object]) -> tuple[Path, list[subprocess.CompletedProcess[str]]]:
    """Its folder, after it was asked to stop in the second trial, was continued, and was asked for once more."""
    runs = [run_search([*words, "--parallel", 1], SEARCH_STOPS_AT="2")]
    runs += [run_search([*words, "--parallel", 2]) for _ in range(2)]
    return Path(str(words[5])), runs


def test_a_search_that_was_asked_to_stop_goes_on_and_repeats_nothing_that_is_finished(
    finished: tuple[Path, list[subprocess.CompletedProcess[str]]],
) -> None:
    runs = finished[1]
    assert [run.returncode for run in runs] == [75, 0, 0], [run.stderr + run.stdout for run in runs]
    assert "1 trials have not begun" in runs[0].stdout
    heads = [next(line for line in run.stdout.splitlines() if " at a time" in line) for run in runs]
    assert [head.partition(": ")[2] for head in heads] == [
        "3 trials, 0 of them done, 1 at a time",
        "3 trials, 1 of them done, 2 at a time",
        "3 trials, 3 of them done, 2 at a time",
    ]
    assert [run.stdout.count("trial_000 (optimizer.lr=1e-06): accuracy") for run in runs] == [1, 0, 0]


def test_each_trial_trains_with_its_settings_and_the_best_on_the_validation_rows_is_chosen(
    finished: tuple[Path, list[subprocess.CompletedProcess[str]]],
) -> None:
    folder, runs = finished
    configs = [json.loads((folder / f"trial_00{number}/task_config.json").read_text()) for number in range(3)]
    assert [config["optimizer"]["lr"] for config in configs] == RATES
    found = {f"trial_00{n}": json.loads((folder / f"trial_00{n}/results.json").read_text()) for n in range(3)}
    values = {name: one["validation"]["accuracy"] for name, one in found.items()}
    results = json.loads((folder / "results.json").read_text())
    assert values["trial_000"] < max(values.values())
    assert results["chosen"] == max(values, key=lambda name: values[name])
    assert [row["value"] for row in results["trials"]] == sorted(values.values(), reverse=True)
    assert {row["trial"]: row["settings"]["optimizer.lr"] for row in results["trials"]}["trial_002"] == 1e-3
    table = runs[1].stdout.splitlines()
    first = next(number for number, line in enumerate(table) if line.startswith("trial  "))
    assert table[first].split() == ["trial", "accuracy", "settings"]
    assert [line.split()[0] for line in table[first + 1 : first + 4]] == [row["trial"] for row in results["trials"]]
    page = (folder / "search.html").read_text(encoding="utf-8")
    assert all(text in page for text in (results["chosen"], "optimizer.lr", "data:image/png;base64,"))
    assert (folder / "figures/search.png").read_bytes()[:4] == b"\x89PNG"


def test_the_test_rows_are_looked_at_by_the_chosen_trial_alone(
    finished: tuple[Path, list[subprocess.CompletedProcess[str]]],
) -> None:
    folder = finished[0]
    results = json.loads((folder / "results.json").read_text())
    assert [path.name for path in (folder / "test").iterdir()] == [results["chosen"]] == results["test_looked_at_by"]
    scored = json.loads((folder / "test" / results["chosen"] / "results.json").read_text())
    assert results["test"] == scored["test"] and scored["rows"]["test"] == 20
    for trial in folder.glob("trial_*"):
        own = json.loads((trial / "results.json").read_text())
        assert "test" not in own and not (trial / "predictions/test").exists()
        assert own["rows"]["train"] == 44, "training rows that are part of a test row are left out all the same"


def test_the_picture_has_plain_numbers_and_words_below_it() -> None:
    figure = Figure()
    axes = figure.subplots(1, 2)
    search_page._draw_setting(axes[0], [1e-3, 2e-5, 3e-4], [0.9, 0.1, 0.5])
    search_page._draw_setting(axes[1], ["lamb", "adamw", "lamb"], [0.9, 0.1, 0.5])
    figure.canvas.draw()
    labels = [[label.get_text() for label in axis.get_xticklabels()] for axis in axes]
    assert "0.0002" in labels[0] and not any("$" in label for label in labels[0])
    assert labels[1] == ["lamb", "adamw"] and list(axes[1].lines[0].get_xdata()) == [0, 1, 0]
    assert list(axes[0].lines[1].get_xdata()) == [1e-3], "the chosen one"


def parsed(words: list[object], space: Path, *more: object) -> argparse.Namespace:
    return finetune_arguments([str(word) for word in [*words[:-1], space, *more]])


def test_a_folder_of_another_search_is_refused_and_one_with_more_trials_goes_on(
    words: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = ["--run_dir", tmp_path / "run"]
    settings = {"optimizer.lr": {"low": 1e-5, "high": 1e-3, "scale": "log"}}
    search.enter_search(parsed(words, write_space(tmp_path, settings, trials=3), *there))
    search.enter_search(parsed(words, more := write_space(tmp_path, settings, trials=5), *there))
    assert "run: 2 trials more than it was begun with" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "run/search.json").read_text())["trials"]) == 5
    other = write_space(tmp_path, settings, trials=5, seed=2)
    for changed, what in (
        (parsed(words, other, *there), "other trials"),
        (parsed(words, write_space(tmp_path, settings, trials=3), *there), "other trials"),
        (parsed(words, more, *there, "--set", "max_seq_length=12"), "another task"),
        (parsed(words, more, *there, "--seeds", "1", "2"), "another seeds"),
    ):
        with pytest.raises(ConfigError, match=f"run was begun with {what}: wanted the same search"):
            search.enter_search(changed)


def test_a_trial_that_diverges_is_no_failure_and_one_that_fails_ends_the_search(
    words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[int] = []

    def start(command: list[str], environment: dict[str, str], log: Path) -> Any:
        number = int(command[command.index("--trial") + 1])
        started.append(number)
        log.parent.mkdir(exist_ok=True)
        log.write_text("finetune.py: error: task.json: max_seq_length: too long\nat all\n")
        return SimpleNamespace(poll=lambda: [5, 2, 0][number], send_signal=lambda number: None)

    handlers = {number: signal.getsignal(number) for number in search.stop_signals_heard()}
    monkeypatch.setattr(search, "start", start)
    monkeypatch.setattr("sys.argv", ["finetune.py"])
    args = parsed(words, Path(str(words[-1])), "--run_dir", tmp_path / "run", "--parallel", 1)
    code = search.run_search(args, show=lambda folder, results: None)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert (code, started) == (2, [0, 1])
    assert json.loads((tmp_path / "run/search.json").read_text())["diverged"] == [0]
    said = capsys.readouterr().err
    assert "trial_001 (optimizer.lr=0.005) ended with 2: finetune.py: error: task.json: max_seq_length: too lo" in said
    assert f"see {tmp_path}/run/logs/trial_001.out" in said
    row = search.trial_row(tmp_path / "run", args.trials[0], "accuracy")
    assert row is not None and row["value"] is None


def test_trials_at_a_time_share_cores_or_have_a_gpu_each(
    words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(search.os, "sched_getaffinity", lambda pid: set(range(12)))
    args = parsed(words, Path(str(words[-1])))
    places = search._Trials(args, tmp_path, "accuracy")._environments
    assert [(one["OMP_NUM_THREADS"], one["WORLD_SIZE"], "MASTER_PORT" in one) for one in places] == [
        ("4", "1", False)
    ] * 3
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    places = search._Trials(args, tmp_path, "accuracy")._environments
    assert [one["CUDA_VISIBLE_DEVICES"] for one in places] == ["2", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    assert search.gpus(tmp_path) == ["0", "1"]


def test_a_search_starts_without_the_launcher_and_its_trials_with_it() -> None:
    assert "launcher" not in " ".join(verb_command("finetune", ["--search", "a.json", "--task", "b"]))
    assert verb_command("finetune", ["--num_gpus", "2", "--search=a.json", "--trial", "3"])[1] == "-m"


def test_a_grid_is_every_combination_and_draws_stay_where_more_are_asked_for(tmp_path: Path) -> None:
    grid = load_trials(write_space(tmp_path, {"optimizer.lr": [1e-5, 3e-5], "seed": [1, 2]}))
    assert [list(trial.settings.values()) for trial in grid] == [[1e-5, 1], [1e-5, 2], [3e-5, 1], [3e-5, 2]]
    assert (grid[1].folder, grid[1].overrides) == ("trial_001", ["optimizer.lr=1e-05", "seed=2"])
    settings = {"optimizer.lr": {"low": 1e-6, "high": 1e-2, "scale": "log"}, "training.epochs": {"low": 1, "high": 4}}
    few, many = (load_trials(write_space(tmp_path, settings, trials=number)) for number in (5, 40))
    assert many[:5] == few
    rates = [trial.settings["optimizer.lr"] for trial in many]
    assert all(1e-6 <= rate <= 1e-2 for rate in rates) and sum(rate < 1e-4 for rate in rates) > 10
    assert {trial.settings["training.epochs"] for trial in many} == {1, 2, 3, 4}
    other = load_trials(write_space(tmp_path, settings, trials=5, seed=2))
    assert [trial.settings for trial in other] != [trial.settings for trial in few]


@pytest.mark.parametrize(
    ("settings", "rest", "said"),
    [
        ({}, {}, "settings: found an object, wanted"),
        ({"optimizer.lr": []}, {}, "settings.optimizer.lr: found an empty list, wanted at least 1 item"),
        ({"optimizer.lr": 1e-4}, {}, "settings.optimizer.lr: found 0.0001, wanted an object"),
        ({"optimizer.lr": [1, 1]}, {}, "settings.optimizer.lr: a value stands in the list twice"),
        ({"optimizer.lr": {"low": 1, "high": 2}}, {}, "is a range, wanted a list of values, or trials"),
        ({"optimizer.lr": {"low": 2, "high": 1}}, {"trials": 2}, "low 2 is not below high 1"),
        ({"optimizer.lr": {"low": 0, "high": 1, "scale": "log"}}, {"trials": 2}, "low 0 has no logarithm"),
        ({"optimizer.lr": {"low": 0, "hihg": 1}}, {"trials": 2}, 'hihg: unknown setting; did you mean "high"?'),
        ({"optimizer.lr": [1, 2]}, {"trails": 2}, 'trails: unknown setting; did you mean "trials"?'),
        ({"optimizer.lr": [1, 2]}, {"trials": 3}, "trials: found 3, wanted at most 2: no more differ"),
        ({"metric": ["accuracy", "f1"]}, {}, "settings.metric: says what is measured"),
        ({"seed": list(range(40)), "max_seq_length": list(range(40))}, {}, "give 1,600 combinations, wanted at most"),
    ],
)
def test_a_space_that_means_nothing_is_refused_in_a_sentence(
    tmp_path: Path, settings: dict[str, Any], rest: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_trials(path := write_space(tmp_path, settings, **rest))
    assert said in str(refused.value) and str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "more", "said"),
    [
        (
            {"optimizer.lrr": [1e-4]},
            (),
            'trial 0 (optimizer.lrr=0.0001): optimizer.lrr: unknown setting; did you mean "lr"?',
        ),
        ({"seed": [1, -2]}, (), "trial 1 (seed=-2): seed: found -2, wanted >= 0"),
        ({"seed": [1, 2]}, ("--seed", "3"), "settings.seed: the command line sets it too"),
        ({"seed": [1, 2]}, ("--seeds", "3"), "settings.seed: the command line sets it too"),
        ({"seed": [1, 2]}, ("--trial", "2"), "--trial: found 2, wanted 0 to 1"),
    ],
)
def test_what_does_not_fit_the_task_or_the_command_line_is_refused_before_anything_starts(
    words: list[object], tmp_path: Path, settings: dict[str, Any], more: tuple[str, ...], said: str
) -> None:
    space = write_space(tmp_path, settings)
    with pytest.raises(ConfigError) as refused:
        search.enter_search(parsed(words, space, "--run_dir", tmp_path / "run", *more))
    assert said in str(refused.value)
    assert not (tmp_path / "run").exists()
