from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bert_ds.basics.ranks import CheckpointError, DataError, DivergedError, LauncherError
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.launch.command_line import (
    SPIN_COUNT,
    add_launch_options,
    answer_early,
    make_parser,
    run_main,
    show_progress,
)


def test_options_are_understood_with_underscores_and_with_hyphens() -> None:
    parser = make_parser("a verb")
    parser.add_argument("--vocab_size", type=int)
    assert parser.parse_args(["--vocab_size", "7"]).vocab_size == 7
    assert parser.parse_args(["--vocab-size", "8"]).vocab_size == 8
    assert parser.parse_args(["--vocab-size=9"]).vocab_size == 9


def test_what_launchers_and_habit_add_is_accepted() -> None:
    parser = make_parser("a verb")
    add_launch_options(parser)
    parsed = parser.parse_args(["--local-rank=1", "--deepspeed", "--resume", "auto", "--hang_limit", "0"])
    assert (parsed.resume, parsed.hang_limit) == ("auto", 0.0)


@pytest.mark.parametrize("limit", ["-3", "inf", "nan", "soon"])
def test_a_hang_limit_that_is_no_time_is_refused(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = make_parser("a verb")
    add_launch_options(parser)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args([f"--hang_limit={limit}"])
    assert ended.value.code == 2
    assert f"found {limit}, wanted a number of seconds, or 0" in capsys.readouterr().err


def test_values_keep_their_hyphens() -> None:
    parser = make_parser("a verb")
    parser.add_argument("--run_dir")
    parser.add_argument("input", nargs="*")
    parsed = parser.parse_args(["--run-dir=my-run-1", "a-b.txt"])
    assert (parsed.run_dir, parsed.input) == ("my-run-1", ["a-b.txt"])


def test_options_are_never_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    parser = make_parser("a verb")
    parser.add_argument("--vocab_size", type=int)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--vocab", "7"])
    assert ended.value.code == 2


def test_an_unknown_option_ends_with_two_and_one_line_that_names_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = make_parser("a verb")
    parser.add_argument("--vocab_size", type=int)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--vocab_sise", "7"])
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert "unknown argument --vocab_sise; did you mean --vocab_size?" in message
    assert message.count("\n") == 1


def test_a_value_of_the_wrong_type_ends_with_two_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    parser = make_parser("a verb")
    parser.add_argument("--vocab_size", type=int)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--vocab_size", "many"])
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert "'many'" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("seed is -1, wanted 0 or more"), 2),
        (LauncherError("RANK is set but WORLD_SIZE is not"), 2),
        (DataError("a.txt is empty"), 3),
        (CheckpointError("step 4 is damaged"), 4),
        (DivergedError("loss is nan since step 9"), 5),
    ],
)
def test_errors_become_exit_codes_and_one_line(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_main(main)
    message = capsys.readouterr().err
    assert ended.value.code == code
    assert message.endswith(f"error: {error}\n")
    assert message.count("\n") == 1


def test_a_defect_keeps_its_traceback() -> None:
    def main() -> None:
        raise KeyError("a defect")

    with pytest.raises(KeyError):
        run_main(main)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (75, 75)])
def test_a_main_that_returns_ends_with_its_code_or_zero(returned: int | None, code: int) -> None:
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: returned)
    assert ended.value.code == code


def test_progress_off_a_terminal_writes_no_control_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bert_ds.launch.command_line._PLAIN_LINE_EVERY_S", 0.0)
    with show_progress("shards", total=200) as report:
        report(50, "3 documents")
    assert capsys.readouterr().err == "shards: 25 % 3 documents\n"


def test_importing_it_imports_neither_torch_nor_rich() -> None:
    code = "import sys, bert_ds.launch.command_line; assert not {'torch', 'rich', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_leaving_at_once_keeps_the_exit_code_the_output_and_the_exit_handlers() -> None:
    code = (
        "import atexit, threading, time\n"
        "from bert_ds.launch.command_line import run_main\n"
        "atexit.register(lambda: print('handler ran'))\n"
        "threading.Thread(target=time.sleep, args=(30,)).start()\n"
        "run_main(lambda: print('done') or 75, leave_at_once=True)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert ended.returncode == 75
    assert ended.stdout.split() == ["done", "handler", "ran"]


def test_a_defect_keeps_its_traceback_when_leaving_at_once() -> None:
    code = "from bert_ds.launch.command_line import run_main\nrun_main(lambda: 1 // 0, leave_at_once=True)\n"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert ended.returncode == 1
    assert "ZeroDivisionError" in ended.stderr


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, SPIN_COUNT),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_threads_spin_for_a_while_unless_the_environment_says_how_long(
    given: dict[str, str], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    answer_early(lambda: None)
    gc.enable()
    assert os.environ.get("GOMP_SPINCOUNT") == found
