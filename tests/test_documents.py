from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from bert_ds.basics.ranks import DataError
from bert_ds.corpus.text.documents import DocumentTexts, read_documents
from bert_ds.corpus.text.input_files import find_input_files


def texts(*paths: Path, text_field: str = "text") -> list[str]:
    return [document.text for document in read_documents(paths, text_field=text_field)]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_blank_lines_separate_documents_and_empty_ones_vanish(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\n\none\ntwo\n\n \n\nthree\n\n\n")
    assert texts(path) == ["one\ntwo", "three"]


def test_windows_line_ends_and_a_byte_order_mark_leave_no_trace(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree")
    assert texts(path) == ["one\ntwo", "three"]


def test_doc_extracts_are_recognised_and_the_repeated_title_is_dropped(tmp_path: Path) -> None:
    path = write(
        tmp_path / "wiki.txt",
        '<doc id="1" url="u" title="A &amp; B">\nA & B\n\nFirst.\n\nSecond.\n\n</doc>\n'
        '<doc id="2" title="C">\nC\n\n</doc>\n<doc id="3" title="D">\nNot the title.\n</doc>\n',
    )
    assert texts(path) == ["First.\n\nSecond.", "Not the title."]


def test_an_extract_that_is_never_closed_is_named_by_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "wiki.txt", '<doc id="1">\nx\n</doc>\n<doc id="2">\ny\n')
    with pytest.raises(DataError, match=r"wiki\.txt, line 4: <doc> is never closed"):
        texts(path)


def test_text_between_extracts_is_named_by_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "wiki.txt", '<doc id="1">\nx\n</doc>\nstray\n')
    with pytest.raises(DataError, match=r"line 4: text outside"):
        texts(path)


def test_json_lines_are_read_from_the_chosen_field(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one", "body": "uno"}\n\n{"text": " ", "body": "dos"}\n')
    assert texts(path) == ["one"]
    assert texts(path, text_field="body") == ["uno", "dos"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', "invalid JSON"),
        ("[" * 100_000, "invalid JSON"),
        ('["x"]', "a JSON list, one object per line is wanted"),
        ('{"title": "x"}', "no field \"text\"; there are 'title'"),
        ('{"text": 3}', 'field "text" is int, wanted a string'),
        ('{"text": null}', 'field "text" is NoneType'),
        ('{"text": "\\ud800"}', "half a character"),
    ],
)
def test_a_bad_json_line_is_named_by_file_and_line(line: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{message}"):
        texts(path)


def test_parquet_is_read_from_the_chosen_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra data is not installed: parquet is not read")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"n": [1, 2, 3], "body": ["one", "", "drei"]}), path)
    assert texts(path, text_field="body") == ["one", "drei"]
    with pytest.raises(DataError, match=r'a\.parquet: no column "text"; there are .*body'):
        texts(path)
    with pytest.raises(DataError, match='column "n" is int64, wanted string'):
        texts(path, text_field="n")
    write(tmp_path / "b.parquet.gz", gzip.compress(path.read_bytes()))
    assert texts(tmp_path / "b.parquet.gz", text_field="body") == ["one", "drei"]
    write(tmp_path / "c.parquet", path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"c\.parquet is damaged"):
        texts(tmp_path / "c.parquet")


def zstd_compress(content: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard", reason="the extra data is not installed: zstd is not read")
    return zstandard.compress(content)


@pytest.mark.parametrize(("ending", "compress"), [(".gz", gzip.compress), (".zst", zstd_compress)])
def test_compressed_files_are_read_over_several_frames_and_refused_when_cut(
    ending: str, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    two_frames = compress(b"one\n\ntw") + compress("o\n\n天\n".encode())
    path = write(tmp_path / f"a.txt{ending}", two_frames)
    assert texts(path) == ["one", "two", "天"]
    write(path, two_frames[:-6])
    with pytest.raises(DataError, match=r"a\.txt.* is damaged"):
        texts(path)
    write(path, b"this is not compressed")
    with pytest.raises(DataError, match=r"a\.txt.* is damaged"):
        texts(path)


def test_bad_utf8_is_named_by_file_and_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"fine\n\n\xe5\xa4\xa9 b\xe9d\n")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 at byte 11 \(line 3\)"):
        texts(path)


@pytest.mark.parametrize(
    ("encoding", "found"),
    [("gb18030", "gb18030"), ("utf-16", "utf-16"), ("utf-16-le", "utf-16"), ("latin-1", "latin-1")],
)
def test_text_in_another_encoding_is_refused_with_its_name_and_what_converts_it(
    encoding: str, found: str, tmp_path: Path
) -> None:
    text = "north of the café\n" if encoding in ("latin-1", "utf-16-le") else "北京天气很好\n"
    path = write(tmp_path / "a.txt", text.replace("é", "e" if encoding == "utf-16-le" else "é").encode(encoding))
    with pytest.raises(DataError, match=rf'a\.txt.*line 1.*encoding .*"{found}".*iconv -f ENCODING -t utf-8'):
        texts(path)


def test_a_folder_is_read_recursively_in_order_and_other_files_are_told(tmp_path: Path) -> None:
    write(tmp_path / "c/b.txt", "two")
    write(tmp_path / "c/a/z.jsonl", '{"text": "one"}')
    write(tmp_path / "c/SOURCE.md", "not text")
    write(tmp_path / "c/.cache/x.txt", "hidden")
    found = find_input_files([tmp_path / "c"])
    assert [file.name for file in found.files] == ["c/a/z.jsonl", "c/b.txt"]
    assert found.skipped == [tmp_path / "c/SOURCE.md"]
    assert texts(tmp_path / "c") == ["one", "two"]


def test_files_keep_the_order_they_were_given_in(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "b.TXT", "two")
    assert texts(tmp_path / "b.TXT", tmp_path / "a.txt") == ["two", "one"]


def test_an_unknown_ending_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pdf", "x")
    with pytest.raises(DataError, match=r"a\.pdf has an unknown ending; known are \.txt, .*\.parquet.*\.zst"):
        find_input_files([path])
    with pytest.raises(DataError, match="holds no file that ends in"):
        find_input_files([tmp_path])


def test_a_missing_path_and_a_file_given_twice_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x")
    with pytest.raises(DataError, match=r"nothing\.txt does not exist"):
        find_input_files([tmp_path / "nothing.txt"])
    with pytest.raises(DataError, match=r"a\.txt is listed twice"):
        find_input_files([path, tmp_path])


def test_a_document_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bert_ds.corpus.text.documents.MAX_DOCUMENT_BYTES", 1000)
    path = write(tmp_path / "a.txt", "x\n\n" + "some words\n" * 200)
    with pytest.raises(DataError, match="line 3: a document of more than 1000 bytes"):
        texts(path)
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "x" * 2000}))
    with pytest.raises(DataError, match="line 1: longer than 1000 bytes"):
        texts(path)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": "word " * 200}) + "\n" for _ in range(8000)))
    tracemalloc.start()
    count = sum(1 for _ in read_documents([path]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8000
    assert path.stat().st_size > 8_000_000
    assert peak < 1_000_000


def test_document_texts_start_over(tmp_path: Path) -> None:
    again = DocumentTexts([write(tmp_path / "a.txt", "one\n\ntwo")])
    assert list(again) == list(again) == ["one", "two"]


def test_parquet_and_zstd_are_imported_only_when_needed() -> None:
    code = "import sys, bert_ds.corpus.text.documents; assert not {'pyarrow', 'zstandard', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_rows_of_csv_keep_their_quoted_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'id,text\r\n1,"one, and\r\n\r\na ""half"""\r\n2,two\r\n\r\n3,\r\n')
    assert texts(path) == ['one, and\n\na "half"', "two"]
    assert texts(write(tmp_path / "b.csv.gz", gzip.compress(path.read_bytes())), text_field="id") == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,body\n1,one\n", r"a\.csv: no column \"text\"; there are \['id', 'body'\]"),
        ("id,text\n1,one,two\n", r"a\.csv, line 2: found 3 columns, wanted 2"),
        ('id,text\n1,"one\n', r"a\.csv, line 2: unexpected end of data"),
        (b"id,text\n1,\xff\n", r"a\.csv is not UTF-8 at byte 10 \(line 2\)"),
    ],
)
def test_a_csv_that_is_none_is_named_by_its_line(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        texts(write(tmp_path / "a.csv", content))


@pytest.mark.parametrize("name", ["a.arrow", "a.feather", "a.arrow.gz"])
@pytest.mark.parametrize("is_stream", [True, False])
def test_arrow_is_read_as_a_stream_and_as_a_file(name: str, is_stream: bool, tmp_path: Path) -> None:
    import pyarrow

    table = pyarrow.table({"id": [1, 2, 3], "text": ["one", "two", "three"]})
    sink = pyarrow.BufferOutputStream()
    make = pyarrow.ipc.new_stream if is_stream else pyarrow.ipc.new_file
    with make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    content = sink.getvalue().to_pybytes()
    path = write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    assert texts(path) == ["one", "two", "three"]
    with pytest.raises(DataError, match=r"no column \"body\"; there are \['id', 'text'\]"):
        texts(path, text_field="body")
    with pytest.raises(DataError, match="is int64, wanted string"):
        texts(path, text_field="id")
    if not name.endswith("gz"):
        with pytest.raises(DataError, match="is damaged"):
            texts(write(tmp_path / f"cut{name}", content[: len(content) // 2]))
