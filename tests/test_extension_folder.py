"""The folder that tests compile into."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from extension_folder import drop_stale_locks, use_own_extensions

USER = "import sys, time; from pathlib import Path; from extension_folder import drop_stale_locks as drop"
USER += "; drop(Path(sys.argv[1])); print('in use', flush=True); time.sleep(600)"


def test_a_lock_that_a_killed_compiler_has_left_goes_unless_somebody_may_hold_it(tmp_path: Path) -> None:
    lock = tmp_path / "cpu_adam/lock"
    lock.parent.mkdir()
    command, here = [sys.executable, "-c", USER, tmp_path], Path(__file__).parent
    with subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "in use\n"
        lock.touch()
        drop_stale_locks(tmp_path)
        assert lock.exists()
        other.kill()
    subprocess.run(
        [sys.executable, "-c", USER.partition("; print")[0], tmp_path], cwd=Path(__file__).parent, check=True
    )
    assert lock.exists(), "this process still uses the folder"


def test_a_lock_goes_when_nobody_is_left(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    drop_stale_locks(tmp_path)
    assert not (tmp_path / "lock").exists()


def test_a_folder_that_was_chosen_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert use_own_extensions() == tmp_path
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert use_own_extensions().parent.name.startswith("bert-ds-tests-")
