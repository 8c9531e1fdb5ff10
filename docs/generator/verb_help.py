"""The parsers of all verbs, found by starting each script up to the point at which it reads its command line."""

from __future__ import annotations

import argparse
import gc
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import bert_ds
from bert_ds.launch.command_line import CALLED_BY
from bert_ds.launch.verbs import VERBS

COLUMNS = "100"
"""Width of what a verb says of itself."""


class _Asked(BaseException):
    """A script has got as far as its command line."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def verb_parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of every verb, complete, by its name. No torch is imported."""
    with _as_found():
        return {verb: _parser_of(Path(bert_ds.__file__).parent / f"{verb}.py") for verb in VERBS}


def verbs_page(*, title: str, opening: str) -> str:
    """Return the page of all verbs: what `bert-ds VERB --help` says."""
    sections = [f"# {title}\n\n{opening}"]
    for verb, parser in verb_parsers().items():
        with patch.dict(os.environ, {"COLUMNS": COLUMNS}):
            text = parser.format_help()
        ranks = " Started on every rank." if VERBS[verb].is_launched else ""
        sections.append(f"## {verb}\n\n{VERBS[verb].purpose}{ranks}\n\n```text\n{text.rstrip()}\n```")
    return "\n\n".join(sections) + "\n"


def _parser_of(script: Path) -> argparse.ArgumentParser:
    def ask(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _Asked(parser)

    sys.argv = [str(script)]
    with patch("bert_ds.launch.command_line._Parser.parse_args", ask):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except _Asked as asked:
            return asked.parser
    raise AssertionError(f"{script.name} has read no command line")


@contextmanager
def _as_found() -> Iterator[None]:
    """Leave this process as it was: scripts set their path and switch off the garbage collector while they start."""
    path, words = list(sys.path), list(sys.argv)
    with patch.dict(os.environ, {CALLED_BY: "bert-ds"}):
        try:
            yield
        finally:
            sys.path[:], sys.argv[:] = path, words
            gc.enable()
