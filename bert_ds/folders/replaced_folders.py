"""Folders that are written whole or not at all, and replaced only where all of the old one is ours.

The new folder is made beside its place under a hidden name, forced to the disk and renamed. On Linux old and new are
exchanged in one step, so that at every moment one of them stands under the name.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bert_ds.basics.input_gate import file_sha256
from bert_ds.basics.ranks import DataError
from bert_ds.basics.whole_files import sync
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.folders.output_folders import claim, entries, first_entry, foreign_text

EXPORT_MANIFEST = "export_manifest.json"
"""In every export: relative path -> sha256 of each file, this one aside."""
ONNX_FOLDER, INT8_FOLDER = "onnx", "onnx_int8"
"""Inside an export; each is an export of its own, so that it can be added and replaced alone."""

_OUR_KEYS = ("sentence_pair_objective", "finetuned_task", "onnx")
"""What config.json of an export has and that of no other folder."""
_EARLIER_EXPORT = re.compile(
    r"((intent|tags|onnx|1_Pooling)|((intent|tags)/)?(onnx/)?(config\.json|model\.safetensors|model\.onnx(\.data)?|"
    r"tokenizer\.json|tokenizer_config\.json|vocab\.txt|special_tokens_map\.json|README\.md|modules\.json|"
    r"sentence_bert_config\.json|config_sentence_transformers\.json)|1_Pooling/config\.json|(intent|tags)/onnx)"
)
"""Paths in the exports of versions without a manifest."""
_NO_KEY = ("1_Pooling/config.json",)
_EARLIER_CARD = re.compile(
    r"---\nlibrary_name: transformers\n(pipeline_tag: [a-z-]+\n)?(tags: \[bert, fill-mask\]\n)?---\n# [^\n]*\n\n"
    r"(A BERT encoder pre-trained from scratch\.\n\n```python\nfrom transformers import pipeline\n"
    r'fill_mask = pipeline\("fill-mask", model="path/to/this/folder"\)\n'
    r'print\(fill_mask\(f"The function returns a new \{fill_mask\.tokenizer\.mask_token\}\."\)\)\n```\n\n'
    r"Index 0 of the pair classifier, where there is one, means: "
    r"b follows a \(nsp\), or a and b are in order \(sop\)\.\n"
    r"|A BERT encoder fine-tuned on the task [^\n]*\.\nLoad it with `transformers\.[^\n`]*`\.\n)"
    r"\n\| fact \| value \|\n\|---\|---\|\n(\| [^\n]* \|\n)*"
)
"""README.md of those exports: nothing but the rows of the table and the name differ between them."""
_MAX_MANIFEST_BYTES = 64 * 2**20
_MAX_CARD_BYTES = 2**20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


@contextmanager
def replaced_export(output: Path) -> Iterator[Path]:
    """Give an empty folder that takes the name `output` when the block ends well, and vanishes when it does not.

    An older export of ours under that name is replaced, if it holds nothing else.

    Raises:
        ConfigError: `output` is none of new, empty and an unchanged export, or cannot be written.
        DataError: a file in it cannot be written, as on a full disk; what was there is as it was.
    """
    with _staged(output, foreign_in_export, wanted=_WANTED_EXPORT) as staged:
        yield staged
        write_export_manifest(staged)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give an empty folder that takes the name `output`, which is new or empty, when the block ends well.

    Raises:
        ConfigError: `output` is neither new nor empty, or cannot be written.
        DataError: a file in it cannot be written, as on a full disk; what was there is as it was.
    """
    with _staged(output, first_entry, wanted="wanted a new or an empty folder") as staged:
        yield staged


def claim_export(output: Path) -> None:
    """Raise ConfigError unless an export may be written here; nothing is changed."""
    _claim_place(output.absolute(), foreign_in_export, wanted=_WANTED_EXPORT)


_WANTED_EXPORT = (
    "wanted a new or an empty folder, or an unchanged export; move what is yours elsewhere, or choose another folder"
)


def write_export_manifest(folder: Path) -> None:
    """List every file of an export with its sha256, those of an onnx/ with a manifest of its own aside."""
    files = {path: file_sha256(folder / path) for path in entries(folder) if (folder / path).is_file()}
    inner = [path.removesuffix(EXPORT_MANIFEST) for path in files if path.endswith(f"/{EXPORT_MANIFEST}")]
    listed = {p: s for p, s in files.items() if p != EXPORT_MANIFEST and not p.startswith(tuple(inner))}
    text = json.dumps({"format": 1, "files": listed}, indent=1) + "\n"
    (folder / EXPORT_MANIFEST).write_text(text, encoding="utf-8")


def foreign_in_export(folder: Path) -> str | None:
    """Return the first path in a folder that no export wrote or that has been changed since, None where there is none.

    Hidden files, links and empty folders count.
    """
    wrote = _by_manifest(folder) if os.path.lexists(folder / EXPORT_MANIFEST) else _by_name(folder)
    inner = None
    for path in entries(folder):
        full = folder / path
        if inner is not None and path.startswith(inner):
            continue
        if full.is_symlink() or not (full.is_dir() or full.is_file()):
            return path
        if full.name in (ONNX_FOLDER, INT8_FOLDER) and (full / EXPORT_MANIFEST).is_file():
            if (foreign := foreign_in_export(full)) is not None:
                return f"{path}/{foreign}"
            inner = f"{path}/"
        elif not wrote(path):
            return path
    return None


def _by_manifest(folder: Path) -> Callable[[str], bool]:
    """Return what tells a path of an export from any other."""
    files = _read_object(folder / EXPORT_MANIFEST).get("files")
    listed = files if isinstance(files, dict) else {}
    folders = {os.fspath(parent) for path in listed for parent in Path(path).parents}

    def wrote(path: str) -> bool:
        if (folder / path).is_dir():
            return path in folders
        return path == EXPORT_MANIFEST or (path in listed and listed[path] == file_sha256(folder / path))

    return wrote


def _by_name(folder: Path) -> Callable[[str], bool]:
    """Return what tells a path of an export without a manifest from any other."""

    def has_our_key(path: str) -> bool:
        return any(key in _read_object(folder / path) for key in _OUR_KEYS)

    is_ours = any(has_our_key(f"{place}config.json") for place in ("", "intent/", "tags/"))

    def wrote(path: str) -> bool:
        if not is_ours or _EARLIER_EXPORT.fullmatch(path) is None:
            return False
        if Path(path).name == "README.md":
            return _is_earlier_card(folder / path)
        return Path(path).name != "config.json" or path in _NO_KEY or has_our_key(path)

    return wrote


def _is_earlier_card(path: Path) -> bool:
    if path.stat().st_size > _MAX_CARD_BYTES:
        return False
    return _EARLIER_CARD.fullmatch(path.read_text(encoding="utf-8", errors="replace")) is not None


def _read_object(path: Path) -> dict[str, object]:
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _MAX_MANIFEST_BYTES:
            return {}
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _claim_place(output: Path, foreign: Callable[[Path], str | None], *, wanted: str) -> None:
    """Raise ConfigError unless a folder may be put in this place, as a whole."""
    try:
        if output.is_symlink():
            raise ConfigError(f"{output} is a link: wanted the folder itself, or another one")
        if output.is_dir() and (os.path.ismount(output) or Path.cwd().is_relative_to(output.resolve())):
            raise ConfigError(f"{output} is a mounted or the current folder and cannot be replaced: wanted another one")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror or error}") from None
    claim(output, foreign, wanted=wanted)
    claim(output.parent, lambda folder: None, wanted="wanted a folder that can be written")


@contextmanager
def _staged(output: Path, foreign: Callable[[Path], str | None], *, wanted: str) -> Iterator[Path]:
    output = output.absolute()
    _clean_up(output)
    _claim_place(output, foreign, wanted=wanted)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        work = output.with_name(f".{output.name}.partial-{secrets.token_hex(4)}")
        staged = work / "new"
        staged.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror or error}") from None
    lock = _lock(work)
    try:
        try:
            yield staged
            for path in [*entries(staged), "."]:
                sync(staged / path)
        except OSError as error:
            raise DataError(_unfinished(output, error)) from None
        try:
            _put_in_place(staged, output, foreign, wanted=wanted)
        except OSError as error:
            raise ConfigError(f"{output} cannot take its name: {error.strerror or error}") from None
        sync(output.parent)
    finally:
        if output.exists() or not (work / "old").exists():
            shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _unfinished(output: Path, error: OSError) -> str:
    what = f"{Path(error.filename).name}: {error.strerror}" if error.filename else str(error)
    kept = "what was there is as it was" if output.exists() else "nothing of it was left"
    return f"{output} could not be made: {what}; {kept}"


def _put_in_place(staged: Path, output: Path, foreign: Callable[[Path], str | None], *, wanted: str) -> None:
    """Rename; what was there is looked at once more when nobody can reach it under its name any longer."""
    if not output.is_dir() or not os.listdir(output):
        os.rename(staged, output)
        return
    old = staged
    if not _exchange(staged, output):
        old = staged.with_name("old")
        os.rename(output, old)
        try:
            os.rename(staged, output)
        except BaseException:
            os.rename(old, output)
            raise
    if (entry := foreign(old)) is not None:
        if not _exchange(old, output):
            os.rename(output, staged)
            os.rename(old, output)
        raise ConfigError(foreign_text(output, entry, wanted=wanted))


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where system or file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), os.fspath(other))


def _clean_up(output: Path) -> None:
    """Put back an old folder that a killed process had just moved aside, and delete what killed processes left."""
    with contextlib.suppress(OSError):
        for work in sorted(output.parent.glob(f".{glob.escape(output.name)}.partial-????????")):
            is_ours = re.fullmatch(r".*\.partial-[0-9a-f]{8}", work.name) and not work.is_symlink()
            if not is_ours or not set(os.listdir(work)) <= {"new", "old"}:
                continue
            lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its owner lives
                if set(os.listdir(work)) == {"new", "old"}:  # killed before the new one took its place
                    if os.path.lexists(output):
                        continue
                    os.rename(work / "old", output)
                shutil.rmtree(work, ignore_errors=True)
            finally:
                os.close(lock)


def _lock(folder: Path) -> int:
    """Open a folder and hold it, where the file system has locks, until the descriptor is closed."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor
