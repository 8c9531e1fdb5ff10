"""A docstring's prose: its paragraphs on one line each, without code, doctests, tables and markup.

What is dropped: doctests to the next blank line, fenced and literal blocks, directives other than admonitions, rules
and table rows, "name : type" lines, and paragraphs of fewer than five words or with less than four fifths letters.
"""

from __future__ import annotations

import inspect
import re

MIN_WORDS = 5
MIN_LETTER_FRACTION = 0.8

_FENCE = re.compile(r"```|~~~")
_RULE_OR_ROW = re.compile(r"[-=~^*+#_.:'\"`|\s]{3,}|\|.*|.*\|")
_DIRECTIVE = re.compile(r"\.\. *(?P<name>[\w-]*)(?P<marker>::)?(?P<rest>.*)")
_ADMONITIONS = frozenset(("note", "warning", "tip", "important", "caution", "seealso", "admonition", "hint"))
_TYPED_NAME = re.compile(r"[\w*., ]+ : \S.*|[\w*., ]{1,40} :")
_BULLET = re.compile(r"(?:[-*+•]|\(?\d{1,2}[.)]|#\.)\s+")
_FIELD = re.compile(r"(?::\w+(?: [^:]*)?:|@\w+(?: \w+:)?)\s*")
_ARGUMENT = re.compile(r"[*`]*\w+[`]* *(?:\([^)]*\))?: ")
_ROLE = re.compile(r"(?::[\w.+-]+)+:`[~!]?([^`<]*?)\s*(?:<[^>`]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^>`]*>`__?|\[([^\]]+)\]\([^)]*\)")
_NOT_LETTERS = re.compile(r"[^\w ]+|[\d_]+")
_MARKS = re.compile(r"`+|\*\*|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)")


def prose_of(docstring: str) -> list[str]:
    """Return the prose paragraphs of a docstring in order, one string without line ends each."""
    reader = _Reader()
    for line in inspect.cleandoc(docstring).split("\n"):
        reader.take(line)
    reader.end_paragraph()
    return reader.paragraphs


class _Reader:
    """Line by line: what is being skipped, and the paragraph being collected."""

    def __init__(self) -> None:
        self.paragraphs: list[str] = []
        self._lines: list[str] = []
        self._indent = 0
        self._in_fence = False
        self._in_doctest = False
        self._skip_deeper_than: int | None = None

    def take(self, line: str) -> None:
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if self._skips(text, indent):
            return
        if not text:
            self.end_paragraph()
        elif _FENCE.match(text) or text.startswith(">>>") or text.startswith(".."):
            self.end_paragraph()
            self._start_skipping(text, indent)
        elif _RULE_OR_ROW.fullmatch(text) or _TYPED_NAME.fullmatch(text):
            self.end_paragraph()
        else:
            self._add(text, indent)

    def end_paragraph(self) -> None:
        if self._lines:
            text = _without_marks(" ".join(self._lines))
            self._lines = []
            if _is_prose(text):
                self.paragraphs.append(text)

    def _skips(self, text: str, indent: int) -> bool:
        if self._in_fence:
            self._in_fence = not _FENCE.match(text)
            return True
        if self._in_doctest:
            self._in_doctest = bool(text)
            return True
        if self._skip_deeper_than is not None:
            if not text or indent > self._skip_deeper_than:
                return True
            self._skip_deeper_than = None
        return False

    def _start_skipping(self, text: str, indent: int) -> None:
        if text.startswith(">>>"):
            self._in_doctest = True
        elif _FENCE.match(text):
            self._in_fence = True
        else:
            directive = _DIRECTIVE.match(text)
            if directive is None or directive["name"] not in _ADMONITIONS:
                self._skip_deeper_than = indent

    def _add(self, text: str, indent: int) -> None:
        begins = _BULLET.match(text) or _FIELD.match(text)
        if self._lines and (begins or indent < self._indent or _ARGUMENT.match(text)):
            self.end_paragraph()
        self._indent = indent
        self._lines.append(text[begins.end() :] if begins else text)
        if text.endswith("::"):
            self._lines[-1] = self._lines[-1].removesuffix(":")
            self.end_paragraph()
            self._skip_deeper_than = indent
        elif text.endswith(":"):
            self.end_paragraph()


def _without_marks(text: str) -> str:
    if "`" in text or "*" in text or "](" in text:
        text = _ROLE.sub(r"\1", text)
        text = _LINK.sub(lambda match: match.group(1) or match.group(2), text)
        text = _MARKS.sub("", text)
    return " ".join(text.split())


def _is_prose(text: str) -> bool:
    if text.count(" ") + 1 < MIN_WORDS:
        return False
    return len(_NOT_LETTERS.sub("", text)) >= MIN_LETTER_FRACTION * len(text)
