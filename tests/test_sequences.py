from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_fixtures import counting_documents, open_train, random_documents, write_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import SequenceConfig
from bert_ds.corpus.batches import sequences
from bert_ds.corpus.batches.sequences import ExampleTable, build_examples, target_lengths
from bert_ds.corpus.shards.shard_folder import ShardSplit, open_shards

document_lengths = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=2, max_size=8)
configs = st.builds(
    SequenceConfig,
    max_seq_length=st.integers(8, 40),
    sentence_pair=st.sampled_from(["nsp", "sop", "none"]),
    short_seq_prob=st.sampled_from([0.0, 0.5, 1.0]),
)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def build(split: ShardSplit, config: SequenceConfig, seed: int = 0) -> ExampleTable:
    return build_examples(split, config, seed=seed, cache_dirs=(split.folder,))


def one_by_one(units: list[int], document_ends: list[int], targets: list[int]) -> list[int]:
    """Starts of greedy runs, found the slow way: units counted in tokens, documents in units."""
    starts, unit = [], 0
    for end in document_ends:
        while unit < end:
            starts.append(unit)
            total, target = units[unit], targets[unit]
            unit += 1
            while unit < end and total + units[unit] <= target:
                total += units[unit]
                unit += 1
    return starts


@quick
@given(document_lengths, configs, st.integers(0, 3))
def test_runs_are_those_of_the_greedy_rule_one_by_one(
    tmp_path: Path, lengths: list[list[int]], config: SequenceConfig, seed: int
) -> None:
    table = build(open_train(tmp_path, counting_documents(lengths)), config, seed)
    targets = target_lengths(table.unit_tokens[:-1], config, seed=seed).tolist()
    starts = one_by_one(np.diff(table.unit_tokens).tolist(), table.document_units[1:].tolist(), targets)
    assert table.example_units.tolist() == [*starts, len(targets)]


@quick
@given(document_lengths, configs)
def test_every_token_lies_in_exactly_one_example_that_fits(
    tmp_path: Path, lengths: list[list[int]], config: SequenceConfig
) -> None:
    table = build(open_train(tmp_path, counting_documents(lengths)), config)
    counts = table.token_counts()
    assert counts.sum() == sum(map(sum, lengths))
    assert counts.min() >= 1
    assert counts.max() <= config.max_seq_length - (2 if config.sentence_pair == "none" else 3)


@quick
@given(document_lengths, configs)
def test_every_document_starts_an_example(tmp_path: Path, lengths: list[list[int]], config: SequenceConfig) -> None:
    table = build(open_train(tmp_path, counting_documents(lengths)), config)
    assert set(table.document_units.tolist()) <= set(table.example_units.tolist())
    assert table.unit_tokens[table.document_units].tolist() == np.cumsum([0, *map(sum, lengths)]).tolist()


def test_a_run_ends_before_the_sentence_that_does_not_fit(tmp_path: Path) -> None:
    split = open_train(tmp_path, counting_documents([[4, 5, 3, 9, 1], [2]]))
    table = build(split, SequenceConfig(max_seq_length=12, sentence_pair="none", short_seq_prob=0.0))
    assert table.token_counts().tolist() == [9, 3, 10, 2]


def test_a_long_sentence_is_cut_and_its_rest_begins_the_next_run(tmp_path: Path) -> None:
    split = open_train(tmp_path, counting_documents([[2, 23, 4], [1]]))
    table = build(split, SequenceConfig(max_seq_length=12, sentence_pair="none", short_seq_prob=0.0))
    assert table.token_counts().tolist() == [2, 10, 10, 7, 1]


def test_across_documents_each_border_inside_a_run_costs_one_token(tmp_path: Path) -> None:
    split = open_train(tmp_path, counting_documents([[4], [4], [1], [1, 8]]))
    config = SequenceConfig(max_seq_length=12, sentence_pair="none", short_seq_prob=0.0, cross_documents=True)
    assert build(split, config).token_counts().tolist() == [8, 2, 8]


def test_short_targets_come_with_their_probability_and_cover_their_range() -> None:
    config = SequenceConfig(max_seq_length=20, sentence_pair="none", short_seq_prob=0.1)
    targets = target_lengths(np.arange(100_000), config, seed=0)
    is_short = targets < 18
    assert set(targets.tolist()) == set(range(2, 19))
    # A short target is 18 once in 17: 0.1 x 16/17 of the draws are below, with 4 standard deviations around.
    assert abs(is_short.mean() - 0.1 * 16 / 17) < 4 * (0.09 / 100_000) ** 0.5


def test_another_seed_gives_other_examples(tmp_path: Path) -> None:
    split = open_train(tmp_path, random_documents(20))
    config = SequenceConfig(max_seq_length=64, short_seq_prob=0.5)
    assert build(split, config, 0).example_units.tolist() != build(split, config, 1).example_units.tolist()


def test_runs_do_not_depend_on_the_chunks_they_are_found_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_train(tmp_path, random_documents(20))
    whole = build(split, SequenceConfig())
    monkeypatch.setattr(sequences, "_CHUNK_SENTENCES", 5)
    parts = build(split, SequenceConfig())
    assert len(list(tmp_path.glob("examples-*.npy"))) == 2
    assert parts.unit_tokens.tolist() == whole.unit_tokens.tolist()
    assert parts.example_units.tolist() == whole.example_units.tolist()
    assert parts.document_units.tolist() == whole.document_units.tolist()


def test_the_cache_is_read_and_not_written_again(tmp_path: Path) -> None:
    split = open_train(tmp_path, random_documents(5))
    first = build(split, SequenceConfig())
    (path,) = tmp_path.glob("examples-*.npy")
    before = path.stat()
    assert build(split, SequenceConfig()).example_units.tolist() == first.example_units.tolist()
    assert path.stat() == before


@pytest.mark.parametrize("position", [128, 168, 200, -1])
def test_a_damaged_cache_is_built_again(tmp_path: Path, position: int) -> None:
    split = open_train(tmp_path, random_documents(5))
    expected = build(split, SequenceConfig()).example_units.tolist()
    (path,) = tmp_path.glob("examples-*.npy")
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    assert build(split, SequenceConfig()).example_units.tolist() == expected
    assert path.read_bytes() != bytes(content)


def test_a_truncated_cache_is_built_again(tmp_path: Path) -> None:
    split = open_train(tmp_path, random_documents(5))
    expected = build(split, SequenceConfig()).example_units.tolist()
    (path,) = tmp_path.glob("examples-*.npy")
    path.write_bytes(path.read_bytes()[:-16])
    assert build(split, SequenceConfig()).example_units.tolist() == expected


def test_other_shards_never_use_this_cache(tmp_path: Path) -> None:
    build(open_train(tmp_path, random_documents(5, seed=1)), SequenceConfig())
    other = build(open_train(tmp_path, random_documents(5, seed=2)), SequenceConfig())
    assert other.token_counts().sum() == other.split.num_tokens


def test_processes_that_race_leave_one_whole_cache(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, random_documents(30))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        counts = pool.map(_count_examples, [folder] * 8)
    assert len(set(counts)) == 1
    assert [path.name[:9] for path in tmp_path.iterdir() if "examples" in path.name] == ["examples-"]


def test_a_folder_that_cannot_be_written_falls_back_to_the_next(tmp_path: Path) -> None:
    split = open_train(tmp_path / "shards", random_documents(5))
    (tmp_path / "file").touch()
    table = build_examples(split, SequenceConfig(), seed=0, cache_dirs=(tmp_path / "file/x", tmp_path / "cache"))
    assert table.num_examples > 0
    assert len(list((tmp_path / "cache").glob("examples-*.npy"))) == 1


def test_no_writable_folder_is_an_error_that_names_them(tmp_path: Path) -> None:
    split = open_train(tmp_path / "shards", random_documents(5))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/x: .*writable cache folder"):
        build_examples(split, SequenceConfig(), seed=0, cache_dirs=(tmp_path / "file/x",))


def test_next_sentences_of_a_single_document_are_refused(tmp_path: Path) -> None:
    split = open_train(tmp_path, [[[5, 6], [7]]])
    with pytest.raises(DataError, match="at least 2 documents"):
        build(split, SequenceConfig(sentence_pair="nsp"))


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    split = open_shards(write_shards(tmp_path, [[[5, 6]]]), "validation")
    with pytest.raises(DataError, match="holds no token"):
        build(split, SequenceConfig(sentence_pair="none"))


def _count_examples(folder: Path) -> int:
    return build(open_shards(folder, "train"), SequenceConfig()).num_examples


@pytest.mark.parametrize(
    ("changes", "seed"),
    [
        ({"max_seq_length": 48}, 0),
        ({"short_seq_prob": 0.9}, 0),
        ({"sentence_pair": "none"}, 0),
        ({"sentence_pair": "none", "cross_documents": True}, 0),
        ({"whole_sentences": False}, 0),
        ({}, 1),
    ],
)
def test_the_cache_of_other_settings_is_not_taken(changes: dict[str, Any], seed: int, tmp_path: Path) -> None:
    config: dict[str, Any] = {"max_seq_length": 64, "short_seq_prob": 0.5, "sentence_pair": "nsp"}
    split = open_train(tmp_path, random_documents(20))
    if changes.get("cross_documents"):
        config["sentence_pair"] = "none"
    if "whole_sentences" in changes:
        config |= {"sentence_pair": "none", "short_seq_prob": 0.0}
    before = build(split, SequenceConfig(**config), 0).example_units.tolist()
    other = SequenceConfig(**{**config, **changes})
    alone = build_examples(split, other, seed=seed, cache_dirs=(tmp_path / "alone",)).example_units.tolist()
    assert build(split, other, seed).example_units.tolist() == alone != before
