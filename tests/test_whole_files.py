"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from bert_ds.basics.whole_files import write_json, write_text


def test_a_json_file_is_replaced_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 2}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    write_text(tmp_path / "link", "new")
    assert ((tmp_path / "other").read_text(), (tmp_path / "link").is_symlink()) == ("mine", False)


def test_a_disk_that_is_full_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "a", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "a", "new", temporary=tmp_path / "a.partial")
    assert ((tmp_path / "a").read_text(), os.listdir(tmp_path)) == ("old", ["a"])


@pytest.mark.parametrize("synced", [True, False])
def test_the_content_is_on_the_disk_before_it_has_the_name_where_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synced: bool
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(os.listdir(tmp_path)))
    write_text(tmp_path / "a", "new", temporary=tmp_path / "a.partial", synced=synced)
    assert seen == ([["a.partial"]] if synced else [])
