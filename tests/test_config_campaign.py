"""A slice of `campaign_configs.py`: broken files are refused with the field named, none is accepted and ignored."""

from __future__ import annotations

from pathlib import Path

import campaign_configs
import pytest
from broken_deepspeed import BROKEN
from config_bombs import BOMBS
from config_cases import write_json
from config_damage import broken, every_damage
from config_oracle import ask, names_setting, verdict
from config_subjects import RECIPE, deepspeed_subject, other_subjects, recipe_subject, shipped_subjects

CHOSEN = ("embedded_default in full", "bert_base_zh", "zero3_offload", "sst2", "sst2_prompt in full", "job")
SUBJECTS = [one for one in (*shipped_subjects(), *other_subjects()) if one.name in CHOSEN]


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_the_file_itself_is_right(tmp_path: Path, subject: campaign_configs.Subject) -> None:
    assert ask(subject, write_json(tmp_path, "right.json", subject.data))[:2] == ((), "")


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_every_kind_of_damage_is_refused_by_name_or_honoured(tmp_path: Path, subject: campaign_configs.Subject) -> None:
    wrong = []
    for damage in list(every_damage(subject.data))[::7]:
        file = write_json(tmp_path, "broken.json", broken(subject.data, damage))
        found = verdict(subject, file, ask(subject, file), damage)
        if found not in ("refused", "accepted"):
            wrong.append((damage.path, damage.kind, found))
    assert wrong == []


def test_several_mistakes_are_all_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign_configs, "TOGETHER", 150)
    assert campaign_configs.together(tmp_path / "broken.json").failures == []


def test_values_and_bytes_nobody_thought_of_are_refused_or_honoured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign_configs, "EXAMPLES", 100)
    assert campaign_configs.hypothesis(tmp_path / "broken.json").failures == []


@pytest.mark.parametrize(("settings", "wanted"), BROKEN, ids=[str(settings)[:60] for settings, _ in BROKEN])
def test_a_classic_mistake_in_a_deepspeed_file_is_named(tmp_path: Path, settings: dict, wanted: str) -> None:
    answer = ask(deepspeed_subject("", {}), write_json(tmp_path, "ds.json", settings))
    assert answer.crash == "" and any(wanted in line for line in answer.lines)


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_few_printable_lines_that_name_it(tmp_path: Path, name: str) -> None:
    bomb = tmp_path / "bomb.json"
    BOMBS[name](bomb)
    for subject in (recipe_subject("", {}), deepspeed_subject("", {})):
        answer = ask(subject, bomb)
        assert answer.crash == "" and answer.lines and str(bomb) in answer.lines[0]
        assert len(answer.lines) <= 51 and all(line.isprintable() and len(line) < 2000 for line in answer.lines)


def test_the_judge_does_not_take_a_refusal_for_the_wrong_reason(tmp_path: Path) -> None:
    subject = recipe_subject("", {})
    file = write_json(tmp_path, "run.json", RECIPE.read_text().replace("total_steps", "total_stesp"))
    answer = ask(subject, file)
    assert names_setting(answer, file, "training.total_stesp") and not names_setting(answer, file, "model.vocab_size")
