"""The front page is short, and says in Chinese all that it says in English; so does the tutorial."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_commands import ROOT, blocks_of

FRONT = (ROOT / "README.md", ROOT / "README.zh-CN.md")
TUTORIAL = (ROOT / "docs/tutorial.md", ROOT / "docs/zh/tutorial.md")


def sections(page: Path) -> list[tuple[int, str]]:
    """Level of each heading, and the text below it without blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    parts = re.split(r"^(#+) .*$", text, flags=re.MULTILINE)[1:]
    return [(len(marks), body) for marks, body in zip(parts[::2], parts[1::2], strict=True)]


@pytest.mark.parametrize("pages", [FRONT, TUTORIAL], ids=["front", "tutorial"])
def test_both_languages_have_the_same_headings_and_blocks(pages: tuple[Path, Path]) -> None:
    english, chinese = pages
    assert [level for level, _ in sections(english)] == [level for level, _ in sections(chinese)]
    assert len(sections(english)) >= 5
    for language in ("", "text", "json"):
        assert blocks_of(english, language) == blocks_of(chinese, language)


@pytest.mark.parametrize("pages", [FRONT, TUTORIAL], ids=["front", "tutorial"])
@pytest.mark.parametrize("pattern", [r"`[^`]+`", r"(?<![\w.])\d+(?:[.,]\d+)*"], ids=["code", "numbers"])
def test_both_languages_name_the_same_things_and_numbers(pages: tuple[Path, Path], pattern: str) -> None:
    english, chinese = ([set(re.findall(pattern, body)) for _, body in sections(page)] for page in pages)
    assert english == chinese


@pytest.mark.parametrize("pages", [FRONT, TUTORIAL], ids=["front", "tutorial"])
@pytest.mark.parametrize("begin", [r"\* ", r"\* \*\*", r"!\[", r"\|"], ids=["points", "bold", "pictures", "rows"])
def test_both_languages_have_as_many_points_pictures_and_rows(pages: tuple[Path, Path], begin: str) -> None:
    english, chinese = ([len(re.findall(f"^{begin}", body, re.M)) for _, body in sections(page)] for page in pages)
    assert english == chinese


def rows(page: Path) -> list[list[str]]:
    return [line.split("|")[1:-1] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]


def test_every_row_of_the_table_leads_to_the_same_page_or_to_a_chinese_one() -> None:
    for english, chinese in zip(*map(rows, FRONT), strict=True):
        targets, others = (re.findall(r"\]\(([^)]+)\)", row[-1]) for row in (english, chinese))
        assert len(english) == len(chinese) == 2
        assert others or not targets
        assert all(target in targets or target.startswith("docs/zh/") for target in others), chinese
        assert set(targets) <= set(others) or any(target.startswith("docs/zh/") for target in others), chinese


def test_the_front_page_is_read_in_three_minutes() -> None:
    for page in FRONT:
        assert 80 < len(page.read_text(encoding="utf-8").splitlines()) < 130
    words = len(re.sub(r"^```.*?^```$", "", FRONT[0].read_text(encoding="utf-8"), flags=re.M | re.S).split())
    assert words < 900


def test_every_page_of_the_docs_is_reached_from_the_front_page() -> None:
    """In one step, or in two."""

    def linked(page: Path) -> set[Path]:
        targets = re.findall(r"\]\(([^()#\s]+\.md)", page.read_text(encoding="utf-8"))
        return {(page.parent / target).resolve() for target in targets}

    first = linked(FRONT[0]) | linked(FRONT[1])
    reached = first.union(*(linked(page) for page in first if page.is_file()))
    assert [page for page in (ROOT / "docs").rglob("*.md") if page not in reached] == []
