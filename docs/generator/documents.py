"""Pages of the site that stand elsewhere in the repository, and how a link between files becomes one between pages."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = {
    "README.md": "index.md",
    "README.zh-CN.md": "zh/index.md",
    "SERVING.md": "documents/serving.md",
    "ARCHITECTURE.md": "documents/architecture.md",
    "BENCHMARKS.md": "documents/benchmarks.md",
    "CHANGELOG.md": "documents/changelog.md",
    "CONTRIBUTING.md": "documents/contributing.md",
    "kernels/README.md": "documents/kernels.md",
    "kernels/UNPAD.md": "documents/unpad.md",
    "slurm/README.md": "documents/slurm.md",
}
"""File of the repository -> page of the site that it is."""
LISTS = {
    "ds_configs/schema.json": "reference/recipe.md",
    "ds_configs/task_schema.json": "reference/task.md",
    "bert_ds/configuration/deepspeed_file/ds_keys.json": "reference/deepspeed_file.md",
    "bert_ds/training/optimizers": "reference/optimizers.md",
    "bert_ds/launch/verbs.py": "reference/verbs.md",
}
"""File or folder of the repository -> page of the site that lists what is in it."""
SECTIONS = {
    "reference/words.md": ("ARCHITECTURE.md", "Words"),
    "reference/limits.md": ("ARCHITECTURE.md", "Known limits"),
}
"""Page of the site -> section of such a file that it is, and that the page of the file leaves out."""

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def document_pages() -> dict[str, str]:
    """Return the Markdown of every page that is a file, or a section of a file, from elsewhere."""
    pages = {page: (ROOT / source).read_text(encoding="utf-8") for source, page in DOCUMENTS.items()}
    for page, (source, title) in SECTIONS.items():
        whole = pages[DOCUMENTS[source]]
        before, section, after = _cut(whole, title)
        pages[DOCUMENTS[source]] = before + after
        pages[page] = "#" + section[1:].removeprefix("#")
    return pages


def source_of(page: str) -> str:
    """Return the file of the repository whose folder the links of a page are seen from."""
    sources = {page: source for source, page in DOCUMENTS.items()} | {page: one for page, (one, _) in SECTIONS.items()}
    return sources.get(page, f"docs/{page}")


def with_page_links(text: str, page: str, *, add_image: Callable[[str], None]) -> str:
    """Return the Markdown of a page with the links that hold on the site.

    A file that is a page is linked as such; one that is none keeps its name, for the site does not hold it.

    Args:
        text: with links that hold in the repository.
        page: path on the site.
        add_image: is called with the path, in the repository, of each picture that the page shows.
    """

    def link(found: re.Match[str]) -> str:
        image, label, target = found.groups()
        if ":" in target or target.startswith("#"):
            return found.group()
        name, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source_of(page)), name))
        own = path.removeprefix("docs/") if path.startswith("docs/") else None
        on_site = (DOCUMENTS | LISTS).get(path, own)
        if path in _moved(anchor):
            on_site, anchor = _moved(anchor)[path], ""
        if image and on_site is None:
            add_image(path)
            on_site = path
        if on_site is None:
            return f"{label} (`{path}`)" if (ROOT / path).exists() and path not in label else label
        return f"{image}[{label}]({posixpath.relpath(on_site, posixpath.dirname(page))}{'#' if anchor else ''}{anchor})"

    return _outside_fences(text, lambda part: _LINK.sub(link, part))


def _moved(anchor: str) -> Mapping[str, str]:
    """Return file -> page of the section that an anchor names, where that is a page of its own."""
    return {source: page for page, (source, title) in SECTIONS.items() if title.lower().replace(" ", "-") == anchor}


def _cut(text: str, title: str) -> tuple[str, str, str]:
    """Return what stands before a section, the section, and what stands behind it."""
    begin = text.index(f"\n## {title}\n") + 1
    end = text.find("\n## ", begin)
    return (text[:begin], text[begin:], "") if end < 0 else (text[:begin], text[begin : end + 1], text[end + 1 :])


def _outside_fences(text: str, change: Callable[[str], str]) -> str:
    parts, place = [], 0
    for fence in _FENCE.finditer(text):
        parts += [change(text[place : fence.start()]), fence.group()]
        place = fence.end()
    return "".join([*parts, change(text[place:])])
