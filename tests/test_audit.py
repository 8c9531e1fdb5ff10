"""The dependency audit: what it fails on, what it excuses, and that it claims nothing where it could not ask."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

AUDIT = Path(__file__).resolve().parents[1] / ".ci/audit.py"
FOUND = {
    "name": "torch",
    "version": "2.5.1",
    "vulns": [{"id": "PYSEC-2025-41", "aliases": ["CVE-2025-32434"], "fix_versions": ["2.6.0"], "description": ""}],
}
CLEAN = {"name": "numpy", "version": "2.4.6", "vulns": []}
SKIPPED = {"name": "bert-ds", "skip_reason": "Dependency not found on PyPI"}


def audit(folder: Path, report: Any, exceptions: Any = ()) -> subprocess.CompletedProcess[str]:
    script = shutil.copy(AUDIT, folder)
    (folder / "audit_exceptions.json").write_text(json.dumps(list(exceptions)))
    (folder / "report.json").write_text(report if isinstance(report, str) else json.dumps({"dependencies": report}))
    command = [sys.executable, script, "--report", folder / "report.json"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_known_vulnerability_fails_with_its_name_and_the_version_that_mends_it(tmp_path: Path) -> None:
    found = audit(tmp_path, [FOUND, CLEAN, SKIPPED])
    assert found.returncode == 1
    assert found.stdout.splitlines() == [
        "audit: 2 of 3 packages audited, 1 vulnerabilities",
        "    torch 2.5.1: PYSEC-2025-41, mended in 2.6.0",
    ]


@pytest.mark.parametrize(("until", "code"), [("2999-01-01", 0), ("2001-01-01", 1)])
def test_a_reviewed_exception_excuses_until_its_last_day(tmp_path: Path, until: str, code: int) -> None:
    exception = {"id": "CVE-2025-32434", "reason": "every load is weights_only behind a manifest", "until": until}
    assert audit(tmp_path, [FOUND], [exception]).returncode == code


def test_an_exception_without_a_reason_is_an_error(tmp_path: Path) -> None:
    found = audit(tmp_path, [FOUND], [{"id": "CVE-2025-32434", "reason": " ", "until": "2999-01-01"}])
    assert found.returncode == 1 and "wanted id, reason and until" in found.stderr


@pytest.mark.parametrize("report", [[SKIPPED, SKIPPED], "Connection refused", ""], ids=range(3))
def test_where_nothing_could_be_asked_one_line_says_skipped(tmp_path: Path, report: Any) -> None:
    found = audit(tmp_path, report)
    assert found.returncode == 0 and found.stdout.startswith("audit: skipped") and len(found.stdout.splitlines()) == 1
