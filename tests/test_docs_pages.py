"""What the pages list is what there is: recipes, tasks, families, kinds, exit codes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_commands import PAGES, ROOT

from bert_ds.basics import ranks
from bert_ds.configuration.families.table import FAMILY_CONFIGS
from bert_ds.configuration.task.task_kinds import KIND_FACTS

DOCS = ROOT / "docs"


def named(page: Path) -> set[str]:
    """What a page names as code; an ending alone belongs to the name before it."""
    names: list[str] = []
    for span in re.findall(r"`([\w.]+)`", page.read_text(encoding="utf-8")):
        begun = re.sub(r"_phase\d$", "", names[-1]) if names else ""
        names.append(begun + span if span.startswith("_phase") else span)
    return set(names)


@pytest.mark.parametrize("page", ["recipes.md", "zh/recipes.md"])
def test_every_shipped_recipe_is_named(page: str) -> None:
    shipped = {path.stem for path in (ROOT / "ds_configs/recipes").glob("*.json")}
    assert shipped - named(DOCS / page) == set()


@pytest.mark.parametrize("page", ["encoders.md", "zh/encoders.md"])
def test_every_family_has_its_point(page: str) -> None:
    points = re.findall(r"^\* `(\w+)`", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(points) == sorted(FAMILY_CONFIGS)


def test_every_kind_that_is_trained_has_a_row_whose_first_metric_is_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", (DOCS / "finetune.md").read_text(encoding="utf-8"), re.M)
    assert [kind for kind, _ in rows] == [kind for kind, facts in KIND_FACTS.items() if facts.is_trained]
    for kind, metrics in rows:
        names = [word for word in re.findall(r"\w+", metrics) if word in KIND_FACTS[kind].metrics]
        assert kind == "question_answering" or names[0] == KIND_FACTS[kind].metrics[0], kind


@pytest.mark.parametrize(("page", "begin"), [("troubles.md", "Exit codes:"), ("zh/troubles.md", "0 完成")])
def test_every_exit_code_is_said(page: str, begin: str) -> None:
    codes = {value for name, value in vars(ranks).items() if name.startswith("EXIT_")}
    (line,) = re.findall(rf"^{begin}.*$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert {int(code) for code in re.findall(r"\d+", line)} == codes


def test_no_sentence_stands_in_two_places() -> None:
    found: dict[str, set[str]] = {}
    for page in PAGES:
        if page.name not in ("CHANGELOG.md", "BENCHMARKS.md"):
            text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
            for sentence in re.split(r"(?<=[.:;。；：])\s*", " ".join(text.split())):
                if len(sentence) > (25 if re.search("[一-鿿]", sentence) else 50):
                    found.setdefault(sentence, set()).add(str(page.relative_to(ROOT)))
    assert len(found) > 800
    assert {sentence: pages for sentence, pages in found.items() if len(pages) > 1} == {}


def test_every_test_that_a_page_names_is_there() -> None:
    texts = [
        page.read_text(encoding="utf-8") for page in (*DOCS.rglob("*.md"), *DOCS.rglob("*.py"), ROOT / "SERVING.md")
    ]
    names = {name for text in texts for name in re.findall(r"[`\"](test_\w+\*?)[`\"]", text)}
    assert len(names) > 20
    assert [name for name in names if not list((ROOT / "tests").glob(f"{name}.py"))] == []
