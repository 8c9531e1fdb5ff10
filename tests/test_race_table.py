"""What the tables of the race say of a curve, worked out by hand; what its tasks are trained from."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import campaign_race
import pytest
from campaign_rows import add_row, read_rows
from race_table import loss_after, print_tables, reached

CURVE = [(1.0, 100.0, 7.0, 0.0), (3.0, 300.0, 6.0, 0.1), (4.0, 400.0, 6.5, 0.1), (8.0, 900.0, 4.5, 0.2)]


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (7.5, (1.0, 100.0)),
        (7.0, (1.0, 100.0)),
        (6.75, (1.5, 150.0)),
        (6.0, (3.0, 300.0)),
        (5.0, (7.0, 775.0)),
        (4.4, None),
    ],
)
def test_a_loss_is_reached_where_the_line_between_evaluations_first_meets_it(
    loss: float, found: tuple[float, float] | None
) -> None:
    assert reached(CURVE, loss) == (pytest.approx(found) if found else None)


def test_the_loss_after_so_many_minutes_lies_on_that_line() -> None:
    assert [loss_after(CURVE, minutes) for minutes in (2.0, 3.5, 9.0)] == pytest.approx([6.5, 6.25, 4.5])
    assert math.isnan(loss_after(CURVE, 0.5))


def test_seeds_are_one_line_and_a_loss_that_one_of_them_missed_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"amx": False, "text": "en", "minutes": 10.0, "name": "ours", "lr": 2e-3, "batch": 32, "unigram": 7.0}
    ends = {"tokens_per_s": 4000.0, "tokens": 2_000_000, "accuracy": 0.2}
    other = [(minutes, tokens, loss + 0.2, hits) for minutes, tokens, loss, hits in CURVE]
    rows = [{**row, **ends, "loss": 4.5, "curve": CURVE}, {**row, **ends, "loss": 4.7, "curve": other}]
    end_alone = {**row, **ends, "name": "unseen", "loss": 4.5, "curve": CURVE[-1:]}
    print_tables([*rows, {"task": "trec", "name": "ours"}, end_alone, {**end_alone, "text": "zh"}])
    said = capsys.readouterr().out.splitlines()
    assert said[2] == "| no AMX | en | 10 | ours | 0.002 | 32 | 2 | 4,000 | 2.00 M | 4.600 ± 0.141 | 2.400 |"
    assert [line.split(" | ")[1] for line in said[2:5]] == ["en", "en", "zh"]
    cells = [cell.strip() for cell in said[-1].split("|")[1:-1]]
    assert cells[:6] == ["no AMX", "en", "ours", "6.600 ± 0.141", "6.100 ± 0.141", "4.600 ± 0.141"]
    assert cells[6:] == ["1.2, 0.00 M", "4.2, 0.00 M", "6.2, 0.00 M", "7.2, 0.00 M", "1 of 2", "never"]


def test_tasks_are_trained_from_models_that_are_there_and_need_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that is recorded is not trained again; nothing is pre-trained."""
    results = tmp_path / "race.jsonl"
    calls: list[tuple[str, str, str]] = []
    monkeypatch.setattr(campaign_race, "RESULTS", results)
    known = {"task": "trec", "name": campaign_race.FAMILIES[0], "seed": 1, "minutes": 9.0}
    add_row(results, {**known, "amx": campaign_race._has_amx()})

    def verb(name: str, *words: Any) -> None:
        calls.append((name, words[words.index("--task") + 1], words[words.index("--model") + 1].parent.name))
        (run_dir := words[words.index("--run_dir") + 1]).mkdir(parents=True)
        (run_dir / "results.json").write_text('{"metric": "f1", "validation": {"loss": 2.0, "f1": 0.5}}')

    monkeypatch.setattr(campaign_race, "_verb", verb)
    options = ["--work", str(tmp_path), "--data", str(tmp_path), "--minutes", "9", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["campaign_race.py", "tasks", *options])
    monkeypatch.setattr(campaign_race, "draw", lambda rows, path: None)
    campaign_race.main()
    assert len(calls) == 3 * len(campaign_race.FAMILIES) - 1
    assert ("finetune", "stsb_en", "modernbert_of_696-0.002-32-1-9.0") in calls
    assert not any("trec" in call and "modernbert" in call[2] for call in calls)
    assert [row["score"] for row in read_rows(results)[1:]] == [0.5] * len(calls)
