"""Data files in their published formats, and what is wrong with them by file and line."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.task.task_data_config import DataFile
from bert_ds.downstream.rows import records
from bert_ds.downstream.rows.records import pick, read_records


def read(folder: Path, content: bytes | str, form: str, **settings: Any) -> list[dict[str, Any]]:
    path = folder / "file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [dict(record.values) for record in read_records(DataFile(path=str(path), format=form, **settings))]


def test_quotes_mean_nothing_in_tsv(tmp_path: Path) -> None:
    rows = read(tmp_path, 'text\tlabel\n"a\t1\r\nb "c"\t0\n', "tsv")
    assert rows == [{"text": '"a', "label": "1"}, {"text": 'b "c"', "label": "0"}]


def test_csv_has_quotes_crlf_and_line_ends_inside_fields(tmp_path: Path) -> None:
    rows = read(tmp_path, '"a, b","c\r\nd",5.0\r\ne,f,1\r\n', "csv", has_header=False)
    assert rows == [{"0": "a, b", "1": "c\r\nd", "2": "5.0"}, {"0": "e", "1": "f", "2": "1"}]


def test_a_pattern_names_the_columns_of_lines_and_latin_1_takes_any_byte(tmp_path: Path) -> None:
    content = b"ENTY:food What is \xf0 tea ?\n"
    rows = read(
        tmp_path, content, "lines", encoding="latin-1", pattern=r"(?P<coarse>[A-Z]+):(?P<fine>\S+) (?P<text>.*)"
    )
    assert rows == [{"coarse": "ENTY", "fine": "food", "text": "What is ð tea ?"}]


def test_xml_rows_have_attributes_and_children(tmp_path: Path) -> None:
    content = '<?xml version="1.0" encoding="UTF-8"?>\n<c><pair id="8" value="TRUE"><t>A &amp; B</t><h>A</h></pair></c>'
    assert read(tmp_path, content, "xml", record="pair") == [{"@id": "8", "@value": "TRUE", "t": "A & B", "h": "A"}]


def test_ranges_and_empty_nodes_of_conllu_are_no_words(tmp_path: Path) -> None:
    line = "{}\t{}\t_\t{}" + "\t_" * 6
    words = [
        ("1-2", "don't", "_"),
        ("1", "do", "AUX"),
        ("2", "n't", "PART"),
        ("2.1", "go", "VERB"),
        ("3", "it", "PRON"),
    ]
    content = "# text = don't it\n" + "\n".join(line.format(*word) for word in words) + "\n\n"
    (row,) = read(tmp_path, content, "conllu")
    assert (row["form"], row["upos"]) == (["do", "n't", "it"], ["AUX", "PART", "PRON"])


def test_the_digit_of_a_segmentation_is_cut_off_and_a_replacement_character_stays(tmp_path: Path) -> None:
    rows = read(tmp_path, "回0\tO\n\ufffd1\tB-PER\n\n\n吧0\tO\n", "conll", strips_last_character=True)
    assert rows == [{"0": ["回", "\ufffd"], "1": ["O", "B-PER"]}, {"0": ["吧"], "1": ["O"]}]


@pytest.mark.parametrize(
    ("content", "form", "settings", "message"),
    [
        ("text\tlabel\na\t1\nb\n", "tsv", {}, r"file:3: found 1 columns, wanted 2 \(text, label\)"),
        (b"text\na\n\xff\n", "tsv", {}, r'file:3: byte 7 is no UTF-8 \(encoding "latin-1"\?\)'),
        ("a\ta\n1\t2\n", "tsv", {}, "file:1: two columns have the same name"),
        ('{"a": 1}\n{"a": \n', "jsonl", {}, "file:2: not JSON"),
        ('"a,b\n', "csv", {}, "file:1: unexpected end of data"),
        ("<c><pair>", "xml", {"record": "pair"}, "file:1: not XML"),
        ('<!DOCTYPE c [<!ENTITY a "b">]><c/>', "xml", {"record": "pair"}, "declares entities"),
        ("abc\n", "lines", {"pattern": "(?P<text>x.*)"}, r'file:1: "abc" does not match \(\?P<text>x'),
        ("a\tO\nb\n", "conll", {}, "file:2: found 1 columns, wanted 2"),
        ("回\tO\n", "conll", {"strips_last_character": True}, "file:1: the word is .* wanted a character and a digit"),
        ("\n\n", "lines", {}, "holds no row"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(
    tmp_path: Path, content: bytes | str, form: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, content, form, **settings)


def test_a_missing_file_says_where_data_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file or directory; --data names the folder"):
        read_records(DataFile(path=str(tmp_path / "none"), format="tsv"))


def test_a_wrong_column_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("sentence\tlabel\na\t1\n")
    (record,) = read_records(DataFile(path=str(tmp_path / "file"), format="tsv"))
    with pytest.raises(DataError, match='file:2 has no column "sentense", it has "sentence", "label"; did you mean'):
        pick(record, "sentense")
    assert (pick(record, 0), pick(record, -1), pick(record, ("none", "label"))) == ("a", "1", "1")


@pytest.mark.parametrize("pattern", ["(a+)+$", "(?P<text>(a|aa)+)$", "(?P<text>(.*)*)x"])
def test_a_pattern_that_would_match_for_years_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.setattr(records, "PATTERN_S", 0.2)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"file: matching .* takes more than 0\.2 s"):
        read(tmp_path, "a" * 60 + "b\n", "lines", pattern=pattern)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<c>" * 1_000_000, "file: more than 64 elements in each other"),
        ("<c>" * 65 + "</c>" * 65, "file: more than 64 elements in each other"),
        ('<!DOCTYPE c [<!ATTLIST p a CDATA "x">]><c><p/></c>', "declares entities or attributes"),
        ('<!DOCTYPE c [<!ENTITY % a SYSTEM "file:///etc/passwd">%a;]><c/>', "declares entities or attributes"),
    ],
    ids=["a million levels", "65 levels", "defaults", "outside"],
)
def test_xml_that_makes_much_of_little_is_refused(tmp_path: Path, content: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match=message):
        read(tmp_path, content, "xml", record="p")
    assert time.monotonic() - start < 5


def test_elements_beside_each_other_are_no_levels(tmp_path: Path) -> None:
    assert len(read(tmp_path, "<c>" + "<p><t>a</t></p>" * 200 + "</c>", "xml", record="p")) == 200


@pytest.mark.parametrize("word_id", ["²", "٣", "1.", "-", "1-", "x"])
def test_a_word_of_conllu_is_counted_in_plain_digits(tmp_path: Path, word_id: str) -> None:
    with pytest.raises(DataError, match="file:1: the id is"):
        read(tmp_path, f"{word_id}\ta" + "\t_" * 8 + "\n", "conllu")


def test_empty_lines_are_rows_of_lines_except_at_the_end(tmp_path: Path) -> None:
    assert [row["text"] for row in read(tmp_path, "a\n\nb\r\n\r\n\n", "lines")] == ["a", "", "b"]
    assert read(tmp_path, "a\tb\n1\t\n\n2\t\n", "tsv") == [{"a": "1", "b": ""}, {"a": "2", "b": ""}]
