"""The site of the documentation: built strictly, whole, and without anything that a reader's browser would fetch."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from doc_commands import PAGES
from documents import with_page_links
from verb_help import verb_parsers

from bert_ds.configuration.task.task_kinds import KIND_FACTS
from bert_ds.launch.verbs import VERBS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site, which a warning would have kept from being built."""
    folder = tmp_path_factory.mktemp("site")
    words = ["-m", "properdocs", "build", "--strict", "-f", "docs/generator/properdocs.yml", "-d", str(folder)]
    built = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


def text_of(page: Path) -> str:
    """The words of a page as a reader sees them."""
    return html.unescape(re.sub(r"<[^>]*>", "", page.read_text(encoding="utf-8")))


def test_every_page_and_picture_that_a_page_names_is_there_and_nothing_is_fetched(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 15
    missing, fetched = [], []
    for page in pages:
        tags = re.findall(r"<(\w+)\b[^>]*?\s(?:href|src)=[\"']?([^\"'\s>]+)", page.read_text(encoding="utf-8"))
        for tag, target in tags:
            if re.match(r"(https?:)?//", target):
                fetched += [] if tag == "a" else [(page.name, target)]
            elif page.name != "404.html" and not target.startswith(("#", "data:", "mailto:")):
                missing += [] if (page.parent / target.partition("#")[0]).is_file() else [(page.name, target)]
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert (missing, fetched) == ([], [])
    assert re.findall(r"@import[^;]*|url\([\"']?(?:https?:)?//[^)]*\)", styles) == []


def test_the_page_of_verbs_has_every_option_of_every_verb(site: Path) -> None:
    text, parsers = text_of(site / "reference/verbs.html"), verb_parsers()
    assert list(parsers) == list(VERBS)
    for verb, parser in parsers.items():
        begin = text.index(f"usage: bert-ds {verb} ")
        said = text[begin : text.find("usage: bert-ds", begin + 1)]
        assert VERBS[verb].example in said
        hidden = {"==SUPPRESS=="}
        options = [word for action in parser._actions if action.help not in hidden for word in action.option_strings]
        assert [word for word in options if not re.search(rf"{re.escape(word)}\b", said)] == [], verb


def rows_of(page: Path) -> list[list[str]]:
    """The cells of every row of a page's tables, below their heads; the theme's own are none of them."""
    content = page.read_text(encoding="utf-8").partition('role="main"')[2].partition("<footer")[0]
    rows = re.findall(r"<tr>\s*(<td.*?)</tr>", content, re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in rows]
    return [[html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in row] for row in cells]


@pytest.mark.parametrize(("page", "file"), [("recipe", "schema.json"), ("task", "task_schema.json")])
def test_every_setting_has_a_row_with_its_default_and_its_meaning(site: Path, page: str, file: str) -> None:
    schema = json.loads((ROOT / "ds_configs" / file).read_text(encoding="utf-8"))
    objects: list[dict[str, Any]] = [schema, *schema["$defs"].values()]
    wanted = sorted(name for one in objects for name in one["properties"])
    rows = [row for row in rows_of(site / f"reference/{page}.html") if len(row) == 4]
    assert sorted(row[0] for row in rows) == wanted and len(wanted) > 100
    described = {
        " ".join(node["description"].replace("`", "").split())
        for one in objects
        for node in one["properties"].values()
        if "description" in node
    }
    assert described <= {row[3] for row in rows}
    assert [row for row in rows if row[1] == "anything"] == []


def test_every_kind_of_task_has_a_row(site: Path) -> None:
    rows = {row[0]: row[1:] for row in rows_of(site / "reference/task.html") if len(row) == 5}
    assert list(rows) == list(KIND_FACTS)
    assert rows["multiple_choice"] == ["text, choices, label", "text_pair, id", "accuracy", "finetune"]
    assert rows["masked_words"] == ["", "", "loss_mlm_masked, nats_per_character", "score"]


def test_values_stand_in_words_with_their_bounds(site: Path) -> None:
    rows = {row[0]: row for row in rows_of(site / "reference/recipe.html")}
    assert rows["spike_window"][1:3] == ["integer, at least 8, at most 10,000", "128"]
    assert rows["until"][1:3] == ["number, above 0.0, below 1.0", "wanted"]
    assert rows["output_bias"][1:3] == ['"zeros" or "log_unigram"', '"zeros"']
    assert rows["optimizer"][1].startswith("section optimizer, type adamw or section optimizer, type lamb or ")
    assert rows["name"][2] == "wanted"
    page = (site / "reference/recipe.html").read_text(encoding="utf-8")
    heads = re.findall(r'<h2 id="([^"]+)">([^<]+)', page)
    assert ("sequences", "sequences") in heads and ("corpussources", "corpus.sources") in heads
    assert ("optimizer-type-muon", "optimizer, type muon") in heads and ("model-type-bert", "model, type bert") in heads


def test_every_setting_of_a_deepspeed_file_has_a_row_with_what_is_refused(site: Path) -> None:
    keys = json.loads((ROOT / "bert_ds/configuration/deepspeed_file/ds_keys.json").read_text(encoding="utf-8"))["keys"]

    def names(nodes: dict[str, Any], before: str = "") -> list[str]:
        return [
            one
            for name, node in nodes.items()
            for one in (names(node["keys"], f"{before}{name}.") if node.get("keys") else [before + name])
        ]

    rows = {row[0]: row for row in rows_of(site / "reference/deepspeed_file.html")}
    assert sorted(rows) == sorted(names(keys)) and len(rows) > 250
    assert rows["zero_optimization.stage"][2] == "0"
    assert rows["gradient_allreduce_op"][3] == 'only "mean": the loss is scaled for the mean over ranks'
    assert rows["autotuning.enabled"][3].startswith("only switched off: ")


def test_formulas_words_and_limits_come_from_where_they_are_kept(site: Path) -> None:
    optimizers = text_of(site / "reference/optimizers.html")
    assert "w -= lr r u" in optimizers and "p(s) = a s + b s^3 + c s^5" in optimizers
    words, architecture = (text_of(site / name) for name in ("reference/words.html", "documents/architecture.html"))
    assert "a word piece of the tokenizer" in words and "a word piece of the tokenizer" not in architecture
    assert "No pipeline or tensor parallelism" in text_of(site / "reference/limits.html")


def anchors_of(text: str) -> set[str]:
    """The anchors that headings of a Markdown file have where it is read in the repository."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_hold_where_the_files_are_read_without_a_site(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^()\s]+)\)", text):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if ":" not in target and not file.exists():
            broken.append(target)
        if ":" not in target and anchor and anchor not in anchors_of(file.read_text(encoding="utf-8")):
            broken.append(target)
    assert broken == []


def test_links_between_files_become_links_between_pages() -> None:
    pictures: list[str] = []

    def linked(text: str, page: str) -> str:
        return with_page_links(text, page, add_image=pictures.append)

    assert linked("[a](BENCHMARKS.md#few-shapes)", "index.md") == "[a](documents/benchmarks.md#few-shapes)"
    assert linked("[a](../SERVING.md)", "task.md") == "[a](documents/serving.md)"
    assert linked("[a](zh/x.md)", "index.md") == "a"  # README.md has no folder zh
    assert linked("[a](docs/zh/x.md)", "zh/index.md") == "[a](x.md)"
    assert linked("[a](ARCHITECTURE.md#known-limits)", "index.md") == "[a](reference/limits.md)"
    assert linked("[a](../ds_configs/schema.json)", "zh.md") == "[a](reference/recipe.md)"
    assert linked("[values](../Makefile)", "x.md") == "values (`Makefile`)"
    assert linked("`x`\n```\n[a](SERVING.md)\n```\n", "index.md") == "`x`\n```\n[a](SERVING.md)\n```\n"
    assert linked("![p](tests/results/race.png)", "index.md") == "![p](tests/results/race.png)"
    assert pictures == ["tests/results/race.png"]
