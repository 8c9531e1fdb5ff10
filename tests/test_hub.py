"""Models that come from the hub by their names and exports that go there, with a hub on this machine."""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_stub import Hub, running_hub
from huggingface_hub import ModelCard, constants

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.encoder.pretrained import load_pretrained
from bert_ds.folders.replaced_folders import EXPORT_MANIFEST, write_export_manifest
from bert_ds.launch import hub as hub_module
from bert_ds.launch.hub import Card, hub_folder, push_folder
from bert_ds.launch.verb_arguments import export_hf_arguments, finetune_arguments, predict_arguments

TOKEN = "hf_secretAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
CARD = Card("apache-2.0", ("en", "zh"), ("stanfordnlp/sst2",))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(hub_module, "_OFFLINE", False)
        yield found


@pytest.fixture
def exported(tiny_export: Path, tmp_path: Path) -> Path:
    """An export of ours with a second model and an ONNX folder in it."""
    folder = tmp_path / "hf"
    shutil.copytree(tiny_export, folder)
    shutil.copytree(tiny_export, folder / "generator")
    write_export_manifest(folder)
    for name in ("onnx", "onnx_int8"):
        (folder / name).mkdir()
        (folder / name / "model.onnx").write_bytes(name.encode())
        write_export_manifest(folder / name)
    return folder


def test_an_export_goes_to_the_hub_whole_in_one_commit_with_a_complete_card(
    hub: Hub, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    address = push_folder(exported, "me/tiny", private=True, card=CARD)
    assert address.startswith(f"{hub.url}/me/tiny/commit/")
    assert [(one["organization"], one["name"], one["visibility"]) for one in hub.created] == [("me", "tiny", "private")]
    assert sum(" /api/models/me/tiny/commit/main" in one for one in hub.asked) == 1
    assert hub.tokens == {f"Bearer {TOKEN}"}
    wanted = {path.relative_to(exported).as_posix(): content for path, content in before.items()}
    wanted = {name: content for name, content in wanted.items() if Path(name).name != EXPORT_MANIFEST}
    pushed = dict(hub.files["me/tiny"])
    card = ModelCard(pushed.pop("README.md").decode())
    assert wanted.pop("README.md") and pushed == wanted
    assert (card.data.license, card.data.language) == ("apache-2.0", ["en", "zh"])
    assert (card.data.datasets, card.data.library_name) == (["stanfordnlp/sst2"], "transformers")
    assert "bert-ds pretrain --run tiny" in card.text and "| steps | 0 |" in card.text
    assert {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()} == before
    assert TOKEN not in "".join(capsys.readouterr())
    assert constants.HF_HUB_OFFLINE


def test_the_card_of_a_fine_tuned_folder_names_its_metrics(exported: Path) -> None:
    text = (
        "---\nlibrary_name: transformers\n---\n# sst2\n\nA BERT encoder fine-tuned on the task sst2 (classification).\n"
    )
    rows = "| fact | value |\n|---|---|\n| validation accuracy | 0.9 |\n| validation loss_label | 0.3 |\n"
    (exported / "README.md").write_text(text + rows, encoding="utf-8")
    (exported / "README.md").rename(exported / "generator/README.md")  # a kind with two folders has one in each
    card = ModelCard(hub_module.complete_card(exported, CARD._replace(datasets=())))
    assert card.data.metrics == ["accuracy"] and card.data.datasets is None
    assert "bert-ds finetune --task sst2 --model DIR" in card.text


def test_a_model_of_the_hub_is_downloaded_once_and_read_like_any_folder(
    hub: Hub, tiny_export: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {path.name: path.read_bytes() for path in tiny_export.iterdir() if path.is_file()}
    hub.files["you/tiny"] = {**files, "onnx/model.json": b"{}", "tf_model.h5": b"no"}
    words = ["--task", "sst2", "--model", "you/tiny"]
    folder = finetune_arguments(words).model
    assert {path.name for path in folder.iterdir()} == set(files) - {"README.md", EXPORT_MANIFEST} | (
        {EXPORT_MANIFEST} & set(files)
    )
    assert load_pretrained(folder).config == load_pretrained(tiny_export).config
    num_asked = len(hub.asked)
    assert hub_folder(Path("you/tiny"), "--model") == folder and len(hub.asked) == num_asked
    monkeypatch.setattr(hub_module, "_OFFLINE", True)
    assert predict_arguments(["--model", "you/tiny"]).model == folder


def test_a_name_without_an_owner_and_weights_of_an_older_model_are_found(
    hub: Hub, tiny_export: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.files["older"] = {"config.json": (tiny_export / "config.json").read_bytes(), "pytorch_model.bin": b"weights"}
    folder = hub_folder(Path("older"), "--like")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == hub.files["older"]


def test_paths_and_what_is_nearly_one_are_not_looked_for_on_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine").mkdir(parents=True)
    for name in ("runs/mine", "runs/other", "run", "../a", "a/b/c", str(tmp_path / "none")):
        assert hub_folder(Path(name), "--model") == Path(name)
    assert hub.asked == []


def test_what_the_hub_refuses_is_one_sentence_without_the_token(hub: Hub, exported: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        hub_folder(Path("you/none"), "--model")
    assert str(refused.value).startswith("--model you/none: there is no such folder; the hub at http://127.0.0.1:")
    assert "answers 404: " in str(refused.value)
    hub.status = 403
    with pytest.raises(ConfigError, match=r"^--push_to_hub me/tiny; the hub at .* answers 403: ") as refused:
        push_folder(exported, "me/tiny", private=False, card=CARD)
    assert TOKEN not in str(refused.value) and "\n" not in str(refused.value)


def test_without_a_network_one_sentence_comes_soon(hub: Hub, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", nowhere := f"http://127.0.0.1:{closed.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(
            ConfigError, match=f"^--model you/tiny: there .*; the hub at {nowhere} cannot be reached"
        ) as one:
            hub_folder(Path("you/tiny"), "--model")
        with pytest.raises(DataError, match=f"^--push_to_hub me/tiny; the hub at {nowhere} cannot be reached"):
            push_folder(exported, "me/tiny", private=False, card=CARD)
    assert time.monotonic() - began < 30 and "\n" not in str(one.value)
    monkeypatch.setattr(hub_module, "_OFFLINE", True)
    with pytest.raises(
        ConfigError, match=r"^--model you/tiny: there is no such folder; HF_HUB_OFFLINE is set, so the hub was not"
    ):
        hub_folder(Path("you/tiny"), "--model")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set, wanted it unset"):
        push_folder(exported, "me/tiny", private=False, card=CARD)
    assert hub.asked == []


def test_nothing_goes_to_the_hub_without_a_token_or_with_a_file_of_somebody_s(
    hub: Hub, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (exported / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds 'notes.txt', which is not ours .*: wanted an unchanged export"):
        push_folder(exported, "me/tiny", private=False, card=CARD)
    (exported / "notes.txt").unlink()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="found no token, wanted one that may write, in HF_TOKEN"):
        push_folder(exported, "me/tiny", private=False, card=CARD)
    assert hub.asked == []


def parsed(tiny_export: Path, *words: str) -> argparse.Namespace:
    return export_hf_arguments(["--model", str(tiny_export), *words])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--push_to_hub", "tiny"), "found tiny, wanted OWNER/NAME"),
        (("--push_to_hub", "me/tiny", "--language", "en"), "wanted --license and --language beside it"),
        (("--push_to_hub", "me/tiny", "--license", "mit"), "wanted --license and --language beside it"),
        (("--onnx", "--private"), "are of --push_to_hub: wanted it beside them"),
        ((), "wanted --onnx or --push_to_hub beside it"),
        (("--int8",), "wanted --onnx or --push_to_hub beside it"),
        (("--onnx", "--task", "sst2"), "--task and --data are of --int8"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tiny_export: Path, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(tiny_export, *words)
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert parsed(tiny_export, "--push_to_hub", "me/a", "--license", "mit", "--language", "en").license == "mit"
    assert json.loads((tiny_export / "config.json").read_text())["model_type"] == "bert"
