"""Duplicates and rows of tasks are found in a text, counted and listed; a cleaning can be killed and goes on."""

from __future__ import annotations

import json
import random
import sys
import tracemalloc
from pathlib import Path

import pytest

import bert_ds.clean_text
from bert_ds.basics.ranks import DataError
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.corpus.text import cleaning
from bert_ds.corpus.text.cleaning import CleaningSettings, Counts, clean, row_shingles
from bert_ds.corpus.text.documents import Document, DocumentTexts
from bert_ds.corpus.text.input_files import find_input_files
from bert_ds.corpus.text.near_duplicates import DuplicateIndex, words_of
from bert_ds.corpus.text.text_input import DocumentInput, FileInput

SETTINGS = CleaningSettings()


def prose(number: int, *, length: int = 200) -> list[str]:
    """Words that no other number has in this order."""
    chosen = random.Random(number)
    return [f"w{chosen.randrange(5000)}" for _ in range(length)]


def changed(words: list[str], share: float, *, seed: int) -> list[str]:
    """The words with a share of them exchanged, one in each stretch."""
    chosen = random.Random(seed)
    found = list(words)
    for place in chosen.sample(range(len(words)), round(share * len(words))):
        found[place] = f"x{chosen.randrange(10**6)}"
    return found


def given(texts: list[str]) -> DocumentInput:
    return DocumentInput(
        lambda: (Document(f"text {n}", text) for n, text in enumerate(texts)), description={"n": len(texts)}
    )


def kept_in(folder: Path) -> list[str]:
    return list(DocumentTexts([folder]))


def removed_in(folder: Path) -> list[list[str]]:
    return [line.split("\t") for line in (folder / "removed.tsv").read_text().splitlines()]


def test_equal_and_nearly_equal_documents_go_and_the_first_stays(tmp_path: Path) -> None:
    first, other = prose(1), [*prose(2), "café"]
    near, far = changed(first, 0.01, seed=3), changed(first, 0.2, seed=4)
    texts = [" ".join(words) for words in (first, other, near, far)]
    texts.insert(2, texts[0].upper().replace(" ", "\n"))  # the same words
    counts = clean(given(texts), tmp_path / "out", settings=SETTINGS)
    assert counts == Counts(
        kept=3, exact=1, near=1, overlap=0, kept_bytes=sum(len(texts[n].encode()) for n in (0, 1, 4))
    )
    assert kept_in(tmp_path / "out") == [texts[0], texts[1], texts[4]]
    exact, nearly = removed_in(tmp_path / "out")
    assert exact == ["text 2", "exact", "text 0", "1.00"]
    assert nearly[:3] == ["text 3", "near", "text 0"] and 0.8 <= float(nearly[3]) < 1.0
    assert json.loads((tmp_path / "out/CLEANED").read_text())["counts"]["near"] == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"CLEANED", "removed.tsv", "text-00000.jsonl"}


def test_without_near_duplicates_only_equal_words_count(tmp_path: Path) -> None:
    texts = [" ".join(words) for words in (prose(1), changed(prose(1), 0.01, seed=3), prose(1))]
    counts = clean(given(texts), tmp_path / "out", settings=SETTINGS._replace(near=1.0))
    assert counts[:3] == (2, 1, 0)
    assert clean(given(texts), tmp_path / "stricter", settings=SETTINGS._replace(near=0.99))[:3] == (2, 1, 0)
    assert clean(given(texts), tmp_path / "looser", settings=SETTINGS)[:3] == (1, 1, 1)


def test_chinese_documents_are_compared_by_their_characters(tmp_path: Path) -> None:
    chosen = random.Random(0)
    text = "".join(chr(chosen.randrange(0x4E00, 0x9000)) for _ in range(300))
    assert words_of("中文ab, C 3") == ["中", "文", "ab", "c", "3"]
    counts = clean(given([text, f"{text[:150]}改{text[151:]}", text[::-1]]), tmp_path / "out", settings=SETTINGS)
    assert counts[:3] == (2, 0, 1)


def test_of_planted_copies_nearly_all_are_found_and_nothing_else_goes(tmp_path: Path) -> None:
    own = [prose(number) for number in range(300)]
    copies = [changed(own[number], 0.015, seed=number) for number in range(100)]
    index = DuplicateIndex(tmp_path / "index.sqlite", 0.8)
    wrong = [number for number, words in enumerate(own) if index.find_or_add(str(number), words) is not None]
    found = [index.find_or_add(f"copy {number}", words) for number, words in enumerate(copies)]
    index.close()
    assert wrong == []
    hits = [seen is not None and seen.source == str(number) for number, seen in enumerate(found)]
    assert sum(hits) >= 90


def test_of_documents_that_are_less_alike_most_are_found_and_the_nearest_is_told(tmp_path: Path) -> None:
    index = DuplicateIndex(tmp_path / "index.sqlite", 0.4)
    for number in range(40):
        index.find_or_add(str(number), prose(number))
    found = [index.find_or_add("", changed(prose(number), 0.06, seed=number)) for number in range(40)]
    assert sum(seen is not None and seen.source == str(number) for number, seen in enumerate(found)) >= 24
    text = prose(50, length=1000)
    nearer, further = (changed(text, share, seed=3) for share in (0.01, 0.12))
    assert index.find_or_add("nearer", nearer) is index.find_or_add("further", further) is None
    seen = index.find_or_add("", text)
    assert seen is not None and seen.source == "nearer"
    index.close()


@pytest.mark.parametrize("stop_after", [1, 7, 12])
def test_a_cleaning_that_is_killed_goes_on_to_the_same_bytes(
    stop_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bert_ds.corpus.text.cleaning._DOCUMENTS_AT_ONCE", 4)
    monkeypatch.setattr("bert_ds.corpus.text.cleaning._FILE_BYTES", 20_000)
    texts = [" ".join(prose(number % 37)) for number in range(60)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    text_input = FileInput(find_input_files([path]).files)
    clean(text_input, tmp_path / "whole", settings=SETTINGS)

    class Killed(BaseException):
        pass

    def kill(done: int, message: str) -> None:
        nonlocal stop_after
        stop_after -= 1
        if stop_after == 0:
            raise Killed

    with pytest.raises(Killed):
        clean(text_input, tmp_path / "out", settings=SETTINGS, report=kill)
    for name in ("text-00000.jsonl", "removed.tsv"):
        with (tmp_path / "out" / name).open("a") as file:
            file.write('{"text": "written and never comm')
    with pytest.raises(ConfigError, match="was begun with other text or settings"):
        clean(text_input, tmp_path / "out", settings=SETTINGS._replace(near=0.9))
    counts = clean(text_input, tmp_path / "out", settings=SETTINGS)
    assert counts[:4] == (37, 23, 0, 0)
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "out")]
    assert contents[0] == contents[1] and len(contents[0]) == 4
    assert clean(text_input, tmp_path / "out", settings=SETTINGS, report=kill) == counts  # found, not made again
    with pytest.raises(ConfigError, match="was made of other text or settings"):
        clean(text_input, tmp_path / "out", settings=SETTINGS._replace(overlap_words=9))


def test_memory_does_not_grow_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(number: int) -> int:
        monkeypatch.setattr(cleaning, "_DOCUMENTS_AT_ONCE", 50)
        texts = (Document("", " ".join(prose(n, length=20))) for n in range(number))
        tracemalloc.start()
        clean(DocumentInput(lambda: texts, description={"n": number}), tmp_path / str(number), settings=SETTINGS)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(20)
    assert peak(640) - peak(160) < 100_000  # their signatures alone are 250,000 bytes


def test_rows_of_tasks_are_taken_out_of_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row, held_out, trained, test = (prose(number, length=30) for number in (1, 2, 3, 4))
    (tmp_path / "data").mkdir()
    for name, words in (("dev", row), ("cut", held_out), ("train", trained)):
        (tmp_path / f"data/{name}.tsv").write_text(f"text\tlabel\n{' '.join(words)}\ta\ntoo short\tb\n")
    (tmp_path / "data/test.jsonl").write_text(json.dumps({"text": test, "label": "a", "number": 7}) + "\n")
    for name, files in (
        ("official", {"train": "train.tsv", "validation": "dev.tsv", "test": "test.jsonl"}),
        ("fraction", {"train": "cut.tsv"}),
    ):
        data = {side: [{"path": path, "format": path.partition(".")[2]}] for side, path in files.items()}
        data |= {"fields": {"text": "text", "label": "label"}}
        data |= {"validation_fraction": 0.5} if name == "fraction" else {}
        task = {"name": name, "kind": "classification", "data": data}
        (tmp_path / f"{name}.json").write_text(json.dumps(task))
    texts = [
        " ".join(prose(9, length=50) + row[4:14] + prose(8, length=50)).upper(),  # ten words of a validation row
        " ".join(prose(7, length=50) + held_out[:7]),  # of a row that may be held out
        " ".join(prose(10, length=50) + test[7:14]),  # of a test row, which holds its words one by one
        " ".join(prose(6, length=50) + row[:6]),  # six are too few
        " ".join(prose(5, length=50) + trained[:20]),  # training rows may be read
    ]
    texts.append(f"{texts[-1]} and more")  # nearly the same
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    words = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out", "--text_field", "body", "--against"]
    words += [tmp_path / "official.json", tmp_path / "fraction.json", "--data", tmp_path / "data"]
    words += ["--overlap_words", 7, "--near", 1.0]
    monkeypatch.setattr(sys, "argv", ["clean_text.py", *map(str, words)])
    bert_ds.clean_text.main()
    said = capsys.readouterr().out
    assert "72 runs of 7 words of the tasks; 7 texts are shorter" in said
    assert "3 documents kept" in said and "0 nearly, 3 with words of a task" in said
    assert kept_in(tmp_path / "out") == texts[3:]
    assert [row[1] for row in removed_in(tmp_path / "out")] == ["overlap"] * 3
    assert [row[2] for row in removed_in(tmp_path / "out")][1:] == [" ".join(held_out[:7]), " ".join(test[7:14])]


def test_what_cannot_be_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = row_shingles(["one two three four five six seven eight"], 8)
    texts = ["one two three four five six seven eight", "and one two three four five six seven eight"]
    with pytest.raises(
        DataError, match="no document is left: 0 were equal to another, 0 nearly, 2 had words of a task"
    ):
        clean(given(texts), tmp_path / "out", settings=SETTINGS, against=rows)
    assert clean(given(texts), tmp_path / "out", settings=SETTINGS).kept == 2  # nothing stands in its way
    clean(given(texts), tmp_path / "rows", settings=SETTINGS, against={"one row"})
    for folder, number, rows in (("rows", 2, {"another"}), ("out", 1, set())):
        with pytest.raises(ConfigError, match="was made of other text or settings"):
            clean(given(texts[:number]), tmp_path / folder, settings=SETTINGS, against=rows)
    monkeypatch.setattr(cleaning, "_RULES", 2)
    with pytest.raises(ConfigError, match="was made of other text or settings"):
        clean(given(texts), tmp_path / "out", settings=SETTINGS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/text-00000.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds 'text-00000.jsonl', which is not ours"):
        clean(given(texts), tmp_path / "mine", settings=SETTINGS)
    assert (tmp_path / "mine/text-00000.jsonl").read_text() == "mine"
    with pytest.raises(ConfigError, match=r"wanted near from 0\.3 to 1\.0"):
        clean(given(texts), tmp_path / "x", settings=SETTINGS._replace(near=80.0))
    held = DuplicateIndex(tmp_path / "index.sqlite", 0.8)
    with pytest.raises(DataError, match="is another process at it"):
        DuplicateIndex(tmp_path / "index.sqlite", 0.8)
    held.close()
