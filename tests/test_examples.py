from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from corpus_fixtures import FIRST_TEXT_ID, Documents, counting_documents, open_train, random_documents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bert_ds.configuration.recipe.run_config import IGNORE_INDEX, SequenceConfig
from bert_ds.corpus.batches.examples import Example, choose_spans, make_example
from bert_ds.corpus.batches.sentence_pairs import truncated_sizes
from bert_ds.corpus.batches.sequences import ExampleTable, build_examples

CLS, SEP = 2, 3
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
document_lengths = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), min_size=2, max_size=6)
configs = st.one_of(
    st.builds(
        SequenceConfig,
        max_seq_length=st.integers(8, 40),
        sentence_pair=st.sampled_from(["nsp", "sop", "structure", "none"]),
        short_seq_prob=st.sampled_from([0.0, 0.5, 1.0]),
    ),
    st.builds(
        SequenceConfig, max_seq_length=st.integers(8, 40), sentence_pair=st.just("none"), cross_documents=st.just(True)
    ),
    st.builds(
        SequenceConfig,
        max_seq_length=st.integers(8, 40),
        sentence_pair=st.just("none"),
        short_seq_prob=st.just(0.0),
        whole_sentences=st.just(False),
        cross_documents=st.booleans(),
    ),
)


def table_of(folder: Path, documents: Documents, config: SequenceConfig) -> ExampleTable:
    return build_examples(open_train(folder, documents), config, seed=0, cache_dirs=(folder,))


def all_examples(table: ExampleTable, *, epoch: int = 0, seed: int = 0) -> list[Example]:
    indices = np.arange(table.num_examples)
    plan = choose_spans(table, indices, epochs=np.full_like(indices, epoch), source=0, seed=seed)
    return [make_example(plan, row) for row in indices.tolist()]


def segments(example: Example) -> list[list[int]]:
    """Token ids between the special tokens."""
    inner = example.input_ids[1:]
    ends = np.flatnonzero(inner == SEP)
    return [part[part != SEP].tolist() for part in np.split(inner, ends + 1)[:-1]]


def is_counting(ids: list[int]) -> bool:
    return ids == list(range(ids[0], ids[0] + len(ids)))


@quick
@given(document_lengths, configs, st.integers(0, 3))
def test_an_example_is_well_formed(
    tmp_path: Path, lengths: list[list[int]], config: SequenceConfig, epoch: int
) -> None:
    for example in all_examples(table_of(tmp_path, counting_documents(lengths), config), epoch=epoch):
        assert len(example.input_ids) == len(example.token_type_ids) <= config.max_seq_length
        assert example.input_ids[0] == CLS and example.input_ids[-1] == SEP
        assert all(segments(example))
        assert (np.diff(example.token_type_ids) >= 0).all() and example.token_type_ids.max() <= 1
        if config.sentence_pair != "none":
            assert len(segments(example)) == 1 + example.token_type_ids[-1]
            assert example.input_ids[np.flatnonzero(np.diff(example.token_type_ids))].tolist() in ([], [SEP])


@quick
@given(document_lengths, configs)
def test_a_segment_is_consecutive_text_of_one_document(
    tmp_path: Path, lengths: list[list[int]], config: SequenceConfig
) -> None:
    document_ends = FIRST_TEXT_ID + np.cumsum([sum(document) for document in lengths])
    for example in all_examples(table_of(tmp_path, counting_documents(lengths), config)):
        parts = segments(example)
        documents = [set(np.searchsorted(document_ends, part, side="right").tolist()) for part in parts]
        assert all(map(is_counting, parts))
        assert all(len(found) == 1 for found in documents)
        if config.sentence_pair in ("nsp", "structure"):
            random = 2 if config.sentence_pair == "structure" else 1
            assert (documents[0] != documents[1]) == (example.pair_label == random)
        elif not config.cross_documents:
            assert len(set.union(*documents)) == 1


@quick
@given(document_lengths, configs)
def test_planned_lengths_are_the_lengths(tmp_path: Path, lengths: list[list[int]], config: SequenceConfig) -> None:
    table = table_of(tmp_path, counting_documents(lengths), config)
    indices = np.arange(table.num_examples)[::-1]
    plan = choose_spans(table, indices, epochs=np.zeros_like(indices), source=0, seed=0)
    assert plan.lengths.tolist() == [len(make_example(plan, row).input_ids) for row in range(len(indices))]


@pytest.mark.parametrize("sentence_pair", ["nsp", "sop", "structure"])
def test_an_example_is_a_function_of_its_key(tmp_path: Path, sentence_pair: str) -> None:
    table = table_of(tmp_path, random_documents(10), SequenceConfig(max_seq_length=64, sentence_pair=sentence_pair))
    index = np.array([7])
    (alone,) = [make_example(choose_spans(table, index, epochs=index * 0, source=0, seed=0), 0)]
    assert alone.input_ids.tolist() == all_examples(table)[7].input_ids.tolist()
    assert alone.key == (0, 0, 7)


@pytest.mark.parametrize("sentence_pair", ["nsp", "sop", "structure"])
def test_pairs_are_drawn_anew_in_every_epoch(tmp_path: Path, sentence_pair: str) -> None:
    table = table_of(tmp_path, random_documents(10), SequenceConfig(max_seq_length=64, sentence_pair=sentence_pair))
    first, second = ([example.input_ids.tolist() for example in all_examples(table, epoch=epoch)] for epoch in range(2))
    assert np.mean([a != b for a, b in zip(first, second, strict=True)]) > 0.5


def test_a_true_pair_is_the_whole_run_cut_at_a_sentence_end(tmp_path: Path) -> None:
    table = table_of(tmp_path, counting_documents([[2, 3, 4], [5, 6]]), SequenceConfig(short_seq_prob=0.0))
    pairs = {
        tuple(map(tuple, segments(all_examples(table, epoch=epoch)[0])))
        for epoch in range(40)
        if all_examples(table, epoch=epoch)[0].pair_label == 0
    }
    assert pairs == {((5, 6), (7, 8, 9, 10, 11, 12, 13)), ((5, 6, 7, 8, 9), (10, 11, 12, 13))}


def test_half_of_the_next_sentences_are_random(tmp_path: Path) -> None:
    table = table_of(tmp_path, counting_documents([[2, 2]] * 40), SequenceConfig(short_seq_prob=0.0))
    labels = [example.pair_label for epoch in range(50) for example in all_examples(table, epoch=epoch)]
    # 2,000 fair coins: 4 standard deviations are 89.
    assert len(labels) == 2000 and abs(sum(labels) - 1000) < 89


def test_a_random_next_may_start_at_any_sentence_of_the_other_documents(tmp_path: Path) -> None:
    table = table_of(tmp_path, counting_documents([[1, 1], [1, 1, 1], [1]]), SequenceConfig(short_seq_prob=0.0))
    examples = [all_examples(table, epoch=epoch)[1] for epoch in range(300)]
    starts = {segments(example)[1][0] for example in examples if example.pair_label == 1}
    assert starts == {5, 6, 10}


def test_a_run_of_one_sentence_gets_a_random_next(tmp_path: Path) -> None:
    table = table_of(tmp_path, counting_documents([[4], [5]]), SequenceConfig(short_seq_prob=0.0))
    assert {example.pair_label for epoch in range(20) for example in all_examples(table, epoch=epoch)} == {1}


def test_a_random_next_has_about_the_length_of_the_text_it_displaces(tmp_path: Path) -> None:
    documents = counting_documents([[3] * 200] * 5)
    table = table_of(tmp_path, documents, SequenceConfig(max_seq_length=64, short_seq_prob=1.0))
    by_label: dict[int, list[int]] = {0: [], 1: []}
    for epoch in range(10):
        for example, size in zip(all_examples(table, epoch=epoch), np.diff(table.example_units), strict=True):
            if size > 1:
                by_label[example.pair_label].append(len(example.input_ids))
    assert abs(np.mean(by_label[0]) - np.mean(by_label[1])) < 2


def test_a_pair_that_is_too_long_is_cut_at_both_ends_of_its_longer_side(tmp_path: Path) -> None:
    table = table_of(tmp_path, counting_documents([[37], [4]]), SequenceConfig(max_seq_length=40, short_seq_prob=0.0))
    firsts = {tuple(segments(all_examples(table, epoch=epoch)[0])[0]) for epoch in range(50)}
    assert {len(first) for first in firsts} == {33}
    assert len(firsts) > 3 and all(is_counting(list(first)) for first in firsts)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(2, 40))
def test_truncation_leaves_the_sizes_that_the_published_loop_leaves(a: int, b: int, longest: int) -> None:
    left = [a, b]
    while sum(left) > longest:
        left[0 if left[0] > left[1] else 1] -= 1
    if a + b > longest:
        assert truncated_sizes(np.array([[a, b]]), longest).tolist() == [left]


def test_sentence_order_swaps_half_of_the_pairs(tmp_path: Path) -> None:
    table = table_of(tmp_path, counting_documents([[2, 3]]), SequenceConfig(sentence_pair="sop", short_seq_prob=0.0))
    examples = [all_examples(table, epoch=epoch)[0] for epoch in range(2000)]
    assert {(example.pair_label, *map(tuple, segments(example))) for example in examples} == {
        (0, (5, 6), (7, 8, 9)),
        (1, (7, 8, 9), (5, 6)),
    }
    assert abs(sum(example.pair_label for example in examples) - 1000) < 89


def test_a_run_of_one_sentence_has_no_order_to_predict(tmp_path: Path) -> None:
    table = table_of(tmp_path, counting_documents([[4]]), SequenceConfig(sentence_pair="sop"))
    (example,) = all_examples(table)
    assert example.input_ids.tolist() == [CLS, 5, 6, 7, 8, SEP]
    assert example.pair_label == IGNORE_INDEX


def test_without_pairs_an_example_is_its_run(tmp_path: Path) -> None:
    table = table_of(
        tmp_path, counting_documents([[2, 2], [1]]), SequenceConfig(sentence_pair="none", short_seq_prob=0.0)
    )
    assert [example.input_ids.tolist() for example in all_examples(table)] == [[CLS, 5, 6, 7, 8, SEP], [CLS, 9, SEP]]
    assert {example.pair_label for example in all_examples(table)} == {IGNORE_INDEX}


def test_documents_in_one_example_are_separated(tmp_path: Path) -> None:
    config = SequenceConfig(sentence_pair="none", cross_documents=True, max_seq_length=10, short_seq_prob=0.0)
    examples = all_examples(table_of(tmp_path, counting_documents([[2], [1, 1], [1, 4]]), config))
    assert [example.input_ids.tolist() for example in examples] == [
        [CLS, 5, 6, SEP, 7, 8, SEP, 9, SEP],
        [CLS, 10, 11, 12, 13, SEP],
    ]
    assert {int(example.token_type_ids.max()) for example in examples} == {0}


@pytest.mark.parametrize("cross", [False, True])
def test_without_whole_sentences_a_document_is_cut_where_an_example_is_full(tmp_path: Path, cross: bool) -> None:
    settings = {"sentence_pair": "none", "max_seq_length": 8, "short_seq_prob": 0.0, "cross_documents": cross}
    config = SequenceConfig(**settings, whole_sentences=False)
    documents = counting_documents([[3, 4, 1], [2], [6, 7]])
    examples = all_examples(table_of(tmp_path, documents, config))
    rests = [[11, 12, SEP, 13, 14]] if cross else [[11, 12], [13, 14]]
    wanted = [[5, 6, 7, 8, 9, 10], *rests, [15, 16, 17, 18, 19, 20], [21, 22, 23, 24, 25, 26], [27]]
    assert [example.input_ids.tolist() for example in examples] == [[CLS, *ids, SEP] for ids in wanted]
    other = table_of(tmp_path, documents, SequenceConfig(**settings))  # of another cache
    assert segments(all_examples(other)[0]) == [[5, 6, 7]]


@pytest.mark.parametrize("wrong", [{"sentence_pair": "sop"}, {"sentence_pair": "none"}])
def test_cutting_anywhere_wants_neither_pairs_nor_short_examples(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match='whole_sentences false needs sentence_pair "none" and short_seq_prob 0, not'):
        SequenceConfig(**wrong, whole_sentences=False)
