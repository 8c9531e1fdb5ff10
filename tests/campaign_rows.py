"""Rows of results that a campaign appends as it goes, so that it can be stopped and taken up again."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from extension_folder import use_own_extensions

use_own_extensions()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return what has been recorded so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Print a row and append it."""
    print(json.dumps(row), flush=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def commit_of(tree: Path) -> str:
    """Return the short name of the commit of a checkout."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, cwd=tree, capture_output=True, text=True, check=True).stdout.strip()
