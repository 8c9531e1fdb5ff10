"""Byte-level BPE and Unigram: the same vocabulary every time, and a folder that transformers opens."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forked_verbs import run_verb
from tokenizer_cases import TEXTS, small_tokenizer, train

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.families.marks import BERT_MARKS, ROBERTA_MARKS
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.corpus.shards.build import BuildSettings, build_shards
from bert_ds.corpus.text.documents import Document
from bert_ds.corpus.text.text_input import DocumentInput
from bert_ds.corpus.tokenizer.subword_training import train_subwords
from bert_ds.corpus.tokenizer.subwords import BpeTokenizer, SubwordRules
from bert_ds.corpus.tokenizer.text_tokenizer import SpecialIds
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer

ROOT = Path(__file__).parents[1]
EITHER = pytest.mark.parametrize("kind", ["bpe", "unigram"])
ODD = [
    "",
    "  two  spaces ",
    "Ünïcode\u00adİstanbul ΣΊΣ 한국어 ﬁ 𠀀",
    "👩\u200d👩\u200d👧 cafe\u0301\t12.5%\n",
    "ab北京ab",
]


@EITHER
def test_auto_tokenizer_gives_our_ids_with_special_pieces_around_them(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for marks in (ROBERTA_MARKS, BERT_MARKS):
        name = "bert" if marks == BERT_MARKS else "roberta"
        folder, size = tmp_path / name, small_tokenizer(kind).vocab_size
        tokenizer = train_subwords(TEXTS * 3, kind=kind, vocab_size=size, marks=name, output=folder)
        theirs = AutoTokenizer.from_pretrained(folder)
        special = tokenizer.special_ids
        for text in [*TEXTS, *ODD]:
            (ids,) = tokenizer.encode_sentences([text])
            assert theirs(text)["input_ids"] == [special.cls, *ids.tolist(), special.sep], text
        a, b = (ids.tolist() for ids in tokenizer.encode_sentences(["The fox", "we like dogs"]))
        pair = theirs("The fox", "we like dogs")
        assert pair["input_ids"] == [special.cls, *a, *tokenizer.between, *b, special.sep]
        segments = [0] * (len(pair["input_ids"]) - len(b) - 1) + [1] * (len(b) + 1)
        assert pair.get("token_type_ids") == (segments if marks == BERT_MARKS else None)
        assert (theirs.model_max_length, theirs.mask_token_id) == (512, special.mask)
        masked = theirs(f"The {theirs.mask_token} fox", add_special_tokens=False)["input_ids"]
        fox = tokenizer.encode_sentences(["The fox"])[0].tolist()
        assert [piece for piece in masked if piece != special.mask] == fox and special.mask in masked
        words = ["The", "Brücke", "😀", ","]
        apart = theirs(words, is_split_into_words=True, add_special_tokens=False)["input_ids"]
        assert apart == [piece for word in words for piece in tokenizer_part(tokenizer, word)]


def tokenizer_part(tokenizer: Any, word: str) -> list[int]:
    return list(memoryview(tokenizer.encode_part(word, spaced=True)).cast("H"))


@EITHER
def test_a_vocabulary_begins_with_the_special_pieces_of_its_family(kind: str, tmp_path: Path) -> None:
    tokenizer = small_tokenizer(kind)
    assert tokenizer.pieces[:5] == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert tokenizer.special_ids == SpecialIds(pad=1, unk=3, cls=0, sep=2, mask=4)
    assert len(set(tokenizer.pieces)) == tokenizer.vocab_size
    other = train_subwords(TEXTS * 3, kind=kind, vocab_size=tokenizer.vocab_size, marks="bert", output=tmp_path / "t")
    assert other.special_ids == SpecialIds(0, 1, 2, 3, 4) and other.fingerprint != tokenizer.fingerprint


def test_training_gives_the_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    code = (
        "import sys, argparse, inspect;"
        "from bert_ds.corpus.tokenizer.subword_training import train_subwords;"
        "texts = inspect.getsource(argparse).split('\\n');"
        "[train_subwords(texts, kind=kind, vocab_size=400, output=f'{sys.argv[1]}/{kind}')"
        " for kind in ('bpe', 'unigram')]"
    )
    digests = set()
    for attempt, threads in enumerate("121"):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=environment)
        files = sorted(folder.glob("*/*"))
        assert len(files) == 4
        digests.add(hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest())
    assert len(digests) == 1


@EITHER
def test_what_is_loaded_is_what_was_saved_and_what_a_worker_gets(kind: str, tmp_path: Path) -> None:
    tokenizer = small_tokenizer(kind)
    tokenizer.save(tmp_path)
    for copy in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert (copy.fingerprint, copy.pieces, copy.kind) == (tokenizer.fingerprint, tokenizer.pieces, kind)
        assert copy.encode(TEXTS[4]) == tokenizer.encode(TEXTS[4])


def test_the_fingerprint_depends_on_all_that_decides_ids() -> None:
    tokenizer: Any = small_tokenizer("bpe")
    parts = (tokenizer.pieces, tokenizer.merges, tokenizer.marks)
    others = [
        BpeTokenizer(*parts, SubwordRules(space_first=False)),
        BpeTokenizer(*parts, SubwordRules(nfc=True)),
        BpeTokenizer(parts[0], parts[1][:-1], parts[2], SubwordRules()),
    ]
    assert BpeTokenizer(*parts, SubwordRules()).fingerprint == tokenizer.fingerprint
    assert len({tokenizer.fingerprint, *(other.fingerprint for other in others)}) == 4


@EITHER
def test_a_special_piece_written_in_the_text_is_text(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    ids = tokenizer.encode_sentences(["a <mask> </s>"])[0]
    parts = [tokenizer.encode_part("a <mask> </s>", spaced=spaced) for spaced in (True, False)]
    for found in (
        ids,
        tokenizer.encode_with_offsets("a <mask> </s>").ids,
        *(memoryview(part).cast("H") for part in parts),
    ):
        assert not {tokenizer.special_ids.mask, tokenizer.special_ids.sep} & set(found.tolist())


def test_a_folder_of_transformers_roberta_gives_its_ids_and_its_sentences_their_space(tmp_path: Path) -> None:
    from transformers import RobertaTokenizer

    ours: Any = small_tokenizer("bpe")
    vocab = {piece: index for index, piece in enumerate(ours.pieces)}
    theirs = RobertaTokenizer(vocab=vocab, merges=ours.merges)
    theirs.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, BpeTokenizer) and not loaded.rules.space_first
    for text in [*TEXTS, *ODD]:
        assert loaded.encode_sentences([text])[0].tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    sentences = ["The fox.", "We like dogs."]
    ids = [list(memoryview(part).cast("H")) for part in loaded.encode_document(sentences)]
    assert [*ids[0], *ids[1]] == theirs(" ".join(sentences), add_special_tokens=False)["input_ids"]


@EITHER
def test_shards_carry_the_fingerprint_and_are_the_same_by_any_number_of_processes(kind: str, tmp_path: Path) -> None:
    tokenizer = small_tokenizer(kind)
    tokenizer.save(tmp_path / "t")
    documents = [Document(f"{number}", f"{text} {number}") for number, text in enumerate(TEXTS * 8)]
    manifest = build_shards(
        DocumentInput(lambda: iter(documents), description={"n": 1}),
        tmp_path / "t",
        tmp_path / "s",
        settings=BuildSettings(validation_fraction=0.2),
    )
    assert manifest.tokenizer_fingerprint == tokenizer.fingerprint
    assert manifest.special_ids == tokenizer.special_ids._asdict()
    assert load_tokenizer(tmp_path / "s/tokenizer").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("kind", "vocab_size", "message"),
    [
        ("bpe", 260, "vocab_size 260 is too small: the special pieces and the 256 bytes need 261 pieces already"),
        ("bpe", 9000, r"vocab_size 9000 is too large: this text yields only \d+ pieces"),
        ("unigram", 20, r"vocab_size 20 is too small: .* the \d\d characters of this text need \d\d pieces already"),
        ("unigram", 9000, r"vocab_size 9000 is too large: this text yields only \d+ pieces"),
    ],
)
def test_a_size_that_the_text_does_not_give_is_refused(
    kind: str, vocab_size: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(kind, tmp_path / "t", vocab_size=vocab_size)
    assert not (tmp_path / "t").exists()


@EITHER
def test_nothing_is_no_text_and_what_is_there_is_kept(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        train(kind, tmp_path / "t", texts=[""])
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match=r"holds 'mine\.txt', which is not ours"):
        train(kind, tmp_path)


def changed(kind: str, folder: Path, change: Any) -> Path:
    """A tokenizer folder whose tokenizer.json is another."""
    small_tokenizer(kind).save(folder)
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "bpe",
            lambda it: (it["model"]["vocab"].update(éé=it["model"]["vocab"].pop("<mask>")), it.pop("added_tokens")),
            "lacks <m",
        ),
        ("bpe", lambda it: it["model"]["vocab"].update({"é": 10**9}), "are not 0"),
        ("bpe", lambda it: it["model"].update(merges=[["T"]]), r"model\.merges\.0 is \['T'\], wanted two pieces"),
        ("bpe", lambda it: it["model"].update(merges=["é é"]), r"model\.merges\.0 wants the piece 'éé'|'é'"),
        ("bpe", lambda it: it["model"].update(merges=5), r"model\.merges is 5, wanted a list of pairs"),
        ("bpe", lambda it: it["model"].update(dropout=0.1), r"found model\.dropout 0\.1: wanted byte-level BPE"),
        ("bpe", lambda it: it.update(pre_tokenizer={"type": "Whitespace"}), "found pre_tokenizer .*Whitespace"),
        ("bpe", lambda it: it.update(normalizer={"type": "Lowercase"}), "found normalizer .*Lowercase"),
        ("bpe", lambda it: it["added_tokens"].append({"content": "zz", "id": 330}), "found the added piece 'zz'"),
        ("bpe", lambda it: it["model"]["vocab"].update({"北": 330}), "holds '北', which spells no bytes"),
        (
            "unigram",
            lambda it: it["model"]["vocab"].append(["zz", float("nan")]),
            r"vocab\.88 is .*wanted a piece and",
        ),
        ("unigram", lambda it: it["model"]["vocab"].append(["▁", -1.0]), "holds '▁' twice"),
        (
            "unigram",
            lambda it: it["model"].update(unk_id=0),
            r"found model\.unk_id 0: wanted Unigram as train_tokenizer",
        ),
        ("unigram", lambda it: it.update(normalizer=None), "found normalizer None"),
        (
            "unigram",
            lambda it: it["model"].update(type="WordLevel"),
            "holds a WordLevel model, wanted WordPiece, BPE or",
        ),
    ],
)
def test_what_a_folder_is_and_this_project_cannot_be_is_named(
    kind: str, change: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message) as found:
        load_tokenizer(changed(kind, tmp_path / "t", change))
    assert len(str(found.value).splitlines()) == 1


def test_a_byte_that_has_no_piece_is_told(tmp_path: Path) -> None:
    def without(content: Any) -> None:
        vocab = content["model"]["vocab"]
        last = max(vocab, key=vocab.__getitem__)
        content["model"]["merges"] = []
        vocab[last] = vocab.pop("~")

    with pytest.raises(DataError, match="lacks 1 of the 256 bytes: wanted a piece for each"):
        load_tokenizer(changed("bpe", tmp_path / "t", without))


def test_the_verb_trains_and_its_mistakes_have_their_exit_codes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS * 3), "utf-8")
    command = [ROOT / "bert_ds/train_tokenizer.py", "--kind", "bpe", "--input", tmp_path / "a.jsonl"]
    command += ["--text-field", "body", "--output", tmp_path / "t", "--vocab_size"]
    too_small = run_verb(*command, 100)
    assert (too_small.returncode, too_small.stderr.count("\n")) == (2, 1)
    assert run_verb(*command, 300, "--text_field", "text").returncode == 3
    done = run_verb(*command, 300, "--marks", "bert")
    assert done.returncode == 0 and "300 pieces" in done.stdout
    assert load_tokenizer(tmp_path / "t").marks == BERT_MARKS
