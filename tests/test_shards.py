from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import EmbeddedCorpus
from bert_ds.corpus.shards.build import BuildSettings, build_shards
from bert_ds.corpus.shards.embedded import embedded_folders
from bert_ds.corpus.shards.shard_folder import open_shards, verify_shards
from bert_ds.corpus.text.documents import Document
from bert_ds.corpus.text.text_input import DocumentInput
from bert_ds.corpus.tokenizer.text_tokenizer import SpecialIds
from bert_ds.corpus.tokenizer.wordpiece import SPECIAL_PIECES, TextRules, WordPieceTokenizer

LETTERS = "abcdefghij"
TOKENIZER = WordPieceTokenizer([*SPECIAL_PIECES, ".", *LETTERS], TextRules())


def document(number: int) -> str:
    """One to three sentences of five to nine letters and a stop each."""
    words = [LETTERS[(number * 7 + i) % 10] for i in range(5 + number % 5)]
    return "\n".join([" ".join([*words, "."])] * (1 + number % 3))


TEXTS = [f"{LETTERS[n // 100]} {LETTERS[n // 10 % 10]} {LETTERS[n % 10]} {document(n)}" for n in range(120)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 120 documents, several per split; not to be written to."""
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save(tokenizer)
    output = tmp_path_factory.mktemp("shards") / "s"
    text_input = DocumentInput(lambda: (Document("", text) for text in TEXTS), description={"test": 1})
    monkey = pytest.MonkeyPatch()
    monkey.setattr("bert_ds.corpus.shards.build._BATCH_DOCUMENTS", 10)
    build_shards(text_input, tokenizer, output, settings=BuildSettings(0.2, 400))
    monkey.undo()
    return output


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the shards that a test may damage."""
    target = tmp_path / "copy"
    (target / "tokenizer").mkdir(parents=True)
    for path in folder.rglob("*"):
        if path.is_file():
            (target / path.relative_to(folder)).write_bytes(path.read_bytes())
    return target


def read_back(folder: Path) -> list[list[list[int]]]:
    """All documents as lists of sentences of ids, the training split first."""
    documents = []
    for name in ("train", "validation"):
        split = open_shards(folder, name)
        starts = split.sentence_starts()
        for first, last in zip(split.document_starts()[:-1], split.document_starts()[1:], strict=True):
            documents.append([split.tokens(int(starts[s]), int(starts[s + 1])).tolist() for s in range(first, last)])
    return documents


def test_what_is_read_is_what_was_written(folder: Path) -> None:
    expected = [[ids.tolist() for ids in TOKENIZER.encode_sentences(text.split("\n"))] for text in TEXTS]
    assert sorted(read_back(folder)) == sorted(expected)


def test_each_split_keeps_the_order_of_the_input(folder: Path) -> None:
    encoded = [[ids.tolist() for ids in TOKENIZER.encode_sentences(text.split("\n"))] for text in TEXTS]
    positions = [encoded.index(ids) for ids in read_back(folder)]
    num_train = open_shards(folder, "train").num_documents
    assert positions[:num_train] == sorted(positions[:num_train])
    assert positions[num_train:] == sorted(positions[num_train:])


def test_counts_are_those_of_the_input(folder: Path) -> None:
    train, validation = open_shards(folder, "train"), open_shards(folder, "validation")
    assert train.num_documents + validation.num_documents == 120
    assert train.num_sentences == len(train.sentence_lengths()) == train.document_starts()[-1]
    assert train.num_tokens == train.sentence_lengths().sum() == train.sentence_starts()[-1]
    assert validation.num_documents == 19


def test_arrays_have_the_promised_types(folder: Path) -> None:
    train = open_shards(folder, "train")
    assert train.sentence_lengths().dtype == np.uint32
    assert train.sentence_starts().dtype == train.document_starts().dtype == np.int64
    assert train.tokens(0, 5).dtype == np.uint16
    assert train.special_ids == SpecialIds(0, 1, 2, 3, 4)
    assert train.fingerprint == TOKENIZER.fingerprint
    assert train.vocab_size == 16


def test_a_range_over_several_shards_equals_its_parts(folder: Path) -> None:
    train = open_shards(folder, "train")
    assert len(json.loads((folder / "manifest.json").read_text())["splits"]["train"]["shards"]) >= 3
    parts = [train.tokens(position, position + 1) for position in range(train.num_tokens)]
    assert train.tokens(0, train.num_tokens).tolist() == np.concatenate(parts).tolist()
    assert train.tokens(train.num_tokens, train.num_tokens).tolist() == []


def test_a_range_outside_is_refused(folder: Path) -> None:
    train = open_shards(folder, "train")
    for start, stop in ((-1, 3), (5, 4), (0, train.num_tokens + 1)):
        with pytest.raises(IndexError, match="which has"):
            train.tokens(start, stop)


def test_tokens_cannot_be_written_to(folder: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        open_shards(folder, "train").tokens(0, 3)[0] = 1


def test_a_pickled_split_is_small_and_reads_the_same(folder: Path) -> None:
    train = open_shards(folder, "train")
    expected = train.tokens(3, 900).tolist()
    pickled = pickle.dumps(train)
    assert pickle.loads(pickled).tokens(3, 900).tolist() == expected
    assert len(pickled) < 8000


def test_a_whole_folder_is_verified(folder: Path) -> None:
    assert verify_shards(folder, "sha256", fingerprint=TOKENIZER.fingerprint).vocab_size == 16


def test_a_flipped_bit_is_found_and_its_file_named(copy: Path) -> None:
    for kind in ("tokens", "sentences", "documents"):
        path = copy / f"train-00001.{kind}"
        whole = path.read_bytes()
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        verify_shards(copy, "sizes")
        with pytest.raises(DataError, match=rf"train-00001\.{kind} is damaged"):
            verify_shards(copy, "sha256")
        path.write_bytes(whole)


def test_a_truncated_and_a_missing_file_are_found_on_opening(copy: Path) -> None:
    path = copy / "train-00000.tokens"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train-00000\.tokens has \d+ bytes, wanted \d+"):
        open_shards(copy, "train")
    path.unlink()
    with pytest.raises(DataError, match=r"train-00000\.tokens is missing"):
        open_shards(copy, "train")


def test_another_tokenizer_is_refused(folder: Path, copy: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: the shards were built with the tokenizer"):
        open_shards(folder, "train", fingerprint="0" * 64)
    WordPieceTokenizer([*SPECIAL_PIECES, *LETTERS, "."], TextRules()).save(copy / "tokenizer")
    with pytest.raises(DataError, match="tokenizer has the fingerprint"):
        verify_shards(copy, "sha256")


def test_an_id_outside_the_vocabulary_is_found_even_under_a_right_checksum(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["vocab_size"] = 15
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"train-00000\.tokens holds the id 15, the vocabulary 15"):
        verify_shards(copy, "sha256")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, wanted 1"),
        ({"dtype": "int8"}, "dtype"),
        ({"colour": "red"}, "colour: Extra inputs"),
        ({"special_ids": {"pad": 0}}, "cannot be read"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(change: dict[str, object], message: str, copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=rf"manifest\.json.*{message}"):
        open_shards(copy, "train")


def test_a_manifest_whose_counts_do_not_add_up_is_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["num_tokens"] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"num_tokens .* is not the sum"):
        open_shards(copy, "train")


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        open_shards(tmp_path, "train")


@pytest.mark.parametrize(
    "change",
    [
        *({"vocab_size": 65}, {"lowercase": False}, {"max_bytes": 9}, {"validation_fraction": 0.3}),
        {"tokenizer_kind": "bpe"},
    ],
)
def test_an_embedded_corpus_of_other_settings_lies_elsewhere(change: dict[str, Any], tmp_path: Path) -> None:
    config = EmbeddedCorpus(vocab_size=64)
    assert embedded_folders(config, tmp_path) == embedded_folders(EmbeddedCorpus(vocab_size=64), tmp_path)
    assert embedded_folders(config.model_copy(update=change), tmp_path) != embedded_folders(config, tmp_path)
