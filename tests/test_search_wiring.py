"""What a search hands to its trials and to the look at the test rows, and what it makes of what they leave behind."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from downstream_cases import review_rows, review_task, write_lines
from test_search import write_space

from bert_ds.basics.ranks import DataError, DivergedError
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.task.search_space import load_trials
from bert_ds.launch import search
from bert_ds.launch.verb_arguments import finetune_arguments
from bert_ds.reporting import search_page

Leave = Callable[[Path, int], int]
"""What a trial of a number leaves in its folder; returns its exit code."""
SIDES = ("train", "validation", "test")


@pytest.fixture
def words(tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The command line of a search of three rates over a task with test rows, the files of which --data names."""
    (tmp_path / "data").mkdir()
    for name in SIDES:
        write_lines(tmp_path / "data" / name, ["text\tlabel", *review_rows(8)])
    files: dict[str, Any] = {name: [{"path": name, "format": "tsv"}] for name in SIDES}
    task = review_task(tmp_path / "task", data={**files, "fields": {"text": "text", "label": "label"}})
    space = write_space(tmp_path, {"optimizer.lr": [1e-3, 2e-3, 3e-3]})
    given = ["--task", task, "--data", tmp_path / "data", "--model", tiny_export, "--run_dir", tmp_path / "run"]
    handlers = {number: signal.getsignal(number) for number in search.stop_signals_heard()}
    monkeypatch.setattr("sys.argv", ["finetune.py"])
    monkeypatch.setattr(search, "_LOOK_EVERY_S", 0.0)
    yield [*map(str, given), "--parallel", "1", "--search", str(space)]
    for number, handler in handlers.items():
        signal.signal(number, handler)


def left(folder: Path, results: dict[str, Any], *, seeds: tuple[int, ...] = ()) -> int:
    """Leave what a finished fine-tuning does."""
    for run in [folder / f"seed_{seed}" for seed in seeds] or [folder]:
        run.mkdir(parents=True, exist_ok=True)
        (run / "DONE").touch()
    (folder / "results.json").write_text(json.dumps({**results, **({"seeds": seeds} if seeds else {})}))
    return 0


class Started(list[list[str]]):
    """Command lines of the trials and of the scorings; these leave 0.1, 0.2 and so on as their accuracy."""

    def __init__(self, patch: pytest.MonkeyPatch, leave: Leave) -> None:
        super().__init__()
        self.scored: list[list[str]] = []
        self._leave = leave
        patch.setattr(search, "start", self._start)

    def _start(self, command: list[str], environment: dict[str, str], log: Path) -> Any:
        log.parent.mkdir(exist_ok=True)
        log.touch()
        if "--trial" not in command:
            self.scored.append(command[2:])
            (output := Path(command[command.index("--output") + 1])).mkdir()
            found = {"accuracy": len(self.scored) / 10, "f1": 0.5}
            found |= {"loss": 1.0} if len(self.scored) == 1 else {}
            (output / "results.json").write_text(json.dumps({"test": found}))
            return SimpleNamespace(wait=lambda: 0)
        self.append(command)
        number = int(command[command.index("--trial") + 1])
        code = self._leave(log.parents[1] / f"trial_{number:03d}", number)
        return SimpleNamespace(poll=lambda: code, send_signal=lambda number: None)


def searched(words: list[str], *more: object) -> tuple[int, dict[str, Any]]:
    """Search in this process; the exit code and results.json."""
    args = finetune_arguments([*words, *map(str, more)])
    code = search.run_search(args, show=lambda folder, results: None)
    path = Path(args.run_dir) / "results.json"
    return code, json.loads(path.read_text()) if path.exists() else {}


def test_means_over_seeds_choose_and_each_seed_of_the_chosen_one_is_scored_once_as_it_was_trained(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {0: (0.9, 0.5), 1: (0.7, 0.8), 2: (math.nan, math.nan)}

    def leave(folder: Path, number: int) -> int:
        mean = sum(values[number]) / 2
        spread = {"mean": mean, "deviation": 0.25, "values": values[number]}
        return left(folder, {"validation": {"accuracy": spread}}, seeds=(3, 4))

    started = Started(monkeypatch, leave)
    search.open_run_folder(tmp_path / "run")
    (tmp_path / "run/test/trial_000").mkdir(parents=True)
    more = ("--seeds", 3, 4, "--set", "max_seq_length=20")
    code, results = searched(words, *more)
    assert code == 0 and len(started) == 3
    assert (results["chosen"], [row["value"] for row in results["trials"]]) == ("trial_001", [0.75, 0.7, None])
    assert results["trials"][0]["deviation"] == 0.25
    run, data = tmp_path / "run", str(tmp_path / "data")
    settings = ["--set", "max_seq_length=20", "--set", "optimizer.lr=0.002"]
    task = ["--task", words[1], "--side", "test", "--data", data, *settings]
    assert started.scored == [
        [*task, "--model", str(run / f"trial_001/{seed}/hf"), "--output", str(run / f"test/trial_001/{seed}")]
        for seed in ("seed_3", "seed_4")
    ]
    assert results["test"] == {"accuracy": pytest.approx(0.15), "f1": 0.5}
    assert results["test_looked_at_by"] == ["trial_000", "trial_001"]
    assert "the test rows have been looked at by trial_000 before" in capsys.readouterr().out
    assert searched(words, *more) == (0, results) and (len(started), len(started.scored)) == (3, 2)


def test_a_trial_is_finished_once_every_seed_is(words: list[str], tmp_path: Path) -> None:
    trial = load_trials(words[-1])[0]
    left(tmp_path / trial.folder, {"validation": {"accuracy": {"mean": 0.5, "deviation": 0.0}}}, seeds=(1, 2))
    row = search.trial_row(tmp_path, trial, "accuracy")
    assert row is not None and row["value"] == 0.5
    with pytest.raises(DataError, match=r"results\.json has no f1 of the validation rows"):
        search.trial_row(tmp_path, trial, "f1")
    (tmp_path / trial.folder / "seed_2/DONE").unlink()
    assert search.trial_row(tmp_path, trial, "accuracy") is None
    left(tmp_path / trial.folder, {"validation": {"accuracy": math.inf}, "step": 7})
    row = search.trial_row(tmp_path, trial, "accuracy")
    assert row is not None and (row["value"], row["step"]) == (None, 7)


def test_where_all_have_diverged_nothing_is_chosen_and_trials_that_are_added_do_not_run_these_again(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Started(monkeypatch, lambda folder, number: 5)
    with pytest.raises(DivergedError, match="no trial has a accuracy: wanted lower learning rates"):
        searched(words)
    started._leave = lambda folder, number: left(folder, {"validation": {"accuracy": 0.5}, "step": 1})
    more = write_space(tmp_path, {"optimizer.lr": [1e-3, 2e-3, 3e-3, 4e-3]})
    code, results = searched([*words[:-1], str(more)])
    assert (code, len(started), results["chosen"]) == (0, 4, "trial_003")


@pytest.mark.parametrize(
    ("ended", "code"),
    [(lambda folder, number: -9, 75), (lambda folder, number: 0, 75), (lambda folder, number: 3, 3)],
    ids=["killed", "nothing left behind", "failed"],
)
def test_a_trial_that_is_not_finished_ends_the_search_with_its_code(
    ended: Leave, code: int, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Started(monkeypatch, ended)
    assert searched(words) == (code, {}) and len(started) == 1


@pytest.mark.parametrize("code", [75, 3])
def test_a_trial_that_fails_while_the_search_is_asked_to_stop_is_no_stopped_one(
    code: int, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(folder: Path, number: int) -> int:
        signal.raise_signal(signal.SIGTERM)
        return code

    started = Started(monkeypatch, leave)
    assert searched(words) == (code, {}) and len(started) == 1
    assert ("ended with 3" in capsys.readouterr().err) == (code == 3)


def test_a_search_goes_on_with_the_model_the_weights_and_the_spread_that_it_was_begun_with(
    words: list[str], tmp_path: Path
) -> None:
    search.enter_search(finetune_arguments(words))
    other = tmp_path / "other"
    other.symlink_to(words[5])
    for changed, what in (
        ([*words, "--random_weights"], "random_weights"),
        ([*words[:5], str(other), *words[6:]], "model"),
        ([*words, "--deepspeed_config", "zero2"], "deepspeed_config"),
    ):
        with pytest.raises(ConfigError, match=f"run was begun with another {what}: wanted the same search"):
            search.enter_search(finetune_arguments(changed))


def test_a_search_is_no_rank_of_a_launch(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="found 2 ranks, wanted no launcher"):
        searched(words)


def test_each_setting_is_drawn_for_itself_and_to_the_end_of_its_values(tmp_path: Path) -> None:
    pair = {"low": 0.0, "high": 1.0}
    settings = {"optimizer.lr": pair, "optimizer.weight_decay": pair, "seed": [1, 2], "training.epochs": [1, 2]}
    drawn = [tuple(one.settings.values()) for one in load_trials(write_space(tmp_path, settings, trials=20))]
    assert all(rate != decay for rate, decay, *_ in drawn)
    assert {one[2:] for one in drawn} == {(1, 1), (1, 2), (2, 1), (2, 2)}


def test_more_training_rows_may_be_searched_for_and_other_rows_to_measure_on_may_not(tmp_path: Path) -> None:
    assert len(load_trials(write_space(tmp_path, {"data.max_train_rows": [100, 200]}))) == 2
    for name in ("data.max_validation_rows", "data.validation_fraction", "name"):
        with pytest.raises(ConfigError, match=f"settings.{name}: says what is measured"):
            load_trials(write_space(tmp_path, {name: [0.1, 0.2]}))


def test_the_table_says_none_of_what_diverged_and_the_page_has_each_figure_under_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"trial": "trial_001", "settings": {"seed": 2}, "value": 0.5, "deviation": 0.125, "step": 7},
        {"trial": "trial_000", "settings": {"seed": 1}, "value": None, "deviation": None, "step": None},
    ]
    search.open_run_folder(tmp_path / "run")
    found = {"task": "t", "metric": "accuracy", "chosen": "trial_001", "trials": rows}
    search_page.show_search(tmp_path / "run", found)
    said = capsys.readouterr().out.splitlines()
    assert [line.split() for line in said[1:3]] == [
        ["trial_001", "0.5000", "+-", "0.1250", "seed=2"],
        ["trial_000", "none", "seed=1"],
    ]
    page = (tmp_path / "run/search.html").read_text(encoding="utf-8")
    cells = [page.index(text) for text in ("deviation", "best step", "trial_001</td>", "0.1250", "<td>7</td>")]
    assert cells == sorted(cells)
