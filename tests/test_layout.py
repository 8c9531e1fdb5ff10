"""The house rules that a script run by path and an installed `kernels` distribution depend on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GENERIC = {"data", "utils", "model", "models", "optim", "metrics", "common", "base", "config", "kernels"}


def names_in(folder: Path) -> set[str]:
    """Importable names directly in a folder, seen as a script run by path sees them."""
    return {
        path.stem
        for path in folder.iterdir()
        if (path.suffix == ".py" or path.is_dir()) and not path.stem.startswith(("__", "."))
    }


def test_nothing_in_bert_ds_hides_a_standard_library_module() -> None:
    assert names_in(ROOT / "bert_ds") & set(sys.stdlib_module_names) == set()


def test_nothing_in_bert_ds_hides_an_installed_top_level_module() -> None:
    assert names_in(ROOT / "bert_ds") & set(importlib.metadata.packages_distributions()) == set()


def test_nothing_in_bert_ds_has_a_generic_name() -> None:
    assert names_in(ROOT / "bert_ds") & GENERIC == set()


def test_no_room_holds_more_modules_than_a_newcomer_reads() -> None:
    rooms = [folder for folder in (ROOT / "bert_ds").rglob("*") if folder.is_dir() and folder.name != "__pycache__"]
    crowded = {
        folder.relative_to(ROOT).as_posix(): len(modules)
        for folder in rooms
        if len(modules := [path for path in folder.glob("*.py") if path.stem != "__init__"]) > 15
    }
    assert len(rooms) > 20
    assert crowded == {}


def test_the_kernels_folder_is_not_a_package() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()


def test_this_project_installs_nothing_under_the_name_kernels() -> None:
    assert "bert-ds" not in importlib.metadata.packages_distributions().get("kernels", [])


def test_importing_bert_ds_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import bert_ds; print(sorted(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "['bert_ds']"


def test_the_kernel_package_is_importable() -> None:
    assert importlib.util.find_spec("bert_kernels") is not None


@pytest.mark.parametrize("path", sorted(ROOT.glob("bert_ds/*.py")), ids=lambda path: path.stem)
def test_no_file_imports_an_entry_script(path: Path) -> None:
    verbs = {
        script.stem
        for script in ROOT.glob("bert_ds/*.py")
        if '__name__ == "__main__"' in script.read_text(encoding="utf-8") and script.stem != "console"
    }
    text = path.read_text(encoding="utf-8")
    imported = {verb for verb in verbs if f"from bert_ds.{verb} import" in text or f"import bert_ds.{verb}" in text}
    assert imported == set()
