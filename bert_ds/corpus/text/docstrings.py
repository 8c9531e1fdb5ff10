"""The text every Python installation already holds: the docstrings of its modules, read as text, never imported."""

from __future__ import annotations

import ast
import gc
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bert_ds.basics.input_gate import read_text
from bert_ds.corpus.text.documents import Document
from bert_ds.corpus.text.prose import prose_of

MIN_DOCUMENT_CHARACTERS = 200
"""Modules with less prose than this give no document."""

_SKIPPED_FOLDERS = frozenset(("test", "tests", "__pycache__", "site-packages", "dist-packages"))
_MAX_SOURCE_BYTES = 4_000_000
_MIN_QUOTED_FRACTION = 0.1

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DOCUMENTED = (ast.Module, ast.ClassDef, *_FUNCTIONS)
_ENTERED = (ast.ClassDef, *_FUNCTIONS, ast.If, ast.Try, ast.ExceptHandler, ast.With)


@dataclass
class DocstringCounts:
    """What became of the files."""

    num_files: int = 0
    num_unreadable: int = 0
    num_documents: int = 0
    num_bytes: int = 0


def docstring_documents(
    max_bytes: int, roots: Sequence[Path] | None = None, *, counts: DocstringCounts | None = None
) -> Iterator[Document]:
    """Yield one document per module: the prose of its docstrings, a paragraph per line, in source order.

    Docstrings of functions inside functions are left out, and so are modules that are less than a tenth docstrings.
    Modules come in the order of the sha256 of their relative path, so that `max_bytes` takes a fair sample of all
    packages, the same one every time. A docstring or a paragraph of one
    that occurred before (vendored copies, inherited texts) is left out.

    Args:
        max_bytes: the documents together have at most this many bytes of UTF-8.
        roots: folders to look through; by default the standard library and the installed packages.
        counts: filled in while reading.
    """
    counts = DocstringCounts() if counts is None else counts
    seen_docstrings: set[bytes] = set()
    seen_paragraphs: set[bytes] = set()
    for name, path in _modules(default_roots() if roots is None else roots):
        counts.num_files += 1
        found = _docstrings(path)
        if found is None:
            counts.num_unreadable += 1
            continue
        new = [docstring for docstring in found if _is_new(docstring, seen_docstrings)]
        paragraphs = [paragraph for docstring in new for paragraph in prose_of(docstring)]
        text = "\n".join(paragraph for paragraph in paragraphs if _is_new(paragraph, seen_paragraphs))
        if len(text) < MIN_DOCUMENT_CHARACTERS:
            continue
        size = len(text.encode("utf-8"))
        if counts.num_bytes + size > max_bytes:
            return
        counts.num_bytes += size
        counts.num_documents += 1
        yield Document(name, text)


def default_roots() -> list[Path]:
    """Return the folders of the standard library and of the installed packages."""
    paths = sysconfig.get_paths()
    return [Path(path) for path in dict.fromkeys((paths["stdlib"], paths["purelib"], paths["platlib"]))]


def _modules(roots: Sequence[Path]) -> list[tuple[str, Path]]:
    found: dict[str, Path] = {}
    for root in roots:
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
            for file in files:
                if file.endswith(".py"):
                    path = Path(folder, file)
                    found.setdefault(path.relative_to(root).as_posix(), path)
    return sorted(found.items(), key=lambda item: hashlib.sha256(item[0].encode("utf-8", "replace")).digest())


def _docstrings(path: Path) -> list[str] | None:
    """Return the docstrings of a file in source order, None where it is no readable Python."""
    try:
        source = read_text(path, max_bytes=_MAX_SOURCE_BYTES, encoding="utf-8-sig")
        if not _is_promising(source):
            return []
        with _quietly():
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return [docstring for docstring in _docstrings_in(tree) if _is_encodable(docstring)]


def _is_promising(source: str) -> bool:
    """Parsing is what takes the time: spare it for files that are a tenth docstrings by a rough count."""
    quote = '"""' if '"""' in source else "'''"
    quoted = sum(map(len, source.split(quote)[1::2]))
    return quoted >= max(MIN_DOCUMENT_CHARACTERS, _MIN_QUOTED_FRACTION * len(source))


def _docstrings_in(tree: ast.Module) -> Iterator[str]:
    """Go through modules, classes and what may enclose their parts, not into functions."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, _DOCUMENTED) and node.body:
            match node.body[0]:
                case ast.Expr(value=ast.Constant(value=str() as docstring)):
                    yield docstring
        if not isinstance(node, _FUNCTIONS):
            parts = [getattr(node, name, ()) for name in ("body", "handlers", "orelse", "finalbody")]
            pending += [inside for part in reversed(parts) for inside in reversed(part) if isinstance(inside, _ENTERED)]


@contextmanager
def _quietly() -> Iterator[None]:
    """Parse without warnings about other people's code, and without collecting the tree's nodes while they are made."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if was_enabled:
            gc.enable()


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=12).digest()
    if digest in seen:
        return False
    seen.add(digest)
    return True


def _is_encodable(text: str) -> bool:
    """Escapes in a string can make half a character, which no file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
