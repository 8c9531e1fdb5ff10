"""What the site has beside the pages of docs/: reference pages made from the code, and documents of the repository.

    properdocs build --strict -f docs/generator/properdocs.yml

Nothing is fetched, neither while the site is built nor by the pages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from documents import ROOT, document_pages, with_page_links
from optimizer_page import optimizers_page
from properdocs.structure.files import File, Files
from setting_tables import deepspeed_page, kinds_table, schema_page
from verb_help import verbs_page

RECIPE, TASK = ROOT / "ds_configs/schema.json", ROOT / "ds_configs/task_schema.json"
DEEPSPEED = ROOT / "bert_ds/configuration/deepspeed_file/ds_keys.json"
OWN = (
    "Dotted names are what `--set` takes: `--set optimizer.lr=2e-4`. A setting that is not listed is refused, with the "
    "nearest one that is."
)


def on_files(files: Files, *, config: Any) -> Files:
    """Add every page that does not lie in docs/."""
    pictures: set[str] = set()
    for page, text in {**document_pages(), **reference_pages()}.items():
        files.append(File.generated(config, page, content=text))
    for file in list(files.documentation_pages()):
        with_page_links(file.content_string, file.src_uri, add_image=pictures.add)
    for path in sorted(pictures):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turn links between files into links between pages."""
    return with_page_links(markdown, page.file.src_uri, add_image=lambda path: None)


def reference_pages() -> dict[str, str]:
    """Return the pages that are made from the code."""
    return {
        "reference/verbs.md": verbs_page(
            title="Verbs",
            opening="`bert-ds VERB`, in the order of use: what `bert-ds VERB --help` says. Each is a script too, "
            "`bert_ds/VERB.py`.",
        ),
        "reference/recipe.md": _settings(RECIPE, "Settings of a recipe", "What `--run` reads."),
        "reference/task.md": _settings(TASK, "Settings of a task", "What `--task` reads.")
        + f"\n## Kinds\n\n{kinds_table()}\n",
        "reference/deepspeed_file.md": deepspeed_page(
            DEEPSPEED,
            title="Settings of a DeepSpeed file",
            opening="What `--deepspeed_config` reads: every name that DeepSpeed knows, and what of it is refused here.",
        ),
        "reference/optimizers.md": optimizers_page(
            title="Optimizers",
            opening="Formulas as the code has them; the settings are those of the [recipe](recipe.md). How exact they "
            "are under ZeRO is measured in [BENCHMARKS.md](../documents/benchmarks.md).",
        ),
    }


def _settings(schema: Path, title: str, opening: str) -> str:
    return schema_page(schema, title=title, opening=f"{opening} {OWN}")
