"""Entering a run folder, on two real ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ranks_harness import run_ranks

from bert_ds.basics.ranks import CheckpointError, DataError
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.folders.output_folders import MARKER
from bert_ds.training.agreement import on_main_rank
from bert_ds.training.launch.run_folder import (
    enter_run_folder,
    prove_same_files,
    refuse_foreign_folders,
    write_tokenizer,
)


def scenarios(rank: int, world_size: int, folder: str) -> dict[str, str]:
    """Messages of what went wrong on this rank, by scenario."""
    root, said = Path(folder), {}

    def attempt(name: str, error: type[Exception], action: object) -> None:
        try:
            action()  # type: ignore[operator]
            said[name] = "fine"
        except error as found:
            said[name] = str(found)

    shared, own = root / "shared", root / f"own{rank}"
    attempt("shared", DataError, lambda: enter_run_folder(shared, {"run_config.json": "{}\n"}, resume="never"))
    attempt("unshared", DataError, lambda: enter_run_folder(own, {"run_config.json": "{}\n"}, resume="never"))
    own.mkdir(exist_ok=True)
    (own / "manifest.json").write_text(f"rank {rank}")
    attempt("different", DataError, lambda: prove_same_files([own / "manifest.json"]))
    (shared / "checkpoints/global_step3").mkdir(parents=True, exist_ok=True)
    attempt("occupied", ConfigError, lambda: enter_run_folder(shared, {"run_config.json": "x"}, resume="never"))
    attempt("done", CheckpointError, lambda: enter_run_folder(root / "done", {"a.json": "1"}, resume="auto"))
    attempt("foreign", ConfigError, lambda: refuse_foreign_folders([root / "seed_1", root / "foreign"]))
    attempt("foreign hf", ConfigError, lambda: refuse_foreign_folders([root / "with_hf"], export="hf"))
    attempt("foreign entered", ConfigError, lambda: enter_run_folder(root / "foreign", {"a.json": "1"}, resume="auto"))
    attempt("disk", DataError, lambda: on_main_rank(lambda: (root / "gone/file").write_text("x") and None))
    attempt("raised on rank 0", DataError, lambda: on_main_rank(fail))
    said["value of rank 0"] = str(on_main_rank(lambda: rank))
    said["left"] = f"{os.listdir(root / 'foreign')} {(root / 'foreign/run.lock').read_text()}"
    said["config"] = (shared / "run_config.json").read_text()
    return said


def test_a_foreign_folder_is_refused_on_every_rank_and_left_as_it_is(said: list[dict[str, str]]) -> None:
    assert all("foreign holds 'run.lock', which is not ours" in rank["foreign"] for rank in said)
    assert all("foreign holds 'run.lock', which is not ours" in rank["foreign entered"] for rank in said)
    assert all("with_hf/hf holds 'mine', which is not ours" in rank["foreign hf"] for rank in said)
    assert said[0]["left"] == "['run.lock'] mine"


def test_a_file_that_rank_0_cannot_write_is_told_on_every_rank(said: list[dict[str, str]]) -> None:
    assert all("gone/file cannot be read or written: No such file" in rank["disk"] for rank in said)


def fail() -> None:
    raise DataError("the text is gone")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("run")
    for name in ("foreign/run.lock", "with_hf/hf/mine"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
    (folder / "done").mkdir()
    (folder / "done/DONE").touch()
    for name in ("with_hf", "done"):
        (folder / name / MARKER).write_text('{"bert_ds_folder": "run"}')
    return run_ranks(scenarios, 2, str(folder))


def test_ranks_that_share_the_folder_enter_it(said: list[dict[str, str]]) -> None:
    assert [rank["shared"] for rank in said] == ["fine", "fine"]


def test_a_rank_that_does_not_see_the_folder_is_named_on_every_rank(said: list[dict[str, str]]) -> None:
    for rank in said:
        assert rank["unshared"].startswith("rank 1 does not see")
        assert "run_config.json" in rank["unshared"]


def test_a_rank_that_sees_another_file_is_named_on_every_rank(said: list[dict[str, str]]) -> None:
    assert all(rank["different"].startswith("rank 1 reads other bytes from") for rank in said)


def test_a_folder_with_checkpoints_is_refused_and_left_as_it_is(said: list[dict[str, str]]) -> None:
    assert all("--resume auto continues it" in rank["occupied"] for rank in said)
    assert said[0]["config"] == "{}\n"


def test_a_run_that_is_done_and_has_no_checkpoint_is_refused(said: list[dict[str, str]]) -> None:
    assert all("done is marked DONE but holds no checkpoint" in rank["done"] for rank in said)


def test_the_tokenizer_of_checkpoints_stays_as_it_is(tmp_path: Path) -> None:
    saved: list[Path] = []
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path, saved.append)
    (tmp_path / "checkpoints/global_step2").mkdir(parents=True)
    write_tokenizer(tmp_path, saved.append)
    assert saved == [tmp_path / "tokenizer"]


def test_what_rank_0_raises_is_raised_everywhere_and_what_it_returns_is_returned(said: list[dict[str, str]]) -> None:
    assert [rank["raised on rank 0"] for rank in said] == ["the text is gone", "the text is gone"]
    assert [rank["value of rank 0"] for rank in said] == ["0", "0"]
