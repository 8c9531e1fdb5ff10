"""What the gate lets through, and that it says of everything else what it is, at once and in little memory."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bert_ds.basics.input_gate import (
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    refuse_link_out,
    split_lines,
    time_limit,
)
from bert_ds.basics.ranks import DataError


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (lambda path: None, "No such file"),
    ],
    ids=["fifo", "device", "folder", "link to itself", "missing"],
)
@pytest.mark.parametrize("read", [open_regular, read_bytes, read_text, read_json])
def test_what_is_no_file_is_refused_without_waiting(
    tmp_path: Path, make: Callable[[Path], None], wanted: str, read: Callable[..., object]
) -> None:
    path = tmp_path / "a"
    make(path)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: .*{wanted}"):
        read(path, error=DataError)


def test_a_file_is_read_up_to_its_limit_and_not_beyond(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    assert len(read_bytes(tmp_path / "a", max_bytes=3_000_000)) == 3_000_000
    with pytest.raises(ValueError, match="has 3000000 bytes, wanted at most 2999999"):
        read_text(tmp_path / "a", max_bytes=2_999_999)


def test_a_file_that_grows_while_it_is_read_is_bounded_too() -> None:
    with pytest.raises(ValueError, match=r"has .* bytes, wanted at most 10"):  # its size says 0
        read_bytes("/proc/self/status", max_bytes=10)


def test_a_sparse_file_of_a_terabyte_is_refused_in_its_first_piece(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        file.truncate(1 << 40)
    start = time.monotonic()
    with pytest.raises(DataError, match="has 1099511627776 bytes"):
        read_text(tmp_path / "a", error=DataError)
    with pytest.raises(DataError, match=r"a:1: holds a NUL byte, wanted text \(a hole in a sparse file\?\)"):
        read_text(tmp_path / "a", max_bytes=1 << 41, error=DataError)
    assert time.monotonic() - start < 5


TEXT = "第一行\n价格是二百元。\n"


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_named_encoding_is_read_also_where_a_piece_ends_inside_a_character(tmp_path: Path, encoding: str) -> None:
    text = "x" + TEXT * 150_000  # of several pieces; x shifts their ends
    (tmp_path / "a").write_bytes(text.encode(encoding))
    assert read_text(tmp_path / "a", encoding=encoding) == text


@pytest.mark.parametrize(
    ("content", "encoding", "wanted"),
    [
        (TEXT.encode("gb18030"), "utf-8", r'a:1: byte 0 is no UTF-8 \(encoding "gb18030" or'),
        (b"abc\nd\xe9 f\n", "utf-8", r'a:2: byte 5 is no UTF-8 \(encoding "latin-1"\?\)'),
        ("x" * (1 << 20) + "\n\n中".encode("gb18030").decode("latin-1"), "utf-8", "a:3: byte 1048578 is no UTF-8"),
        (TEXT.encode("utf-16"), "utf-8", r'a:1: byte 0 is no UTF-8 \(encoding "utf-16"\?\)'),
        ("ab".encode("utf-16-le"), "utf-8", "a:1: holds a NUL byte"),
        ("ab".encode("utf-16-le"), "utf-16", 'no byte order mark, wanted encoding "utf-16-le" or "utf-16-be"'),
        (TEXT.encode("utf-16")[:-1], "utf-16", "a:2: byte 24 is no UTF-16$"),
        (b"\xff\xff\xff", "gb18030", "a:1: byte 0 is no GB18030"),
        (b"a\nb\0", "latin-1", "a:2: holds a NUL byte"),
    ],
    ids=range(9),
)
def test_bytes_that_are_no_text_are_named_with_line_and_likely_encoding(
    tmp_path: Path, content: bytes | str, encoding: str, wanted: str
) -> None:
    (tmp_path / "a").write_bytes(content if isinstance(content, bytes) else content.encode("latin-1"))
    with pytest.raises(ValueError, match=wanted):
        read_text(tmp_path / "a", encoding=encoding)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000])
def test_json_without_end_is_one_sentence(text: str) -> None:
    with pytest.raises(DataError, match=r"^here: not JSON: nested too deeply$"):
        parse_json(text, where="here", error=DataError)


def test_lines_end_at_line_feeds_alone_as_split_has_them() -> None:
    text = "a\r\nb\x0bc\u2028d\n\ne\rf"
    assert list(split_lines(text)) == ["a", "b\x0bc\u2028d", "", "e\rf"]
    assert list(split_lines("a\n")) == ["a"] and list(split_lines("")) == []


def test_a_block_is_ended_after_its_time_and_the_clock_is_stopped_behind_it() -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match="too long"), time_limit(0.2, "too long", error=DataError):
        re.fullmatch("(a+)+$", "a" * 60 + "b")
    assert time.monotonic() - start < 5
    with time_limit(0.05, "too long"):
        pass
    time.sleep(0.1)


def test_a_link_stays_in_its_folder_or_leads_to_the_blobs_of_its_cache(tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots/0123"
    for folder in (snapshot / "onnx", cache / "blobs", tmp_path / "elsewhere/blobs"):
        folder.mkdir(parents=True)
    for path in (cache / "blobs/x", tmp_path / "elsewhere/x", tmp_path / "elsewhere/blobs/x", snapshot / "x"):
        path.write_text("{}")
    links = {
        "config.json": "../../blobs/x",
        "onnx/config.json": "../../../blobs/x",
        "same.json": "x",
        "out.json": tmp_path / "elsewhere/x",
        "other_cache.json": tmp_path / "elsewhere/blobs/x",
        "chain.json": "out.json",
        "loop.json": "loop.json",
        "gone.json": "nowhere",
    }
    for name, target in links.items():
        (snapshot / name).symlink_to(target)
    refused = []
    for name in links:
        try:
            refuse_link_out(snapshot / name, error=DataError)
        except DataError as error:
            assert str(snapshot / name) in str(error)
            refused.append(name)
    assert refused == ["out.json", "other_cache.json", "chain.json", "loop.json", "gone.json"]
    (tmp_path / "linked").symlink_to(snapshot)  # a folder may be a link itself
    refuse_link_out(tmp_path / "linked/config.json")
