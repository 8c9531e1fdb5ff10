from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from bert_ds.corpus.text.docstrings import DocstringCounts, default_roots, docstring_documents
from bert_ds.corpus.text.prose import prose_of

ROOT = Path(__file__).parents[1]
FIRST = "This module holds the first of several long explanations. " * 4
SECOND = "Another explanation follows here, and it is just as long as the first one. " * 4


def write(folder: Path, name: str, source: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")


def texts(folder: Path, *, max_bytes: int = 10**9) -> list[str]:
    return [document.text for document in docstring_documents(max_bytes, [folder])]


def test_a_module_becomes_one_document_with_its_docstrings_in_source_order(tmp_path: Path) -> None:
    source = f'''"""{FIRST}"""
import nothing_that_exists
raise SystemExit("never executed")

if True:
    class Thing:
        """The class is explained in one line."""

        async def work(self):
            """The method is explained
            over two lines."""

def function():
    """{SECOND}"""
    def inner():
        """Functions inside functions are not read at all."""
'''
    write(tmp_path, "a.py", source)
    assert texts(tmp_path) == [
        f"{FIRST.strip()}\nThe class is explained in one line.\n"
        f"The method is explained over two lines.\n{SECOND.strip()}"
    ]


def test_a_docstring_that_occurred_before_is_left_out(tmp_path: Path) -> None:
    for name in ("a.py", "b/vendored.py"):
        write(tmp_path, name, f'"""{FIRST}"""\n')
    write(tmp_path, "c.py", f'"""{SECOND}"""\n\ndef f():\n    """{FIRST}"""\n')
    assert "".join(texts(tmp_path)).count(FIRST.strip()) == 1


def test_unparsable_and_undecodable_files_are_skipped_and_counted(tmp_path: Path) -> None:
    write(tmp_path, "good.py", f'"""{FIRST}"""\n')
    write(tmp_path, "python2.py", f'"""{SECOND}"""\nprint "no longer Python"\n')
    (tmp_path / "latin.py").write_bytes(f'"""{SECOND}caf\xe9"""\n'.encode("latin-1"))
    counts = DocstringCounts()
    documents = list(docstring_documents(10**9, [tmp_path], counts=counts))
    assert [document.source for document in documents] == ["good.py"]
    assert counts == DocstringCounts(num_files=3, num_unreadable=2, num_documents=1, num_bytes=len(FIRST.strip()))


def test_tests_and_nested_package_folders_are_not_entered(tmp_path: Path) -> None:
    for name in ("tests/a.py", "test/b.py", "site-packages/c.py"):
        write(tmp_path, name, f'"""{FIRST}"""\n')
    assert texts(tmp_path) == []


def test_half_a_character_in_a_docstring_is_no_obstacle(tmp_path: Path) -> None:
    write(tmp_path, "a.py", f'"""{FIRST}"""\n\ndef f():\n    """Half a character is \\ud800 and must not be here."""\n')
    assert texts(tmp_path) == [FIRST.strip()]


def test_max_bytes_takes_a_fixed_sample_spread_over_the_packages(tmp_path: Path) -> None:
    for package in "abcde":
        for number in range(20):
            write(tmp_path, f"{package}/m{number}.py", f'"""{package} {number:03d} {FIRST}"""\n')
    chosen = [document.source for document in docstring_documents(7000, [tmp_path])]
    assert chosen == [document.source for document in docstring_documents(7000, [tmp_path])]
    assert len(chosen) == 29
    assert {name[0] for name in chosen} == set("abcde")
    assert sum(len(text.encode()) for text in texts(tmp_path, max_bytes=7000)) <= 7000


def test_a_smaller_sample_is_the_beginning_of_a_larger_one(tmp_path: Path) -> None:
    for number in range(30):
        write(tmp_path, f"m{number}.py", f'"""{number:03d} {FIRST}"""\n')
    assert texts(tmp_path, max_bytes=5000) == texts(tmp_path, max_bytes=3000) + texts(tmp_path, max_bytes=5000)[12:]


def test_the_default_roots_are_the_standard_library_and_the_installed_packages() -> None:
    paths = sysconfig.get_paths()
    assert {Path(paths["stdlib"]), Path(paths["purelib"])} <= set(default_roots())


def test_this_machine_yields_english_prose() -> None:
    documents = list(docstring_documents(300_000))
    words = " ".join(document.text for document in documents).lower().split()
    assert sum(len(document.text.encode()) for document in documents) > 200_000
    assert words.count("the") > 0.04 * len(words)
    assert len({document.source.split("/")[0] for document in documents}) >= 5


def test_nothing_that_is_read_is_imported() -> None:
    code = (
        "import sys; from bert_ds.corpus.text.docstrings import docstring_documents;"
        "list(docstring_documents(100_000)); assert not {'torch', 'transformers', 'turtle'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("docstring", "paragraphs"),
    [
        (
            "One line that is\n    wrapped at the margin.\n\n    Another paragraph stands here now.",
            ["One line that is wrapped at the margin.", "Another paragraph stands here now."],
        ),
        (
            "A sum of two given numbers.\n\n>>> add(1, 2)\n3\n\nIt works for all the numbers.",
            ["A sum of two given numbers.", "It works for all the numbers."],
        ),
        (
            "Use it in the following way::\n\n    x = the_function(of, many, words)\n\nand then go on as before.",
            ["Use it in the following way:", "and then go on as before."],
        ),
        (
            "Fences are skipped with their text.\n```python\nthis is code and not prose\n```\n"
            "What follows is read once more.",
            ["Fences are skipped with their text.", "What follows is read once more."],
        ),
        (
            ".. code-block:: python\n\n    this is code and not prose\n\n.. note::\n    A note is read as any text.",
            ["A note is read as any text."],
        ),
        (
            "Parameters\n----------\nx : int, optional\n    The number of things to be counted.\n",
            ["The number of things to be counted."],
        ),
        (
            "=====  =====\nName   Many words in a table row\n=====  =====\n| a row of a table too |",
            ["Name Many words in a table row"],
        ),
        (
            "Args:\n    size (int): The size of the thing.\n"
            "    name: What the thing is called\n        by its very own users.",
            ["size (int): The size of the thing.", "name: What the thing is called by its very own users."],
        ),
        (
            ":param size: The size of the thing.\n:returns: Nothing that is worth the name.",
            ["The size of the thing.", "Nothing that is worth the name."],
        ),
        (
            "- first of all the bullet points\n- second of all the bullet points\n"
            "2. third of the numbered bullet points",
            [
                "first of all the bullet points",
                "second of all the bullet points",
                "third of the numbered bullet points",
            ],
        ),
        (
            "See :class:`~a.b.Thing` and ``code`` and *this* or **that**, `a link <http://x.y>`_.",
            ["See a.b.Thing and code and this or that, a link."],
        ),
        ("Too short.\n\nx1 = [[0, 1], [2, 3], [4, 5], [6, 7]] + y_2 * z_3", []),
    ],
)
def test_prose_is_kept_and_the_rest_is_dropped(docstring: str, paragraphs: list[str]) -> None:
    assert prose_of(docstring) == paragraphs
