from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import bert_ds.build_shards
from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.corpus.shards.build import BuildSettings, build_shards
from bert_ds.corpus.shards.shard_folder import Manifest, open_shards, verify_shards
from bert_ds.corpus.text.documents import Document
from bert_ds.corpus.text.input_files import find_input_files
from bert_ds.corpus.text.text_input import DocumentInput, FileInput
from bert_ds.corpus.tokenizer.wordpiece import SPECIAL_PIECES, TextRules, WordPieceTokenizer

ROOT = Path(__file__).parents[1]
LETTERS = "abcdefghij"
SETTINGS = BuildSettings(validation_fraction=0.2, tokens_per_shard=400)


def text(number: int) -> str:
    """A document that no other number has."""
    return " ".join([*f"{number:06d}".translate(str.maketrans("0123456789", LETTERS)), "."] * (1 + number % 4))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bert_ds.corpus.shards.build._BATCH_DOCUMENTS", 10)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    WordPieceTokenizer([*SPECIAL_PIECES, ".", *LETTERS], TextRules()).save(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files with 100 documents each."""
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / f"{index}.txt" for index in range(3)]
    for index, path in enumerate(paths):
        path.write_text("\n\n".join(text(index * 100 + number) for number in range(100)))
    return paths


def build(
    files: list[Path], tokenizer: Path, output: Path, *, settings: BuildSettings = SETTINGS, workers: int = 1
) -> Manifest:
    return build_shards(FileInput(find_input_files(files).files), tokenizer, output, settings=settings, workers=workers)


PLAN = {
    "dtype": "uint16",
    "vocab_size": 7,
    "tokenizer_fingerprint": "another",
    "special_ids": {},
    "input": {},
    "settings": {},
    "splits": {},
}
"""Of a build of something else."""


def given(texts: Iterable[str]) -> DocumentInput:
    return DocumentInput(lambda: (Document("", each) for each in texts), description={})


def digest(folder: Path) -> str:
    """One number for all names and bytes of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.fixture(scope="module")
def uninterrupted(files: list[Path], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the folder that every build of `files` must give."""
    output = tmp_path_factory.mktemp("whole") / "s"
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr("bert_ds.corpus.shards.build._BATCH_DOCUMENTS", 10)
        manifest = build(files, tokenizer, output)
    assert len(manifest.splits["train"].shards) >= 5
    return digest(output)


def test_any_number_of_workers_gives_the_same_bytes(
    files: list[Path], tokenizer: Path, uninterrupted: str, tmp_path: Path
) -> None:
    build(files, tokenizer, tmp_path / "s", workers=3)
    assert digest(tmp_path / "s") == uninterrupted


def test_a_build_that_stops_at_any_rename_is_continued_to_the_same_bytes(
    files: list[Path], tokenizer: Path, uninterrupted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    rename = os.replace
    attempts, done = 0, False
    while not done:
        left = [attempts % 9]

        def replace_until_killed(source: str, target: str, left: list[int] = left) -> None:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            rename(source, target)

        monkeypatch.setattr(os, "replace", replace_until_killed)
        try:
            build(files, tokenizer, tmp_path / "s")
            done = True
        except Killed:
            attempts += 1
    assert attempts > 10
    assert digest(tmp_path / "s") == uninterrupted


def test_a_continued_build_does_not_encode_finished_shards_again(
    files: list[Path], tokenizer: Path, tmp_path: Path
) -> None:
    def documents(limit: int) -> Iterator[Document]:
        for number in range(300):
            if number == limit:
                raise DataError("stop here")
            yield Document("", text(number))

    output = tmp_path / "s"
    with pytest.raises(DataError, match="stop here"):
        build_shards(DocumentInput(lambda: documents(150), description={}), tokenizer, output, settings=SETTINGS)
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("*-0000[01].tokens")}
    assert len(kept) >= 2
    build_shards(DocumentInput(lambda: documents(300), description={}), tokenizer, output, settings=SETTINGS)
    assert {name: (output / name).stat().st_mtime_ns for name in kept} == kept


def test_a_finished_shard_damaged_before_the_build_goes_on_is_built_again(
    files: list[Path], tokenizer: Path, uninterrupted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "s"
    calls = 0

    def stop(done: int, message: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 25:
            raise KeyboardInterrupt

    text_input = FileInput(find_input_files(files).files)
    with pytest.raises(KeyboardInterrupt):
        build_shards(text_input, tokenizer, output, settings=SETTINGS, report=stop)
    damaged = output / "train-00001.sentences"
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    build(files, tokenizer, output)
    assert digest(output) == uninterrupted


def test_a_real_kill_minus_nine_loses_nothing(tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    row = '{"text": "' + "a b c d e f g h i j . " * 40
    source.write_text("".join(f'{row}{" ".join(text(number))}"}}\n' for number in range(3_000)))
    command = [sys.executable, str(ROOT / "bert_ds/build_shards.py"), "--input", str(source), "--tokenizer"]
    command += [str(tokenizer), "--tokens-per-shard", "100000", "--validation-fraction", "0.1", "--output"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    child = subprocess.Popen([*command, str(killed), "--workers", "2"], env=environment, start_new_session=True)
    while not (killed / "segment-00001.json").exists():
        assert child.poll() is None, "the build ended before it could be killed"
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (killed / "manifest.json").exists()
    deadline = time.monotonic() + 20
    while _group_lives(child.pid):
        assert time.monotonic() < deadline, "workers outlive the killed build"
        time.sleep(0.02)
    for output, workers in ((killed, "1"), (whole, "1")):
        subprocess.run([*command, str(output), "--workers", workers], env=environment, check=True)
    assert digest(killed) == digest(whole)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_finished_folder_is_reused_without_reading_the_input(tokenizer: Path, tmp_path: Path) -> None:
    readings = 0

    def documents() -> Iterator[Document]:
        nonlocal readings
        readings += 1
        return (Document("", text(number)) for number in range(300))

    text_input = DocumentInput(documents, description={"x": 1})
    first = build_shards(text_input, tokenizer, tmp_path / "s", settings=SETTINGS)
    assert build_shards(text_input, tokenizer, tmp_path / "s", settings=SETTINGS) == first
    assert readings == 1
    shard = next((tmp_path / "s").glob("train-*.tokens"))
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train-\d+\.tokens has \d+ bytes, wanted"):
        build_shards(text_input, tokenizer, tmp_path / "s", settings=SETTINGS)


def test_other_settings_other_input_and_another_tokenizer_are_refused(
    files: list[Path], tokenizer: Path, tmp_path: Path
) -> None:
    output = tmp_path / "s"
    build(files, tokenizer, output)
    for settings in (BuildSettings(0.3, 400), BuildSettings(0.2, 500)):
        with pytest.raises(
            ConfigError, match=r'settings is .*"validation_fraction": 0\.2, "tokens_per_shard": 400} th'
        ):
            build(files, tokenizer, output, settings=settings)
    with pytest.raises(ConfigError, match=r"other settings: input is"):
        build(files[:2], tokenizer, output)
    other = tmp_path / "other"
    WordPieceTokenizer([*SPECIAL_PIECES, *LETTERS, "."], TextRules()).save(other)
    with pytest.raises(ConfigError, match="tokenizer_fingerprint is"):
        build(files, other, output)


def failing(number: int, message: str = "unreadable") -> DocumentInput:
    """So many documents, and then an error."""

    def documents() -> Iterator[Document]:
        yield from (Document("", text(index)) for index in range(number))
        raise DataError(message)

    return DocumentInput(documents, description={})


def test_a_build_that_fails_before_its_first_shard_leaves_the_folder_free_for_other_settings(
    files: list[Path], tokenizer: Path, uninterrupted: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="unreadable"):
        build_shards(failing(20), tokenizer, tmp_path / "s", settings=SETTINGS)
    assert list((tmp_path / "s").iterdir()) == []
    (tmp_path / "s" / "building.json").write_text(
        Manifest.model_validate(PLAN).model_dump_json()
    )  # killed: no clean-up
    (tmp_path / "s" / "train-00000.tokens.partial").touch()
    build(files, tokenizer, tmp_path / "s")
    assert digest(tmp_path / "s") == uninterrupted


def test_finished_shards_of_other_settings_are_refused_and_kept(
    files: list[Path], tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="unreadable"):
        build_shards(failing(200), tokenizer, tmp_path / "s", settings=SETTINGS)
    before = digest(tmp_path / "s")
    with pytest.raises(ConfigError, match="other settings: input is"):
        build(files, tokenizer, tmp_path / "s")
    with pytest.raises(ConfigError, match=r"settings is .* 400} there and .* 500} here"):
        build_shards(failing(200), tokenizer, tmp_path / "s", settings=BuildSettings(0.2, 500))
    assert (tmp_path / "s" / "segment-00000.json").is_file()
    assert digest(tmp_path / "s") == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train-00000.tokens", "mine"),
        ("segment-00000.json", "mine"),
        ("building.json", "garbage"),
        ("building.json", '{"a": 1}'),
        ("building.json.partial", "mine"),
        (".hidden", ""),
    ],
)
def test_a_file_of_somebody_else_is_refused_whatever_its_name(
    files: list[Path], tokenizer: Path, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=f"holds '{name}', which is not ours"):
        build(files, tokenizer, tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, content)]


def test_a_folder_with_other_things_in_it_is_refused(files: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds 'thesis\.tex'"):
        build(files, tokenizer, tmp_path)


@pytest.mark.parametrize("name", ["train-00007.tokens", "validation-00000.tokens.partial", "segment-00042.json"])
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_file_of_somebody_else_among_our_shards_is_refused_and_kept(
    files: list[Path], tokenizer: Path, tmp_path: Path, name: str, is_finished: bool
) -> None:
    if is_finished:
        build(files[:1], tokenizer, tmp_path / "s", settings=BuildSettings(0.2, 10_000))
    else:
        (tmp_path / "s").mkdir()
        (tmp_path / "s/building.json").write_text(Manifest.model_validate(PLAN).model_dump_json())
        name = name.replace("00000", "00001")  # behind what is being built
    (tmp_path / "s" / name).write_text("mine")
    before = digest(tmp_path / "s")
    with pytest.raises(ConfigError, match=f"holds '{name}', which is not ours"):
        build(files[:1], tokenizer, tmp_path / "s", settings=BuildSettings(0.2, 10_000))
    assert digest(tmp_path / "s") == before


def test_two_builds_of_one_folder_at_once_are_refused(files: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    def documents() -> Iterator[Document]:
        build(files, tokenizer, tmp_path / "s")
        yield Document("", "never")

    with pytest.raises(DataError, match="another process is building"):
        build_shards(DocumentInput(documents, description={}), tokenizer, tmp_path / "s", settings=SETTINGS)


def test_too_little_text_is_refused_with_what_was_found_and_what_is_needed(tokenizer: Path, tmp_path: Path) -> None:
    for texts, message in (
        ([], "found 0 training documents with 0 tokens, at least 2 documents with 128 tokens are needed"),
        (["a b c"] * 2, "found 2 training documents with 6 tokens"),
    ):
        with pytest.raises(DataError, match=message):
            build_shards(given(texts), tokenizer, tmp_path / "s", settings=BuildSettings(0.0))
        assert list((tmp_path / "s").iterdir()) == []


def test_an_empty_validation_split_is_refused_unless_none_is_asked_for(
    files: list[Path], tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"validation_fraction 1e-09 left 0 for validation where 2 are needed"):
        build(files, tokenizer, tmp_path / "s", settings=BuildSettings(1e-9))
    manifest = build(files, tokenizer, tmp_path / "s", settings=BuildSettings(0.0))
    assert manifest.splits["validation"].num_documents == 0
    assert open_shards(tmp_path / "s", "validation").sentence_lengths().tolist() == []


def test_text_that_the_tokenizer_does_not_know_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    text_input = given(["xyz " * 100] * 9)
    with pytest.raises(DataError, match=r"900 of 900 tokens are \[UNK\]"):
        build_shards(text_input, tokenizer, tmp_path / "s", settings=BuildSettings(0.0))


def test_settings_out_of_range_are_refused(files: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"validation_fraction is 0\.7"):
        build(files, tokenizer, tmp_path / "s", settings=BuildSettings(0.7))
    with pytest.raises(ConfigError, match="workers is 0"):
        build(files, tokenizer, tmp_path / "s", workers=0)
    assert not (tmp_path / "s").exists()


def test_a_vocabulary_of_more_than_65536_pieces_is_stored_in_four_bytes(tmp_path: Path) -> None:
    tokenizer = tmp_path / "t"
    WordPieceTokenizer([*SPECIAL_PIECES, *(f"a{n}" for n in range(70_000))], TextRules()).save(tokenizer)
    documents = [f"a{n} " * 40 + "a69999" for n in range(100)]
    build_shards(given(documents), tokenizer, tmp_path / "s", settings=BuildSettings(0.0))
    split = open_shards(tmp_path / "s", "train")
    assert split.dtype.itemsize == 4
    assert int(split.tokens(40, 41)[0]) == 70_004
    verify_shards(tmp_path / "s", "sha256")


def test_memory_does_not_grow_with_the_input(tokenizer: Path, tmp_path: Path) -> None:
    def peak(num_documents: int) -> int:
        documents = given(text(number) * 10 for number in range(num_documents))
        shutil.rmtree(tmp_path / "s", ignore_errors=True)
        tracemalloc.start()
        build_shards(documents, tokenizer, tmp_path / "s", settings=BuildSettings(0.1))
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(100)
    assert peak(1600) < 1.5 * peak(400)


def test_the_verb_builds_by_its_options(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "body": text(number)}) + "\n" for number in range(60)))
    words = ("--tokenizer", tokenizer, "--output", tmp_path / "out", "--text_field", "body", "--workers", 1)
    sizes = ("--validation_fraction", 0.3, "--tokens_per_shard", 300)
    monkeypatch.setattr(sys, "argv", list(map(str, ("build_shards.py", "--input", path, *words, *sizes))))
    bert_ds.build_shards.main()
    given = FileInput(find_input_files([path]).files, text_field="body")
    wanted = build_shards(given, tokenizer, tmp_path / "wanted", settings=BuildSettings(0.3, 300))
    assert verify_shards(tmp_path / "out") == wanted and len(wanted.splits["train"].shards) > 1
    capsys.readouterr()


def test_unknown_pieces_are_counted_over_all_batches(tokenizer: Path, tmp_path: Path) -> None:
    texts = given(f"{text(number)} ?" for number in range(40))
    manifest = build_shards(texts, tokenizer, tmp_path / "out", settings=BuildSettings(0.2))
    assert sum(split.num_unknown for split in manifest.splits.values()) == 40
