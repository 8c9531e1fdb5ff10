"""The lines of metrics.jsonl, one at a time."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bert_ds.basics.input_gate import open_regular
from bert_ds.basics.ranks import DataError

MAX_LINE_BYTES = 1 << 20


def numbered_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and row of every whole line; DataError where a line is longer than any row."""
    with open_regular(path, error=DataError) as file:
        for line_number in itertools.count(1):
            line = file.readline(MAX_LINE_BYTES + 1)
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{path}:{line_number}: a line of more than {MAX_LINE_BYTES} bytes, wanted a row")
            if not line:
                return
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict):
                    yield line_number, row
