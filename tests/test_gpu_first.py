"""The command for the first card: order, time limits, what is done again, what is said at the end.

The dry run of all stages is a campaign: it starts twenty processes.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "kernels/benchmarks"
FACTS = {"gpu": "H200", "torch": "2", "triton": "3", "commit": "abc", "driver": "580", "transformers": "5"}


@pytest.fixture(scope="module", autouse=True)
def benchmarks_importable() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def first(benchmarks_importable: None) -> ModuleType:
    import gpu_first

    return gpu_first


@pytest.fixture(scope="module")
def step(benchmarks_importable: None) -> ModuleType:
    import gpu_first_step

    return gpu_first_step


def stage(name: str, *scripts: str, limit_s: float = 30.0, least_s: float = 0.0) -> Any:
    from gpu_first_stages import Stage

    return Stage(name, limit_s, tuple(("-c", script) for script in scripts), least_s=least_s)


def run(first: ModuleType, what: Any, folder: Path, limit_s: float = 30.0) -> Any:
    return first.run_stage(what, limit_s, log=folder / f"{what.name}.log", environment=dict(os.environ))


def test_what_matters_most_comes_first(first: ModuleType, tmp_path: Path) -> None:
    stages = first.make_stages(tmp_path, results=tmp_path, commit=None, dry_run=False)
    assert [each.name for each in stages] == [
        *("kernel_tests", "waits", "pretrain", "zero1", "zero2", "zero3", "modernbert", "muon", "benchmarks"),
        *("unpad", "profile", "memory_zero1", "memory_zero2", "memory_zero3"),
    ]
    by_name = {each.name: " ".join(word for command in each.commands for word in command) for each in stages}
    assert "-m gpu" in by_name["kernel_tests"]
    for number in (1, 2, 3):
        assert (
            f"zero{number}.json" in by_name[f"zero{number}"] and f"zero{number}.json" in by_name[f"memory_zero{number}"]
        )
        assert "bert_base.json" in by_name[f"zero{number}"]
    assert "bench_unpad.py" in by_name["unpad"] and "--minutes {minutes}" in by_name["unpad"]
    assert "modernbert_base.json" in by_name["modernbert"] and "bert_base_muon.json" in by_name["muon"]
    assert "--run " not in by_name["pretrain"] and "--require_below_unigram 1.5" in by_name["pretrain"]


def test_every_recipe_of_the_stages_is_one_that_a_run_takes(first: ModuleType, tmp_path: Path) -> None:
    from gpu_first_stages import RECIPES

    from bert_ds.configuration.deepspeed_file.ds_config import load_pair
    from bert_ds.configuration.run_plan import make_plan

    for dry_run in (False, True):
        first.make_stages(tmp_path, results=tmp_path, commit=None, dry_run=dry_run)
        for name, (optimizer, layers) in zip(RECIPES, (("lamb", 12), ("muon", 12), ("stableadamw", 22)), strict=True):
            plan = make_plan(*load_pair(tmp_path / f"{name}.json", ROOT / "ds_configs/zero1.json", overrides=[]), 1)
            assert plan.run.optimizer.type == optimizer
            assert plan.run.model.num_hidden_layers == (2 if dry_run else layers)


def test_a_stage_that_fails_is_named_by_its_error_and_its_figures_stay(first: ModuleType, tmp_path: Path) -> None:
    script = "from gpu_first_stages import figure_line as f; print(f('tokens', 7, 'T')); raise ValueError('no card')"
    failing = stage("failing", f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); {script}", "print('never')")
    outcome = run(first, failing, tmp_path)
    assert (outcome.state, outcome.figures) == ("failed", [("tokens", "7", "T")])
    assert "ended with 1: ValueError: no card" in outcome.note
    assert "never" not in (tmp_path / "failing.log").read_text()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_stage_ends_in_time_with_all_that_it_started(first: ModuleType, tmp_path: Path) -> None:
    child = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '61']); print(p.pid, flush=True); time.sleep(60)"
    )
    outcome = run(first, stage("slow", child, limit_s=5.0), tmp_path)
    assert outcome.state == "unfinished" and "stopped after" in outcome.note
    pid = int((tmp_path / "slow.log").read_text())
    deadline = time.monotonic() + 20  # a killed process is gone soon, not at once
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


def test_a_benchmark_that_has_something_left_is_no_stage_that_is_done(first: ModuleType, tmp_path: Path) -> None:
    outcome = run(first, stage("benchmarks", "print('the time is spent: 3 cases left, run again to go on')"), tmp_path)
    assert outcome.state == "unfinished"
    # In the words of the scripts themselves.
    for name in ("bench_ops.py", "bench_train_step.py"):
        assert "run again to go on" in (BENCHMARKS / name).read_text()


def test_minutes_of_a_benchmark_end_before_its_limit(first: ModuleType, tmp_path: Path) -> None:
    from gpu_first_stages import Stage

    bench = Stage("bench", 600.0, (("-c", "import sys; print('M', sys.argv[1])", "{minutes}"),))
    run(first, bench, tmp_path, limit_s=128.0)
    assert (tmp_path / "bench.log").read_text() == "M 2.00\n"


def test_a_second_call_does_what_was_never_tried_then_what_failed_and_nothing_twice(
    first: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "gpu_first.csv"
    stages = [stage(name, "", least_s=5.0) for name in "abcd"]
    ends = {"a": "failed", "b": "done"}
    calls: list[str] = []

    def call(seconds: float, facts: dict[str, str] = FACTS) -> dict[str, str]:
        states = first.known_states(path, facts)

        def do(what: Any, left: float) -> Any:
            calls.append(what.name)
            outcome = first.Outcome(ends.get(what.name, "done"), 1.0, "", [])
            first.append_rows(path, first.rows_of(what.name, outcome, facts))
            return outcome

        first.do_stages(stages, states=states, end=time.monotonic() + seconds, do=do)
        return states

    assert call(1.0) == {} and calls == []  # too little time for any
    stages[2:], kept = [], stages[2:]
    call(60.0)
    stages += kept
    assert calls == ["a", "b"]
    call(60.0)
    assert calls == ["a", "b", "c", "d", "a"]
    ends["a"] = "done"
    call(60.0)
    assert calls[5:] == ["a"]
    call(60.0)
    assert len(calls) == 6
    call(60.0, {**FACTS, "commit": "abd"})
    assert calls[6:] == ["a", "b", "c", "d"]
    call(60.0, {**FACTS, "commit": "abc+"})
    call(60.0, {**FACTS, "commit": "abc+"})
    assert len(calls) == 18


def row(stage_name: str, name: str, value: str) -> dict[str, str]:
    return {"stage": stage_name, "name": name, "value": value, "unit": "", "note": ""}


def test_losses_of_the_zero_stages_are_compared_step_by_step(first: ModuleType) -> None:
    rows = [row(f"zero{n}", f"loss of step {s}", "8.0") for n in (1, 2, 3) for s in (1, 2)]
    assert "equal: at most 0.000 % apart at 2 steps" in first.losses_line(rows)
    rows[3]["value"] = "8.1"
    assert "NOT equal: at most 1.250 %" in first.losses_line(rows)
    rows[3]["value"] = "nan"
    assert "NOT equal" in first.losses_line(rows)
    assert "not measured" in first.losses_line(rows[:4])


def test_the_summary_says_each_stage_of_its_newest_try(first: ModuleType) -> None:
    rows = [row("a", "x", "1"), row("a", "outcome", "failed"), row("a", "x", "2"), row("a", "outcome", "done")]
    lines = first.summary([stage("a", ""), stage("b", "")], rows)
    assert lines[2] == "| a | done | x 2 |"
    assert lines[3] == "| b | not tried | |"


def test_waits_inside_engine_step_are_counted_apart_and_ours_raise(step: ModuleType) -> None:
    modes: list[str] = []

    def wait() -> None:
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if modes[-1] == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

    engine = SimpleNamespace(step=wait)
    ours, apart = step.watched_waits(
        engine, lambda: (engine.step(), engine.step()), set_mode=modes.append, mode="error"
    )
    assert (ours, len(apart), modes[-1], engine.step) == ([], 2, "default", wait)
    ours, apart = step.watched_waits(engine, lambda: (wait(), engine.step()), set_mode=modes.append, mode="warn")
    assert len(ours) == len(apart) == 1 and "test_gpu_first.py:" in ours[0]
    with pytest.raises(RuntimeError, match="synchronizing"):
        step.watched_waits(engine, wait, set_mode=modes.append, mode="error")
    assert modes[-1] == "default" and engine.step is wait


def test_the_arithmetic_of_a_profile(step: ModuleType) -> None:
    assert step.idle_share([]) == 0.0
    assert step.idle_share([(0, 4), (1, 2), (3, 5), (8, 10)]) == pytest.approx(0.3)
    assert step.longest([("a", 1.0), ("b", 5.0), ("a", 6.0)], 1) == [("a", 7.0, 2)]


def test_records_alone_do_not_make_a_checkout_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_harness

    monkeypatch.setattr(bench_harness, "ROOT", tmp_path)
    record, code = tmp_path / "kernels/benchmarks/results/ops.csv", tmp_path / "kernels/benchmarks/bench.py"
    record.parent.mkdir(parents=True)
    record.write_text("a\n")
    code.write_text("1\n")
    git = ("git", "-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
    for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "m")):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    clean = bench_harness._commit()
    record.write_text("a\n1\n")
    assert bench_harness._commit() == clean != "unknown"
    code.write_text("2\n")
    assert bench_harness._commit() == clean + "+"


@pytest.mark.campaign
def test_a_dry_run_goes_through_every_stage_and_records_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_first.py"), "--dry_run", "--minutes", "20"]
    done = subprocess.run(
        [*command, "--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    print(done.stdout)
    lines = done.stdout.splitlines()
    ended = {line.split()[0] for line in lines if " done in " in line}
    assert {"kernel_tests", "waits", "pretrain", "zero1", "zero2", "zero3", "modernbert", "muon", "benchmarks"} <= ended
    assert {"profile", "memory_zero1", "memory_zero2", "memory_zero3"} <= ended
    assert any(line.startswith("losses under ZeRO 1, 2, 3: equal") for line in lines)
    assert done.stdout.count("not measured") == 15 and "peak over plan" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card, and nine minutes would begin")
def test_a_machine_without_a_card_is_told_so_and_nothing_is_recorded(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_first.py"), "--results", str(tmp_path / "r")]
    done = subprocess.run([*command, "--work", str(tmp_path / "w")], capture_output=True, text=True)
    assert done.returncode == 1 and "no CUDA device" in done.stderr and not (tmp_path / "r").exists()


def test_a_package_is_found_in_the_wheels_of_a_folder(first: ModuleType, tmp_path: Path) -> None:
    import zipfile

    assert "holds no *.whl" in first.install_wheels(tmp_path, tmp_path / "site")
    info = "only_here-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "only_here-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("only_here.py", "FOUND = 'in the wheel'\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: only-here\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    assert first.install_wheels(tmp_path, tmp_path / "site") == ""
    what = stage("imports", "import only_here; print(only_here.FOUND)")
    environment = first.make_environment(tmp_path / "site", dry_run=True)
    assert first.run_stage(what, 30.0, log=tmp_path / "log", environment=environment).state == "done"
    assert (tmp_path / "log").read_text() == "in the wheel\n"


def test_rows_carry_the_circumstances(first: ModuleType, tmp_path: Path) -> None:
    outcome = first.Outcome("failed", 3.0, "why", [("x", "1", "ms")])
    first.append_rows(tmp_path / "r.csv", first.rows_of("waits", outcome, FACTS))
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(each["name"], each["value"]) for each in rows] == [("x", "1"), ("seconds", "3.0"), ("outcome", "failed")]
    assert all({name: each[name] for name in FACTS} == FACTS for each in rows) and rows[-1]["note"] == "why"
