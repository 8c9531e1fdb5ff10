from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.corpus.tokenizer.text_tokenizer import SpecialIds
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.corpus.tokenizer.wordpiece import SPECIAL_PIECES, TextRules, WordPieceTokenizer
from bert_ds.corpus.tokenizer.wordpiece_training import train_wordpiece

ROOT = Path(__file__).parents[1]
FACTS = ["[UNK]", "[CLS]", "[SEP]", "want", "##want", "##ed", "wa", "un", "runn", "##ing", ",", "[PAD]", "[MASK]"]
ALPHABET = [chr(code) for code in range(33, 0x250)] + ["\u0301", "北", "가", "ﬁ"]
MANY_CHARACTERS = [*SPECIAL_PIECES, *ALPHABET, *(f"##{character}" for character in ALPHABET)]
TEXTS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Foxes were quicker than dogs; dogs are lazier than foxes!",
    "Über die Brücke liefen füchse, naïve façade, résumé.",
    "我爱北京天安门，天安门上太阳升。",
]


def trained(folder: Path, *, vocab_size: int = 120, lowercase: bool = True) -> WordPieceTokenizer:
    return train_wordpiece(TEXTS * 3, vocab_size=vocab_size, lowercase=lowercase, output=folder)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published vocabularies, unpacked."""
    archive = Path(__file__).parents[2] / "shared/data/bert_reference.tar.xz"
    if not archive.is_file():
        pytest.skip(f"{archive} is missing: the published vocabularies are not compared")
    folder = tmp_path_factory.mktemp("reference")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "bert_reference"


def published(reference: Path, name: str, folder: Path, config: dict[str, bool] | None = None) -> Path:
    folder.mkdir()
    shutil.copy(reference / f"vocab_bert_base_{name}.txt", folder / "vocab.txt")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def facts() -> WordPieceTokenizer:
    return WordPieceTokenizer(FACTS, TextRules())


def pieces(tokenizer: WordPieceTokenizer, text: str) -> list[str]:
    return [tokenizer.pieces[index] for index in tokenizer.encode_sentences([text])[0]]


def test_longest_pieces_are_taken_first_and_case_and_accents_vanish() -> None:
    assert pieces(facts(), "UNwant\u00e9d,running") == ["un", "##want", "##ed", ",", "runn", "##ing"]


def test_a_word_with_an_unknown_rest_is_unknown_as_a_whole() -> None:
    assert pieces(facts(), "unwantedX running") == ["[UNK]", "runn", "##ing"]


def test_every_chinese_character_stands_alone() -> None:
    tokenizer = WordPieceTokenizer([*SPECIAL_PIECES, "北", "京", "a", "##b"], TextRules())
    assert pieces(tokenizer, "ab北京ab") == ["a", "##b", "北", "京", "a", "##b"]


def test_control_characters_vanish_and_tab_and_newline_are_spaces() -> None:
    assert pieces(facts(), "un\u0000\u001cwant\ted\u200b\nwa") == ["un", "##want", "[UNK]", "wa"]


def test_dollar_and_backtick_are_punctuation() -> None:
    tokenizer = WordPieceTokenizer([*SPECIAL_PIECES, "$", "`", "a"], TextRules())
    assert pieces(tokenizer, "a$a`a") == ["a", "$", "a", "`", "a"]


def test_a_special_piece_written_in_the_text_is_text() -> None:
    tokenizer = WordPieceTokenizer([*SPECIAL_PIECES, "[", "]", "mask"], TextRules())
    assert pieces(tokenizer, "[MASK]") == ["[", "mask", "]"]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40), st.booleans(), st.booleans())
def test_cached_parts_give_the_ids_of_the_whole_text(text: str, lowercase: bool, chinese: bool) -> None:
    tokenizer = WordPieceTokenizer(MANY_CHARACTERS, TextRules(lowercase, lowercase, chinese))
    assert tokenizer.encode_sentences([text])[0].tolist() == tokenizer.encode_with_offsets(text).ids.tolist()


def test_published_vocabularies_have_the_published_special_ids(reference: Path, tmp_path: Path) -> None:
    for name, config in (("uncased", None), ("chinese", None), ("cased", {"do_lower_case": False})):
        tokenizer = load_tokenizer(published(reference, name, tmp_path / name, config))
        assert tokenizer.special_ids == SpecialIds(pad=0, unk=100, cls=101, sep=102, mask=103)


def test_published_vocabularies_give_the_ids_of_hugging_face(reference: Path, tmp_path: Path) -> None:
    from transformers import BertTokenizer

    lines = (reference / "sample_text.txt").read_text(encoding="utf-8").split("\n")
    lines += ["I don't know: naïve café, 12.5% of $3 — 我爱北京。\u3000Ünïcode\u00adİstanbul ΣΊΣΥΦΟΣ 한국어 ﬁ 𠀀"]
    for name, lowercase in (("uncased", True), ("cased", False), ("chinese", True)):
        folder = published(reference, name, tmp_path / name, {"do_lower_case": lowercase})
        ours = load_tokenizer(folder)
        theirs = BertTokenizer.from_pretrained(folder, do_lower_case=lowercase)
        expected = theirs(lines, add_special_tokens=False)["input_ids"]
        assert [ids.tolist() for ids in ours.encode_sentences(lines)] == expected


def test_a_vocabulary_with_capitals_needs_a_file_that_says_it_is_cased(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="do_lower_case"):
        load_tokenizer(published(reference, "cased", tmp_path / "cased"))


def test_auto_tokenizer_gives_our_ids_with_specials_and_segments_around_them(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for lowercase in (True, False):
        folder = tmp_path / str(lowercase)
        tokenizer = trained(folder, lowercase=lowercase)
        theirs = AutoTokenizer.from_pretrained(folder)
        first, second = "The naïve Fox 天安门!", "Dogs, again"
        encoded = theirs(first, second)
        a, b = (ids.tolist() for ids in tokenizer.encode_sentences([first, second]))
        special = tokenizer.special_ids
        assert encoded["input_ids"] == [special.cls, *a, special.sep, *b, special.sep]
        assert encoded["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
        assert theirs.model_max_length == 512
        assert theirs.mask_token_id == special.mask


def test_a_trained_vocabulary_starts_with_the_special_pieces_and_has_the_size_asked_for(tmp_path: Path) -> None:
    tokenizer = trained(tmp_path / "t")
    assert tokenizer.pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokenizer.special_ids == SpecialIds(0, 1, 2, 3, 4)
    assert tokenizer.vocab_size == len(set(tokenizer.pieces)) == 120


def test_characters_that_always_stand_alone_get_no_continuation_piece(tmp_path: Path) -> None:
    tokenizer = trained(tmp_path / "t")
    assert {"京", ",", "x", "##x"} <= set(tokenizer.pieces)
    assert not {"##京", "##,"} & set(tokenizer.pieces)


def test_training_gives_the_same_bytes_with_one_and_with_two_threads(tmp_path: Path) -> None:
    code = (
        "import sys, argparse, inspect, subprocess, typing, tarfile;"
        "from bert_ds.corpus.tokenizer.wordpiece_training import train_wordpiece;"
        "texts = [inspect.getsource(module) for module in (argparse, inspect, subprocess, typing, tarfile)];"
        "train_wordpiece(texts, vocab_size=2000, lowercase=True, output=sys.argv[1])"
    )
    digests = set()
    for attempt, threads in enumerate("12121"):
        folder = tmp_path / str(attempt)
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=environment)
        files = sorted(folder.iterdir())
        assert [path.name for path in files] == ["tokenizer.json", "tokenizer_config.json", "vocab.txt"]
        digests.add(hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest())
    assert len(digests) == 1


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    saved = trained(tmp_path / "t", lowercase=False)
    loaded = load_tokenizer(tmp_path / "t")
    assert loaded.pieces == saved.pieces
    assert loaded.rules == saved.rules
    assert loaded.fingerprint == saved.fingerprint
    assert trained(tmp_path / "uncased").rules == TextRules(lowercase=True, strip_accents=True)


def test_vocab_txt_with_its_config_is_enough_to_load(tmp_path: Path) -> None:
    saved = trained(tmp_path / "t")
    (tmp_path / "t/tokenizer.json").unlink()
    assert load_tokenizer(tmp_path / "t").fingerprint == saved.fingerprint


def test_the_fingerprint_depends_on_pieces_order_and_rules() -> None:
    first = WordPieceTokenizer([*SPECIAL_PIECES, "a", "b"], TextRules())
    swapped = WordPieceTokenizer([*SPECIAL_PIECES, "b", "a"], TextRules())
    cased = WordPieceTokenizer([*SPECIAL_PIECES, "a", "b"], TextRules(lowercase=False))
    assert len({first.fingerprint, swapped.fingerprint, cased.fingerprint}) == 3


def test_continuation_pieces_are_marked_and_a_double_hash_is_none() -> None:
    tokenizer = WordPieceTokenizer([*SPECIAL_PIECES, "a", "##a", "##", "#"], TextRules())
    assert tokenizer.is_continuation.tolist() == [False] * 6 + [True, False, False]


def test_ids_take_two_bytes_up_to_65536_pieces_and_four_beyond() -> None:
    many = [*SPECIAL_PIECES, *(f"a{index}" for index in range(65_531))]
    assert WordPieceTokenizer(many, TextRules()).dtype == np.dtype("<u2")
    assert WordPieceTokenizer([*many, "b"], TextRules()).dtype == np.dtype("<u4")


def test_a_vocabulary_smaller_than_the_alphabet_is_refused_with_the_number_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size 30 is too small.* need \d+ pieces"):
        trained(tmp_path / "t", vocab_size=30)
    assert not (tmp_path / "t").exists()


def test_a_vocabulary_larger_than_the_text_yields_is_refused_with_the_number_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size 9000 is too large.* only \d+ pieces"):
        trained(tmp_path / "t", vocab_size=9000)


def test_training_on_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        train_wordpiece([""], vocab_size=100, lowercase=True, output=tmp_path / "t")


def test_training_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match=r"holds 'mine\.txt', which is not ours"):
        trained(tmp_path)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n", r"lacks \[MASK\]"),
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\na\n", "holds 'a' twice"),
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n\na\n", "empty piece at id 5"),
    ],
)
def test_damaged_vocabularies_are_refused(vocabulary: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text(vocabulary)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_two_different_vocabularies_in_one_folder_are_refused(tmp_path: Path) -> None:
    trained(tmp_path / "t")
    (tmp_path / "t/vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    with pytest.raises(DataError, match="different vocabularies"):
        load_tokenizer(tmp_path / "t")


def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither tokenizer\.json nor vocab\.txt"):
        load_tokenizer(tmp_path)


def test_the_verb_trains_and_its_mistakes_have_their_exit_codes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS * 3), "utf-8")
    command = [sys.executable, str(ROOT / "bert_ds/train_wordpiece.py"), "--input", str(tmp_path / "a.jsonl")]
    command += ["--text-field", "body", "--cased", "--output", str(tmp_path / "t")]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)

    too_small = run("--vocab_size", "20")
    assert (too_small.returncode, too_small.stderr.count("\n")) == (2, 1)
    wrong_field = run("--vocab_size", "120", "--text_field", "text")
    assert wrong_field.returncode == 3
    assert "a.jsonl, line 1: no field" in wrong_field.stderr
    assert run("--vocab_size", "120").returncode == 0
    assert load_tokenizer(tmp_path / "t").rules == TextRules(lowercase=False, strip_accents=False)
