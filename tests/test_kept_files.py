"""Files of a person's that lie in a folder of ours under a name that we write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from downstream_cases import PIECES
from tiny_training import join_alone

from bert_ds.basics.ranks import Ranks
from bert_ds.corpus.tokenizer.wordpiece import TextRules, WordPieceTokenizer
from bert_ds.downstream.tuning.outcome import write_predictions, write_results
from bert_ds.folders.kept_files import keeping_files
from bert_ds.folders.output_folders import claim_run_folder, open_run_folder
from bert_ds.reporting.environment import write_environment
from bert_ds.training.launch.run_folder import describe_run, write_tokenizer


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    open_run_folder(tmp_path / "run")
    return tmp_path / "run"


def write(folder: Path, *names: str, text: str = "ours") -> None:
    """Write files as a verb does."""
    with keeping_files(folder, names):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)


def kept(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.kept-*"))}


def test_what_we_wrote_is_written_again_and_what_a_person_put_there_is_kept(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "results.json").write_text("mine")
    for text in ("one", "two"):
        write(run_dir, "results.json", "a/b.tsv", text=text)
    assert kept(run_dir) == {"results.json.kept-1": "mine"}
    assert f"kept {run_dir}/results.json.kept-1: it lay where results.json is written" in capsys.readouterr().err
    (run_dir / "results.json").write_text("changed by hand")
    write(run_dir, "results.json")
    assert kept(run_dir) == {"results.json.kept-1": "mine", "results.json.kept-2": "changed by hand"}
    assert (run_dir / "results.json").read_text() == "ours"
    claim_run_folder(run_dir)


def test_what_is_equal_to_ours_is_no_second_file(run_dir: Path) -> None:
    (run_dir / "a").write_text("ours")
    write(run_dir, "a")
    assert kept(run_dir) == {}


def test_a_file_where_a_folder_goes_and_a_link_are_kept(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "predictions").write_text("mine")
    (tmp_path / "elsewhere").write_text("mine too")
    (run_dir / "results.json").symlink_to(tmp_path / "elsewhere")
    write(run_dir, "predictions/test/p.tsv", "predictions/test/q.tsv", "results.json")
    assert kept(run_dir) == {"predictions.kept-1": "mine", "results.json.kept-1": "mine too"}
    assert (tmp_path / "elsewhere").read_text() == "mine too"


def test_a_write_that_fails_leaves_a_persons_file_under_its_name(run_dir: Path) -> None:
    (run_dir / "a").write_text("mine")
    with pytest.raises(OSError, match="full"), keeping_files(run_dir, ["a"]):
        raise OSError("the disk is full")
    assert (run_dir / "a").read_text() == "mine" and kept(run_dir) == {}


def test_what_stands_in_a_folder_without_a_marker_is_somebody_elses(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write(tmp_path, "a", text=text)
    assert kept(tmp_path) == {"a.kept-1": "one"}


TOKENIZER = WordPieceTokenizer(PIECES, TextRules())
WRITERS: dict[str, tuple[tuple[str, ...], Callable[[Path], object]]] = {
    "description": (("run_config.json", "ds_config.json"), lambda run: describe_run(run, dict.fromkeys(_TWO, "{}"))),
    "tokenizer": (("tokenizer/vocab.txt",), lambda run: write_tokenizer(run, TOKENIZER.save)),
    "environment": (("environment.json",), lambda run: write_environment(run, Ranks(0, 0, 1), devices=[])),
    "predictions": (("predictions/test/p.tsv",), lambda run: write_predictions(run, "test", {"p.tsv": "x"})),
    "results": (("results.json",), lambda run: write_results(run, {})),
}
_TWO = ("run_config.json", "ds_config.json")


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_of_a_run_keeps_what_is_not_ours(run_dir: Path, name: str) -> None:
    join_alone()
    names, action = WRITERS[name]
    for one in names:
        (run_dir / one).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / one).write_text("mine")
    for _ in range(2):
        action(run_dir)
    assert kept(run_dir) == {f"{one}.kept-1": "mine" for one in names}
