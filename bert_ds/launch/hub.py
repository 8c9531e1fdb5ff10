"""The Hugging Face hub, where a person asks for it: a model comes from there by its name, an export goes there.

HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean to huggingface_hub. A token goes to the hub alone,
into no message and no file. Outside of what stands here nothing reaches out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.model_folder import near_folder
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.folders.output_folders import foreign_text
from bert_ds.folders.replaced_folders import EXPORT_MANIFEST, foreign_in_export

NAME = re.compile(r"([A-Za-z0-9][\w.-]*)/[A-Za-z0-9][\w.-]*")
"""OWNER/NAME."""
_OFFLINE = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
"""What the person has set: verbs set the variable themselves, after this was read."""
_READ = ("*.json", "*.txt", "*.safetensors")
_NOT_READ = ("onnx*/*", "openvino/*", "coreml/*")


class Card(NamedTuple):
    """What the hub asks of a model card and no run can know."""

    license: str
    language: Sequence[str]
    datasets: Sequence[str]


def hub_folder(path: Path, option: str) -> Path:
    """Return a folder of a model: the path, or where the model of this name lies in the cache of the hub.

    A name is what is no path and not nearly one. What is not in the cache is downloaded; what is stays as it is.

    Raises:
        ConfigError: the hub has no such model, or cannot be asked.
    """
    text = str(path)
    owner = NAME.fullmatch(text)
    is_name = owner is not None or re.fullmatch(r"[A-Za-z0-9][\w.-]*", text)
    if path.exists() or not is_name or near_folder(path) or (owner is not None and Path(owner[1]).exists()):
        return path
    where = f"{option} {text}: there is no such folder"
    from huggingface_hub import snapshot_download

    def download(*patterns: str, cached: bool = False) -> Path:
        found = snapshot_download(
            text,
            endpoint=_endpoint(),
            allow_patterns=list(patterns),
            ignore_patterns=list(_NOT_READ),
            local_files_only=cached,
        )
        return Path(found)

    with _reaching_out(where, unreachable=ConfigError):
        try:
            folder = download(*_READ, cached=True)
        except FileNotFoundError:
            if _OFFLINE:
                raise ConfigError(f"{where}; HF_HUB_OFFLINE is set, so the hub was not asked for it") from None
            folder = download(*_READ)
        if not any(folder.glob("*.safetensors")):
            folder = download("pytorch_model*.bin")
    return folder


def push_folder(folder: Path, name: str, *, private: bool, card: Card) -> str:
    """Put an export on the hub in one commit, with a complete model card; return the address of the commit.

    Args:
        folder: an unchanged export, with what is in its onnx/ and onnx_int8/; nothing in it is changed.
        name: OWNER/NAME; made where there is none.
        private: of one that is made.
        card: what its README.md lacks.

    Raises:
        ConfigError: it is no unchanged export, there is no token, or the hub refuses.
        DataError: the hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if (entry := foreign_in_export(folder)) is not None:
        raise ConfigError(
            foreign_text(folder, entry, wanted="wanted an unchanged export, as all of it would be public")
        )
    where = f"--push_to_hub {name}"
    if _OFFLINE:
        raise ConfigError(f"{where}: HF_HUB_OFFLINE is set, wanted it unset")
    if get_token() is None:
        raise ConfigError(f"{where}: found no token, wanted one that may write, in HF_TOKEN or by hf auth login")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    operations = [CommitOperationAdd("README.md", complete_card(folder, card).encode())]
    operations += [
        CommitOperationAdd(inside, path)
        for inside, path in files.items()
        if inside != "README.md" and path.name != EXPORT_MANIFEST
    ]
    with _reaching_out(where, unreachable=DataError):
        hub = HfApi(endpoint=_endpoint())
        hub.create_repo(name, private=private, exist_ok=True)
        return hub.create_commit(name, operations, commit_message="Upload an export of bert-ds").commit_url


def complete_card(folder: Path, card: Card) -> str:
    """Return README.md of an export with license, language, data, metrics and the command that makes such a model."""
    from huggingface_hub import ModelCard

    readme = next(path for path in (folder / "README.md", *sorted(folder.glob("*/README.md"))) if path.is_file())
    found = ModelCard(readme.read_text(encoding="utf-8"))
    metrics = re.findall(r"^\| validation (\w+) \|", found.text, re.MULTILINE)
    facts = {"license": card.license, "language": list(card.language), "datasets": list(card.datasets)}
    facts["metrics"] = [name for name in metrics if not name.startswith("loss_")]
    for name, value in facts.items():
        if value:
            setattr(found.data, name, value)
    title = next(line.removeprefix("# ") for line in found.text.splitlines() if line.startswith("# "))
    verb = (
        f"finetune --task {title} --model DIR" if "fine-tuned on the task" in found.text else f"pretrain --run {title}"
    )
    data = ", ".join(card.datasets) or "not named; the table counts it"
    lines = [f"Language: {', '.join(card.language)}. Data: {data}.", "", "Made by", "", "```", f"bert-ds {verb}", "```"]
    return f"{found}\n" + "\n".join(lines) + "\n"


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


@contextmanager
def _reaching_out(where: str, *, unreachable: type[Exception]) -> Iterator[None]:
    """Let huggingface_hub reach the hub inside the block alone; its errors become one sentence."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    constants.HF_HUB_OFFLINE = False
    hub = _endpoint() or constants.ENDPOINT
    try:
        yield
    except HfHubHTTPError as error:
        said = error.server_message or str(error).splitlines()[0]
        text = f"{where}; the hub at {hub} answers {error.response.status_code}: {said}"
        raise ConfigError(text.replace(get_token() or "\0", "...")) from None
    except ConfigError:
        raise
    except Exception as error:  # of the network library too, which differs between releases
        cause = error.__cause__ or error
        said = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        text = f"{where}; the hub at {hub} cannot be reached ({said})"
        raise unreachable(text.replace(get_token() or "\0", "...")) from None
    finally:
        constants.HF_HUB_OFFLINE = True
