"""Exports and tokenizers: whole or not at all, and never in place of something of somebody else's."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.folders import replaced_folders
from bert_ds.folders.replaced_folders import (
    EXPORT_MANIFEST,
    claim_export,
    new_folder,
    replaced_export,
    write_export_manifest,
)

OURS = json.dumps({"sentence_pair_objective": "sop"})


CARD = """---
library_name: transformers
pipeline_tag: fill-mask
tags: [bert, fill-mask]
---
# small

A BERT encoder pre-trained from scratch.

```python
from transformers import pipeline
fill_mask = pipeline("fill-mask", model="path/to/this/folder")
print(fill_mask(f"The function returns a new {fill_mask.tokenizer.mask_token}."))
```

Index 0 of the pair classifier, where there is one, means: b follows a (nsp), or a and b are in order (sop).

| fact | value |
|---|---|
| steps | 7 of 7 planned |
"""
TUNED_CARD = """---
library_name: transformers
pipeline_tag: text-classification
---
# sst2

A BERT encoder fine-tuned on the task sst2 (classification).
Load it with `transformers.pipeline("text-classification", model="path/to/this/folder")`.

| fact | value |
|---|---|
| best step | 4 |
"""
"""README.md of the exports of earlier versions."""


def export(output: Path, text: str) -> None:
    """Write an export of a config and a file below."""
    with replaced_export(output) as folder:
        (folder / "config.json").write_text(OURS)
        (folder / "tags").mkdir()
        (folder / "tags/vocab.txt").write_text(text)


def content(folder: Path) -> dict[str, str]:
    """Path -> text of everything in a folder."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else "folder" for p in paths if not p.is_symlink()}


def test_a_folder_appears_only_when_the_block_ends_well(tmp_path: Path) -> None:
    output = tmp_path / "hf"
    with pytest.raises(RuntimeError, match="stop"), replaced_export(output) as folder:
        (folder / "half").touch()
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    with replaced_export(output) as folder:
        (folder / "whole").touch()
        assert not output.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert content(output).keys() == {"whole", EXPORT_MANIFEST}


def test_an_unchanged_export_is_replaced_again_and_again(tmp_path: Path) -> None:
    for text in ("one", "two", "three"):
        export(tmp_path / "hf", text)
        assert (tmp_path / "hf/tags/vocab.txt").read_text() == text
    (tmp_path / "hf/tags/vocab.txt").unlink()  # what somebody has deleted cannot be lost
    export(tmp_path / "hf", "four")
    assert os.listdir(tmp_path) == ["hf"]


def _link(folder: Path) -> None:
    (folder / "vocab.txt").symlink_to("config.json")


def _git(folder: Path) -> None:
    subprocess.run(["git", "init", "-q", folder], check=True)


def _inner_export(folder: Path) -> None:
    export(folder / "copy", "kept")


CHANGES = {
    "a file more": (lambda folder: (folder / "notes.txt").touch(), "notes.txt"),
    "a hidden file": (lambda folder: (folder / ".env").touch(), ".env"),
    "a clone": (_git, ".git"),
    "a file below": (lambda folder: (folder / "tags/notes.txt").touch(), "tags/notes.txt"),
    "an empty folder": (lambda folder: (folder / "data").mkdir(), "data"),
    "a changed file": (lambda folder: (folder / "tags/vocab.txt").write_text("mine"), "tags/vocab.txt"),
    "a link": (_link, "vocab.txt"),
    "a pipe": (lambda folder: os.mkfifo(folder / "pipe"), "pipe"),
    "a copy of an export": (_inner_export, "copy"),
    "a file beside onnx": (lambda folder: fill_onnx(folder, "notes.txt"), "onnx/notes.txt"),
    "a broken manifest": (lambda folder: (folder / EXPORT_MANIFEST).write_text("["), "config.json"),
}


def fill_onnx(folder: Path, *more: str) -> None:
    """Add an onnx/ with a manifest of its own, and then more files."""
    (folder / "onnx").mkdir()
    (folder / "onnx/model.onnx").touch()
    write_export_manifest(folder / "onnx")
    for name in more:
        (folder / "onnx" / name).touch()


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("is_earlier", [False, True])
def test_what_somebody_added_or_changed_is_refused_with_its_name(tmp_path: Path, name: str, is_earlier: bool) -> None:
    change, entry = CHANGES[name]
    export(tmp_path / "hf", "old")
    if is_earlier:
        if name in ("a changed file", "a broken manifest"):
            pytest.skip("nothing in an export of an earlier version tells")
        (tmp_path / "hf" / EXPORT_MANIFEST).unlink()
    change(tmp_path / "hf")
    before = content(tmp_path / "hf")
    with pytest.raises(ConfigError, match=f"hf holds '{entry}.*', which is not ours or was changed by hand"):
        export(tmp_path / "hf", "new")
    assert content(tmp_path / "hf") == before
    assert os.listdir(tmp_path) == ["hf"]


def test_an_onnx_folder_is_added_and_replaced_alone_and_the_whole_is_still_ours(tmp_path: Path) -> None:
    for has_manifest in (True, False):
        output = tmp_path / f"hf{has_manifest}"
        export(output, "old")
        if not has_manifest:
            (output / EXPORT_MANIFEST).unlink()
        for text in ("one", "two"):
            with replaced_export(output / "onnx") as folder:
                (folder / "model.onnx").write_text(text)
        export(output, "new")
        assert not (output / "onnx").exists()


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": OURS, "README.md": CARD, "onnx/config.json": '{"onnx": {}}', "onnx/model.onnx.data": ""},
        {"config.json": '{"finetuned_task": "t"}', "1_Pooling/config.json": "{}", "modules.json": "[]"},
        {
            "intent/config.json": OURS,
            "tags/config.json": OURS,
            "tags/model.safetensors": "",
            "tags/README.md": TUNED_CARD,
        },
        {"config.json": '{"onnx": {}}', "model.onnx": ""},
    ],
)
def test_an_export_of_an_earlier_version_is_replaced_where_it_holds_what_exports_write(
    tmp_path: Path, files: dict[str, str]
) -> None:
    for name, text in files.items():
        (tmp_path / "hf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hf" / name).write_text(text)
    claim_export(tmp_path / "hf")
    (tmp_path / "hf/pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match=r"holds 'pytorch_model\.bin'.*move what is yours elsewhere"):
        claim_export(tmp_path / "hf")
    (tmp_path / "hf/pytorch_model.bin").unlink()
    export(tmp_path / "hf", "new")
    assert content(tmp_path / "hf").keys() == {"config.json", "tags", "tags/vocab.txt", EXPORT_MANIFEST}


@pytest.mark.parametrize("card", [CARD, TUNED_CARD])
def test_a_model_card_changed_by_hand_is_noticed_in_an_export_of_an_earlier_version(tmp_path: Path, card: str) -> None:
    export(tmp_path / "hf", "old")
    (tmp_path / "hf" / EXPORT_MANIFEST).unlink()
    for text in (card + "\n## Mine\n", card.replace("A BERT encoder", "Our BERT encoder"), "mine\n" + card, ""):
        (tmp_path / "hf/README.md").write_text(text)
        with pytest.raises(ConfigError, match=r"holds 'README\.md', which is not ours or was changed by hand"):
            export(tmp_path / "hf", "new")
        assert (tmp_path / "hf/README.md").read_text() == text
    (tmp_path / "hf/README.md").write_text(card)
    export(tmp_path / "hf", "new")


@pytest.mark.parametrize("name", ["config.json", "tags/config.json", "README.md"])
def test_a_model_of_somebody_else_is_never_taken_for_an_earlier_export(tmp_path: Path, name: str) -> None:
    (tmp_path / "hf/tags").mkdir(parents=True)
    (tmp_path / "hf/config.json").write_text(OURS if name == "tags/config.json" else "{}")
    (tmp_path / "hf" / name).write_text("{}")
    with pytest.raises(ConfigError, match="which is not ours"):
        claim_export(tmp_path / "hf")


@pytest.mark.parametrize("can_exchange", [True, False])
def test_what_appears_during_the_work_is_found_and_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(replaced_folders, "_exchange", lambda one, other: False)
    export(tmp_path / "hf", "old")
    with pytest.raises(ConfigError, match=r"holds 'notes\.txt'"), replaced_export(tmp_path / "hf"):
        (tmp_path / "hf/notes.txt").write_text("mine")
    assert (tmp_path / "hf/notes.txt").read_text() == "mine"
    assert (tmp_path / "hf/tags/vocab.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["hf"]
    with pytest.raises(ConfigError, match=r"holds 'notes\.txt'"), new_folder(tmp_path / "new"):
        (tmp_path / "new").mkdir()
        (tmp_path / "new/notes.txt").touch()
    assert os.listdir(tmp_path / "new") == ["notes.txt"]
    with pytest.raises(ConfigError, match="cannot take its name"), new_folder(tmp_path / "file"):
        (tmp_path / "file").touch()
    assert sorted(os.listdir(tmp_path)) == ["file", "hf", "new"]


KILLED = """
import os, sys
from pathlib import Path
from bert_ds.folders import replaced_folders
left = int(sys.argv[2])
if sys.argv[3] == "no":
    replaced_folders._exchange = lambda one, other: False
rename = os.rename
def killed(*names):
    global left
    if left == 0:
        os.kill(os.getpid(), 9)
    left -= 1
    rename(*names)
os.rename = killed
if sys.argv[3] == "yes":
    replaced_folders.shutil.rmtree = lambda *names, **options: os.kill(os.getpid(), 9)
with replaced_folders.replaced_export(Path(sys.argv[1])) as folder:
    (folder / "config.json").write_text("{}")
"""


@pytest.mark.parametrize(("renames", "can_exchange"), [(0, "no"), (1, "no"), (9, "yes")])
def test_an_export_that_is_killed_between_two_steps_loses_neither_and_the_next_one_cleans_up(
    tmp_path: Path, renames: int, can_exchange: str
) -> None:
    export(tmp_path / "hf", "old")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "hf"), str(renames), can_exchange]
    assert subprocess.run(command, cwd=Path(__file__).parents[1]).returncode == -9
    assert len(os.listdir(tmp_path)) > 1 or renames == 1
    with pytest.raises(RuntimeError, match="stop"), replaced_export(tmp_path / "hf"):
        raise RuntimeError("stop")
    assert os.listdir(tmp_path) == ["hf"]
    assert (tmp_path / "hf/tags/vocab.txt").is_file() == (can_exchange == "no")


def test_an_old_export_whose_place_somebody_has_taken_is_kept(tmp_path: Path) -> None:
    export(tmp_path / "hf", "of somebody else")
    for name in ("new", "old"):
        export(tmp_path / f".hf.partial-0123abcd/{name}", name)
    export(tmp_path / "hf", "newest")
    assert (tmp_path / ".hf.partial-0123abcd/old/tags/vocab.txt").read_text() == "old"


def test_what_another_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    with new_folder(tmp_path / "t") as one:
        (one / "a").touch()
        with new_folder(tmp_path / "t2") as other, pytest.raises(RuntimeError), new_folder(tmp_path / "t"):
            raise RuntimeError
        assert (one / "a").exists()
        assert not other.exists()
    assert os.listdir(tmp_path / "t") == ["a"]


def test_a_hidden_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    for name in (".t.partial", ".t.partial-00000000", ".t.building"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    with new_folder(tmp_path / "t") as folder:
        (folder / "a").touch()
        (tmp_path / ".hf.partial").write_text("mine")  # a file beside an export, while it is made and replaced
    assert len([path for path in tmp_path.glob(".t.*/mine")]) == 3
    for text in ("one", "two"):
        export(tmp_path / "hf", text)
    assert (tmp_path / ".hf.partial").read_text() == "mine"


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path / "here")
    for place, message in (
        (Path("."), "mounted or the current folder"),
        (tmp_path, "mounted or the current folder"),
        (tmp_path / "link", "is a link"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file/below", "cannot be written"),
        (Path("/proc/out"), "cannot be written"),
    ):
        with pytest.raises(ConfigError, match=message), new_folder(place):
            raise AssertionError("the work has begun")
    assert sorted(os.listdir(tmp_path)) == ["file", "here", "link"]


def test_everything_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export(tmp_path / "a/hf", "new")
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "a").rglob("*")}
    assert set(modes.values()) == {0o750, 0o640}


def test_a_disk_without_exchange_says_so_and_other_errors_are_raised(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="No such file") as found:
        replaced_folders._exchange(tmp_path / "a", tmp_path / "gone")
    assert found.value.errno == errno.ENOENT
