"""Ask pip-audit for known vulnerabilities of what is installed, as part of make check.

    .venv/bin/python .ci/audit.py [--report FILE]

Exit code 1 and a list where there is one that audit_exceptions.json does not excuse. Where the vulnerability service
cannot be asked (no network, a registry without one) one line says so and the check passes: nothing is claimed then.
An exception names id, reason and the day until which it holds; after that day it excuses nothing.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMAND = (sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--timeout", "10")
EXCEPTIONS = Path(__file__).with_name("audit_exceptions.json")
LONGEST_S = 300


def main() -> int:
    if sys.argv[1:2] == ["--report"]:
        text = Path(sys.argv[2]).read_text(encoding="utf-8")
    else:
        text = run_pip_audit()
    try:
        packages = json.loads(text)["dependencies"]
    except (ValueError, KeyError, TypeError):
        said = text.strip().splitlines() or ["it said nothing"]
        print(f"audit: skipped, pip-audit could not do its work: {said[-1]}")
        return 0
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        print(f"audit: skipped, the vulnerability service knows none of {len(packages)} packages or cannot be reached")
        return 0
    lines = unexcused(audited, read_exceptions(datetime.date.today()))
    print(f"audit: {len(audited)} of {len(packages)} packages audited, {len(lines)} vulnerabilities")
    print("".join(f"    {line}\n" for line in lines), end="")
    return 1 if lines else 0


def run_pip_audit() -> str:
    """Return pip-audit's JSON report, or what it said instead."""
    try:
        done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer in {LONGEST_S} s"
    return done.stdout or done.stderr


def read_exceptions(today: datetime.date) -> set[str]:
    """Return the ids that are excused today; an exception without id, reason and last day is an error."""
    excused = set()
    for exception in json.loads(EXCEPTIONS.read_text(encoding="utf-8")):
        if set(exception) != {"id", "reason", "until"} or not exception["reason"].strip():
            raise SystemExit(f"audit: {EXCEPTIONS.name}: {exception}: wanted id, reason and until")
        if datetime.date.fromisoformat(exception["until"]) >= today:
            excused.add(exception["id"])
    return excused


def unexcused(packages: list[dict[str, Any]], excused: set[str]) -> list[str]:
    """Return one line per vulnerability of which neither the id nor an alias is excused."""
    return [
        f"{package['name']} {package['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'none'}"
        for package in packages
        for found in package["vulns"]
        if not excused & {found["id"], *found.get("aliases", ())}
    ]


if __name__ == "__main__":
    sys.exit(main())
