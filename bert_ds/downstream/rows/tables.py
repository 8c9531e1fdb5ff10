"""Tables as text, one row a line and columns between tabs, whatever the cells hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_ESCAPES = str.maketrans(
    {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
    | {character: f"\\u{ord(character):04x}" for character in "\0\v\f\x1c\x1d\x1e\x85\u2028\u2029"}
)
"""What would end a cell or a line for some reader; JSON's escapes."""
_FORMULA_BEGINS = ("=", "+", "-", "@", "'")


def cell(text: str) -> str:
    """Return a cell from which the text can be read back: tabs, line ends and backslashes are escaped as in JSON."""
    return text.translate(_ESCAPES)


def spreadsheet_cell(text: str) -> str:
    """Return a cell that a spreadsheet takes for text: one that would be a formula, or begins with ', gets a ' before.

    Numbers are left alone.
    """
    return cell(f"'{text}" if text.startswith(_FORMULA_BEGINS) and not _is_number(text) else text)


def table_text(rows: Iterable[Sequence[str]]) -> str:
    """Return lines of cells that are escaped already."""
    return "".join("\t".join(row) + "\n" for row in rows)


def predictions_text(rows: Iterable[tuple[str, str]]) -> str:
    """Return predictions as GLUE takes them: index, tab, prediction."""
    return table_text([("index", "prediction"), *((cell(index), cell(found)) for index, found in rows)])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii()
