"""Word vectors as a start: which pieces take which, what is counted, and what a file gets wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from config_cases import RECIPE, changed
from family_cases import EVERY_FAMILY
from tokenizer_cases import EVERY_KIND, small_tokenizer

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.recipe.run_config import RunConfig
from bert_ds.configuration.run_checks import named_files, recipe_problems
from bert_ds.corpus.tokenizer.word_vectors import read_word_vectors
from bert_ds.encoder.initial_weights import start_at_vectors
from bert_ds.encoder.pretraining_model import PretrainingModel


def written(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@EVERY_KIND
def test_a_word_that_is_one_piece_gives_it_its_vector(kind: str, tmp_path: Path) -> None:
    """By the tokenizer's own rules, behind a space; the first of several counts, no special piece has any."""
    tokenizer = small_tokenizer(kind)
    singles = [
        word
        for word in ("the", "and", "a", "fox", "dog")
        if len(tokenizer.encode_part(word, spaced=True)) == tokenizer.dtype.itemsize
    ]
    assert singles
    rows = [f"{word} {place} -0.5 1e-2" for place, word in enumerate(singles)]
    others = ["[MASK] 7 7 7", "</s> 7 7 7 ", "\u2603 7 7 7", "thequickbrown 8 8 8", f"{singles[0]} 9 9 9"]
    path = written(tmp_path / "v.txt", f"{len(rows) + len(others)} 3", *rows, *others)
    found = read_word_vectors(path, tokenizer, width=3)
    wanted = {
        int(np.frombuffer(tokenizer.encode_part(word, spaced=True), dtype=tokenizer.dtype)[0]): [place, -0.5, 1e-2]
        for place, word in enumerate(singles)
    }
    assert dict(zip(found.ids.tolist(), found.vectors.tolist(), strict=True)) == {
        piece: pytest.approx(vector) for piece, vector in wanted.items()
    }
    assert sorted(wanted) == found.ids.tolist() and found.vectors.dtype == np.float32
    pieces, number = tokenizer.vocab_size - 5, len(singles)
    assert found.text == (
        f"word vectors of {number + 5} words: {number} of {pieces} pieces have one, "
        f"{pieces - number} have none and start as without"
    )


def test_a_tokenizer_s_rules_of_case_and_accents_are_those_of_the_words(tmp_path: Path) -> None:
    tokenizer = small_tokenizer("wordpiece")
    path = written(tmp_path / "v.txt", "3 1", "THÉ 1", "the 2", "京 3")
    found = read_word_vectors(path, tokenizer, width=1)
    by_piece = {
        tokenizer.pieces[piece]: vector for piece, (vector,) in zip(found.ids, found.vectors.tolist(), strict=True)
    }
    assert by_piece == {"the": 1.0, "京": 3.0}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], ':1: found "", wanted the number of words and of numbers for each of them'),
        (["the 1 2 3"], ':1: found "the 1 2 3", wanted the number of words and of numbers'),
        (["0 3"], ':1: found "0 3", wanted the number of words'),
        (["1 4", "the 1 2 3 4"], ":1: vectors of 4 numbers, wanted 3, the width of the word embedding"),
        (["2 3", "the 1 2 3", "and 1 2"], ':3: 2 numbers behind "and", wanted 3'),
        (["1 3", "the 1 2 3 4"], ':2: 4 numbers behind "the", wanted 3'),
        (["1 3", "the 1  3"], ':2: "" is no number that fp32 can hold, wanted one'),
        (["1 3", "the 1 x 3"], ':2: "x" is no number that fp32 can hold'),
        (["1 3", "the 1 nan 3"], ':2: "nan" is no number that fp32 can hold'),
        (["1 3", "the 1 1e39 3"], ':2: "1e39" is no number that fp32 can hold'),
        (["3 3", "the 1 2 3"], ":3: nothing, wanted a word: 3 follow by line 1, and 1 were there"),
        (["1 3", "the 1 2 3", "and 1 2 3"], ":3: another word, wanted the end behind the 1 of line 1"),
        (["1 3", "thequickbrown 1 2 3"], ": none of its 1 words is a piece of the tokenizer, wanted one at least"),
    ],
)
def test_a_file_that_is_wrong_is_told_with_its_line(lines: list[str], said: str, tmp_path: Path) -> None:
    path = written(tmp_path / "v.txt", *lines)
    with pytest.raises(DataError) as told:
        read_word_vectors(path, small_tokenizer("wordpiece"), width=3)
    assert str(told.value).startswith(f"{path}{said}")


def test_what_is_no_text_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "v.bin").write_bytes(b"1 3\n\xff\xfe 1 2 3\n")
    for path, said in (
        ("v.bin", "v.bin:2: the word is no UTF-8"),
        ("none", "No such file"),
        (".", "not a regular file"),
    ):
        with pytest.raises(DataError, match=said):
            read_word_vectors(tmp_path / path, small_tokenizer("wordpiece"), width=3)


@EVERY_FAMILY
def test_the_other_pieces_and_weights_of_every_family_stay_as_they_are(config: EncoderConfig) -> None:
    model, plain = (PretrainingModel(config, kernels="torch", has_pair_head=False) for _ in range(2))
    ids = np.array([5, 60])
    start_at_vectors(model, ids, np.full((2, config.embedding_width), 0.25, dtype=np.float32))
    words, before = model.bert.embeddings.word_weight, plain.bert.embeddings.word_weight
    assert (words[ids] == 0.25).all()
    rest = np.setdiff1d(np.arange(len(words)), ids)
    assert torch.equal(words[rest], before[rest])
    changed_names = [
        name for name, weight in model.state_dict().items() if not torch.equal(weight, plain.state_dict()[name])
    ]
    assert changed_names == ["bert.embeddings.word_weight"]


def test_a_recipe_is_told_before_a_launch(tmp_path: Path) -> None:
    run = RunConfig.model_validate(changed(RECIPE, "word_vectors", str(written(tmp_path / "v.txt", "2 3"))))
    (problem,) = [problem for problem in named_files(run)[0] if problem.path == "word_vectors"]
    width = run.model.hidden_size
    assert problem.text.endswith(f"v.txt:1: vectors of 3 numbers, wanted {width}, the width of the word embedding")
    fits = changed(RECIPE, "word_vectors", str(written(tmp_path / "w.txt", f"2 {width}")))
    run = RunConfig.model_validate(fits)
    assert not any(problem.path == "word_vectors" for problem in (*named_files(run)[0], *recipe_problems(run)))
    for other, value in (
        ("init_from", "runs/other"),
        ("distillation", {"teacher": "t", "init_layers": (0, 1)}),
    ):
        found = recipe_problems(RunConfig.model_validate(changed(fits, other, value)))
        name = "init_from" if other == "init_from" else "distillation.init_layers"
        text = f"both it and {name} say where the word embedding starts: wanted one of them"
        assert [problem.text for problem in found if problem.path == "word_vectors"] == [text]
    gone = RunConfig.model_validate(changed(RECIPE, "word_vectors", str(tmp_path / "gone")))
    assert any(text.startswith("word_vectors: ") for text in named_files(gone)[1])
