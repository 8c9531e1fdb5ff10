from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from corpus_fixtures import counting_documents, random_documents, tiny_tokenizer, write_shards

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.basics.processes import STOP_SIGNALS
from bert_ds.basics.ranks import DataError
from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.configuration.recipe.run_config import MaskingConfig, SequenceConfig
from bert_ds.corpus.batches.batch_stages import DataSettings
from bert_ds.corpus.batches.loader import PretrainingData, Source
from bert_ds.corpus.shards.build import BuildSettings, build_shards
from bert_ds.corpus.text.input_files import find_input_files
from bert_ds.corpus.text.text_input import FileInput

Sequence = tuple[tuple[int, ...], ...]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), random_documents(60), random_documents(9, seed=1))


@pytest.fixture(scope="module")
def more_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("more"), random_documents(20, seed=2), random_documents(5, seed=3))


def open_data(
    *folders: Path,
    weights: tuple[float, ...] = (1.0, 1.0),
    sequences: SequenceConfig | None = None,
    masking: MaskingConfig | None = None,
    seed: int = 0,
    train_batch_size: int = 16,
) -> PretrainingData:
    sources = [Source(folder, f"s{index}", weights[index]) for index, folder in enumerate(folders)]
    config = sequences or SequenceConfig(max_seq_length=64)
    settings = DataSettings(config, masking or MaskingConfig(), seed, train_batch_size)
    return PretrainingData(sources, folders[0] / "tokenizer", settings=settings)


def read(
    data: PretrainingData,
    num_steps: int,
    *,
    start: int = 0,
    world: tuple[int, int] = (0, 1),
    micro: int = 4,
    workers: int = 0,
):
    rank, world_size = world
    split = BatchSplit(micro, data._settings.train_batch_size // (micro * world_size), world_size)
    batches = data.step_batches(start, rank=rank, split=split, num_workers=workers)
    return list(islice(batches, num_steps))


def sequences_of(batches: Iterable[MicroBatch]) -> list[Sequence]:
    """Everything the model sees of each sequence, sorted, however the sequences were dealt."""
    found = []
    for batch in batches:
        words = (batch.targets[name].tolist() for name in ("masked_positions", "masked_labels"))
        targets = dict(zip(*words, strict=True))
        bounds = batch.cu_seqlens.tolist()
        for row, (start, stop) in enumerate(pairwise(bounds)):
            found.append(
                (
                    tuple(batch.example_ids[row].tolist()),
                    tuple(batch.input_ids_T[start:stop].tolist()),
                    tuple(batch.token_type_ids_T[start:stop].tolist()),
                    tuple(targets.get(position, -1) for position in range(start, stop)),
                    (int(batch.targets["pair_labels"][row]),),
                )
            )
    return sorted(found)


def restored_words(batches: list[MicroBatch]) -> list[int]:
    """Ids of the text with the masks undone."""
    words = []
    for batch in batches:
        ids = batch.input_ids_T.clone()
        ids[batch.targets["masked_positions"]] = batch.targets["masked_labels"]
        words += [word for word in ids.tolist() if word > 4]
    return words


@pytest.mark.parametrize(("world_size", "micro"), [(1, 4), (2, 4), (4, 4), (2, 2), (8, 1)])
def test_a_step_is_the_same_however_it_is_spread(shards: Path, more_shards: Path, world_size: int, micro: int) -> None:
    data = open_data(shards, more_shards, weights=(1.0, 2.5))
    whole = read(data, 3, micro=16)
    parts = [read(data, 3, world=(rank, world_size), micro=micro) for rank in range(world_size)]
    for step in range(3):
        spread = [batch for rank in range(world_size) for batch in parts[rank][step]]
        assert len(spread) == 16 // micro
        assert {batch.num_sequences for batch in spread} == {micro}
        assert sequences_of(spread) == sequences_of(whole[step])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(shards: Path, workers: int) -> None:
    data = open_data(shards)
    alone, helped = read(data, 7), read(data, 7, workers=workers)
    for step in range(7):
        for one, other in zip(alone[step], helped[step], strict=True):
            assert one.input_ids_T.tolist() == other.input_ids_T.tolist()
            assert one.targets["masked_positions"].tolist() == other.targets["masked_positions"].tolist()
            assert one.example_ids.tolist() == other.example_ids.tolist()


def test_a_resumed_run_reads_what_the_uninterrupted_one_read(shards: Path) -> None:
    long = read(open_data(shards), 60)
    resumed = read(open_data(shards), 3, start=57, world=(0, 2), workers=1)
    other_rank = read(open_data(shards), 3, start=57, world=(1, 2))
    for step in range(3):
        assert sequences_of([*resumed[step], *other_rank[step]]) == sequences_of(long[57 + step])


def test_an_epoch_over_built_shards_is_the_text_itself(tmp_path: Path) -> None:
    documents = counting_documents([[3, 20, 7], [40], [1, 1, 9], [30, 12]] * 5)
    lines = [[" ".join(f"w{word}" for word in sentence) for sentence in document] for document in documents]
    (tmp_path / "text.txt").write_text("\n\n".join("\n".join(document) for document in lines))
    tiny_tokenizer().save(tmp_path / "tokenizer")
    text = FileInput(find_input_files([tmp_path / "text.txt"]).files)
    settings = BuildSettings(validation_fraction=0.3, tokens_per_shard=50)
    build_shards(text, tmp_path / "tokenizer", tmp_path / "shards", settings=settings)

    sequences = SequenceConfig(max_seq_length=32, sentence_pair="none")
    data = open_data(tmp_path / "shards", sequences=sequences, train_batch_size=1)
    epoch = [batch for step in read(data, data.mixture.epoch_size, micro=1) for batch in step]
    held_out = list(data.evaluation_batches(10**6, batch_size=8, rank=0, world_size=1))
    words = [restored_words(batches) for batches in (epoch, held_out)]
    assert sorted(words[0] + words[1]) == list(range(5, 5 + 615))
    assert words[0] and words[1]


def test_an_epoch_shows_every_example_once_and_the_next_one_differs(shards: Path) -> None:
    data = open_data(shards, train_batch_size=1)
    size = data.mixture.epoch_size
    steps = read(data, 2 * size, micro=1)
    ids = [step[0].example_ids[0].tolist() for step in steps]
    assert sorted(ids) == [[0, epoch, example] for epoch in range(2) for example in range(size)]
    seen = [sequences_of(step)[0][1] for step in steps]
    assert len(set(seen[:size]) & set(seen[size:])) < 0.2 * size


def test_reading_leaves_the_random_state_of_the_run_alone(shards: Path) -> None:
    before = torch.get_rng_state()
    read(open_data(shards), 2, workers=1)
    assert torch.equal(before, torch.get_rng_state())


def test_micro_batches_of_a_step_hold_equal_counts_and_similar_tokens(shards: Path) -> None:
    (step,) = read(open_data(shards, train_batch_size=128), 1, micro=16)
    assert {batch.num_sequences for batch in step} == {16}
    tokens = [batch.num_tokens for batch in step]
    assert max(tokens) / (sum(tokens) / len(tokens)) < 1.02


def test_a_batch_size_that_does_not_divide_is_refused(shards: Path) -> None:
    with pytest.raises(ValueError, match="is not one of train_batch_size 16"):
        read(open_data(shards), 1, world=(0, 2), micro=3)


def test_shards_of_another_tokenizer_are_refused(shards: Path, tmp_path: Path) -> None:
    foreign = write_shards(tmp_path, random_documents(4), tokenizer=tiny_tokenizer(994))
    with pytest.raises(DataError, match=r"manifest\.json.*tokenizer"):
        open_data(shards, foreign)


def test_two_sources_of_one_name_are_refused(shards: Path) -> None:
    settings = DataSettings(SequenceConfig(), MaskingConfig(), 0, 16)
    with pytest.raises(ValueError, match="every name once"):
        PretrainingData([Source(shards, "a"), Source(shards, "a")], shards / "tokenizer", settings=settings)


def test_sources_are_counted_over_all_ranks(shards: Path, more_shards: Path) -> None:
    data = open_data(shards, more_shards, weights=(1.0, 0.5))
    steps = read(data, 8, start=2)
    counts = data.source_counts(2, 10)
    for source, name in enumerate(("s0", "s1")):
        own = [one for step in steps for one in sequences_of(step) if one[0][0] == source]
        assert counts[name] == (len(own), sum(len(one[1]) for one in own))


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 32), (1, 7), (2, 4), (3, 4), (3, 32)])
def test_evaluation_is_spread_over_the_ranks_without_an_empty_batch(
    shards: Path, more_shards: Path, world_size: int, batch_size: int
) -> None:
    data = open_data(shards, more_shards)
    whole = list(data.evaluation_batches(20, batch_size=64, rank=0, world_size=1))
    ranks = [
        list(data.evaluation_batches(20, batch_size=batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    everything = [batch for batches in ranks for batch in batches]
    assert {batch.num_sequences for batch in everything} <= set(range(1, batch_size + 1))
    assert sequences_of(everything) == sequences_of(whole)
    assert sum(batch.num_sequences for batch in whole) == 20


def test_evaluation_batches_of_one_leave_out_what_does_not_go_round(shards: Path) -> None:
    ranks = [list(open_data(shards).evaluation_batches(8, batch_size=1, rank=rank, world_size=3)) for rank in range(3)]
    assert [[batch.num_sequences for batch in batches] for batches in ranks] == [[1, 1]] * 3


def test_evaluation_does_not_depend_on_the_seed_of_the_run(shards: Path) -> None:
    first, second = (
        sequences_of(open_data(shards, seed=seed).evaluation_batches(12, batch_size=4, rank=0, world_size=1))
        for seed in (0, 1)
    )
    assert first == second


def test_evaluation_takes_what_there_is(shards: Path) -> None:
    batches = list(open_data(shards).evaluation_batches(10**6, batch_size=32, rank=0, world_size=1))
    ids = [one[0] for one in sequences_of(batches)]
    assert len(ids) == len(set(ids)) > 9


def test_fewer_validation_examples_than_ranks_are_an_error(shards: Path) -> None:
    with pytest.raises(DataError, match="3 validation examples are too few for 4 ranks"):
        list(open_data(shards).evaluation_batches(3, batch_size=2, rank=0, world_size=4))


def test_no_batch_is_longer_than_the_longest(shards: Path) -> None:
    data = open_data(shards)
    longest = data.longest_batch(4)
    assert longest.num_tokens == longest.padded_tokens == 4 * 64
    assert longest.counts == {"masked_words": 4 * 10.0, "sentence_pair": 4.0, "tokens": float(longest.num_tokens)}
    for step in read(data, 30):
        assert all(batch.num_tokens <= longest.num_tokens for batch in step)
        assert all(batch.counts["masked_words"] <= longest.counts["masked_words"] for batch in step)


def test_the_longest_batch_respects_the_bound_on_predictions(shards: Path) -> None:
    data = open_data(shards, masking=MaskingConfig(max_predictions_per_seq=5))
    assert data.longest_batch(2).counts["masked_words"] == 10.0


def test_the_fingerprint_is_of_the_content_not_of_the_place(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "copy")
    assert open_data(tmp_path / "copy").fingerprint == open_data(shards).fingerprint


def test_whatever_changes_the_batches_changes_the_fingerprint(shards: Path, more_shards: Path) -> None:
    variants = [
        open_data(shards),
        open_data(more_shards),
        open_data(shards, more_shards),
        open_data(shards, weights=(2.0,)),
        *(open_data(shards, **other) for other in ({"seed": 1}, {"train_batch_size": 32})),
        open_data(shards, sequences=SequenceConfig(max_seq_length=65)),
        open_data(shards, masking=MaskingConfig(mlm_probability=0.2)),
        open_data(shards, sequences=(singles := SequenceConfig(sentence_pair="none", short_seq_prob=0.0))),
        open_data(shards, sequences=singles.model_copy(update={"whole_sentences": False})),
    ]
    assert len({data.fingerprint for data in variants}) == len(variants)


def test_other_words_in_a_list_are_other_batches(shards: Path, tmp_path: Path) -> None:
    path, found = tmp_path / "words.txt", []
    masking = MaskingConfig(whole_word_mask=True, word_segmenter="word_list", word_list=str(path))
    for words in ("北京", "北京\n天安门"):
        path.write_text(words, encoding="utf-8")
        found.append(open_data(shards, masking=masking).fingerprint)
    assert found[0] != found[1]


def test_facts_describe_the_data(shards: Path, more_shards: Path) -> None:
    data = open_data(shards, more_shards, weights=(1.0, 2.0))
    facts = data.facts(num_parts=4)
    assert facts["examples_per_epoch_by_source"] == dict(zip(("s0", "s1"), data.mixture.draws_per_epoch, strict=True))
    assert facts["examples_per_epoch"] == sum(data.mixture.draws_per_epoch)
    assert facts["padding_avoided_fraction"] == 1 - facts["mean_length"] / 64
    assert 1.0 <= facts["tokens_max_over_mean"] < 1.3


def test_a_loader_process_hears_no_stop_signal_however_often_it_comes(shards: Path) -> None:
    batches = open_data(shards).step_batches(0, rank=0, split=BatchSplit(4, 4, 1), num_workers=1)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    for number in 3 * STOP_SIGNALS:
        os.kill(worker.pid, number)
    assert [len(next(batches)) for _ in range(20)] == [4] * 20
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set(), "the rank itself goes on hearing them"
    del batches
    worker.join(timeout=20)
    assert worker.exitcode == 0


LEFT_BEHIND = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_loader import BatchSplit, open_data
batches = open_data(Path({shards!r})).step_batches(0, rank=0, split=BatchSplit(4, 4, 1), num_workers=1)
next(batches)
sys.modules["kept"] = [batches]
raise SystemExit("an error")
"""


def test_a_loader_process_that_is_left_behind_does_not_keep_its_rank_from_ending(shards: Path) -> None:
    code = LEFT_BEHIND.format(tests=str(Path(__file__).parent), shards=str(shards))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (1, "an error\n")
