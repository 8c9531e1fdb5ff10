"""What begins a word, and what goes by it, for each kind of tokenizer: accents, Chinese and emoji in all of them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from tokenizer_cases import EVERY_KIND, small_tokenizer

from bert_ds.configuration.recipe.run_config import IGNORE_INDEX, ConfigError, MaskingConfig
from bert_ds.corpus.batches.examples import Example
from bert_ds.corpus.batches.mlm_masking import Masker
from bert_ds.corpus.shards.encode_documents import Encoder
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer
from bert_ds.corpus.tokenizer.word_segments import WordJoiner
from bert_ds.downstream.rows.answer_windows import answer_characters, answer_pieces, cut_windows
from bert_ds.downstream.rows.features import cut_to, encode_part, encode_text, wrap
from bert_ds.downstream.untrained.prompts import Prompt, PromptWriter, Shot

TEXT = "the naïve fox, in a cafe\u0301 - 我爱北京。 😀 and 👍 dogs ❤️ 12"
WORDS = [
    *("the", "naïve", "fox", ",", "in", "a", "cafe\u0301", "-", "我", "爱", "北", "京", "。"),
    *("😀", "and", "👍", "dogs", "❤️", "12"),
]


def ids_of(tokenizer: TextTokenizer, text: str) -> np.ndarray:
    return encode_text(tokenizer, text)


def words_of(tokenizer: TextTokenizer, text: str) -> list[str]:
    """The words of a text, from the characters of their first and last pieces."""
    found = tokenizer.encode_with_offsets(text)
    starts = [*np.flatnonzero(~tokenizer.continues(found.ids)).tolist(), len(found.ids)]
    spans = [answer_characters(text, found, first, end - 1) for first, end in pairwise(starts)]
    return [text[start:stop] for start, stop in spans]


@EVERY_KIND
def test_words_are_those_of_bert_whatever_the_pieces(kind: str) -> None:
    assert words_of(small_tokenizer(kind), TEXT) == WORDS


@EVERY_KIND
def test_words_are_the_same_when_sequences_lie_end_to_end(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    one, special = ids_of(tokenizer, TEXT), tokenizer.special_ids
    alone = tokenizer.continues(one)
    stream = np.concatenate(([special.cls], one, [special.sep, special.cls], one, [special.sep]))
    mark = [False]
    assert tokenizer.continues(stream).tolist() == [*mark, *alone, *mark * 2, *alone, *mark]
    assert tokenizer.continues(np.array([special.cls, special.sep])).tolist() == [False, False]


def test_a_sequence_that_begins_inside_a_character_begins_a_word() -> None:
    tokenizer = small_tokenizer("bpe")
    ids = ids_of(tokenizer, "\u4f60")  # in no training text: three bytes
    assert len(ids) == 4 and tokenizer.continues(ids).tolist() == [False, True, True, True]
    assert tokenizer.continues(ids[2:]).tolist() == [False, True]


@EVERY_KIND
def test_a_masked_word_is_masked_whole(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    special, text = tokenizer.special_ids, ids_of(tokenizer, TEXT)
    ids = np.concatenate(([special.cls], text, [special.sep])).astype(np.int32)
    is_first = ~tokenizer.continues(ids)
    word_of = np.cumsum(is_first)
    config = MaskingConfig(whole_word_mask=True, mlm_probability=0.4)
    examples = [Example(ids.copy(), np.zeros(len(ids), dtype=np.int8), IGNORE_INDEX, (0, 0, n)) for n in range(40)]
    seen = set()
    for masked in Masker(tokenizer, config, seed=3).mask(examples):
        chosen = set(masked.positions.tolist())
        for word in {word_of[place] for place in chosen}:
            places = set(np.flatnonzero(word_of == word).tolist())
            seen.add(len(places))
            assert places <= chosen
    assert max(seen) >= 3


@EVERY_KIND
def test_every_word_is_found_as_an_answer_and_cut_out_as_it_stands(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    found = tokenizer.encode_with_offsets(TEXT)
    assert found.ids.tolist() == ids_of(tokenizer, TEXT).tolist()
    assert (np.diff(found.starts) >= 0).all() and (np.diff(found.stops) >= 0).all()
    at = 0
    for first in range(len(WORDS)):
        at = TEXT.index(WORDS[first], at)
        for last in range(first, min(first + 3, len(WORDS))):
            stop = TEXT.index(WORDS[last], at) + len(WORDS[last])
            pieces = answer_pieces(found, at, stop)
            assert pieces is not None
            assert answer_characters(TEXT, found, *pieces) == (at, stop)


def test_a_part_of_a_character_has_the_whole_of_it() -> None:
    tokenizer = small_tokenizer("bpe")
    found = tokenizer.encode_with_offsets("a \u4f60")
    spans = list(zip(found.starts.tolist(), found.stops.tolist(), strict=True))
    assert spans == [(0, 1), (2, 2), (2, 3), (2, 3), (2, 3)]
    assert answer_pieces(found, 2, 3) == (2, 4)


@EVERY_KIND
def test_a_word_of_a_sentence_is_the_word_of_a_text(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    for word in ("dog", "Brücke", "😀"):
        text = ids_of(tokenizer, f"the {word}")
        assert text[-len(encode_part(tokenizer, word)) :].tolist() == encode_part(tokenizer, word).tolist()
    glued, spaced = (encode_part(tokenizer, "dog", spaced=spaced).tolist() for spaced in (False, True))
    assert (glued == spaced) == (kind == "wordpiece")


@EVERY_KIND
def test_a_prompt_has_the_pieces_of_the_text_that_it_is(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    prompt = Prompt("the {text}, was {label}.", {"good": ["quick"], "bad": ["lazy dog"]})
    writer = PromptWriter(tokenizer, prompt, 60)
    context = writer.context(["fox"], [Shot(["dog"], "bad")])
    for word in ("quick", "lazy dog"):
        pieces = writer._pieces_of_word[word]
        whole = [*context.before[1:], *pieces, *context.after[:-1]]
        text = f"the dog, was lazy dog. the fox, was {word}."
        assert whole == ids_of(tokenizer, text).tolist()


@EVERY_KIND
def test_sentences_of_a_document_are_the_text(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    parts = Encoder(tokenizer, 0.0)(["We like dogs.\nThe fox."])
    ids = np.frombuffer(parts["train"].tokens, dtype=tokenizer.dtype).astype(np.int32)
    assert ids.tolist() == ids_of(tokenizer, "We like dogs. The fox.").tolist()


@pytest.mark.parametrize(("kind", "num_between"), [("wordpiece", 1), ("bpe", 2), ("unigram", 2)])
def test_pairs_are_written_as_the_vocabulary_has_it(kind: str, num_between: int) -> None:
    tokenizer = small_tokenizer(kind)
    first, second = ids_of(tokenizer, "the dog"), ids_of(tokenizer, "the quick fox")
    ids, types = wrap(tokenizer, [first, second])
    marked = tokenizer.backend.encode("the dog", "the quick fox").ids
    assert ids.tolist() == marked and len(types) == len(ids)
    assert (np.diff(np.flatnonzero(ids == tokenizer.special_ids.sep)) == 1).sum() == num_between - 1
    cut, is_cut = cut_to(tokenizer, [first, second], len(ids))
    assert not is_cut
    cut, is_cut = cut_to(tokenizer, [first, second], len(ids) - 1)
    assert is_cut and len(wrap(tokenizer, cut)[0]) == len(ids) - 1
    (window,) = cut_windows(first, second, tokenizer=tokenizer, max_seq_length=len(ids), stride=1)
    assert window.input_ids.tolist() == marked
    assert window.input_ids[window.first_token] == second[0]
    assert len(cut_windows(first, second, tokenizer=tokenizer, max_seq_length=len(ids) - 1, stride=1)) > 1


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_segmenter_wants_characters_that_stand_alone(kind: str) -> None:
    config = MaskingConfig(whole_word_mask=True, word_segmenter="jieba")
    with pytest.raises(ConfigError, match=f"this tokenizer does not split them: it was made as {kind}"):
        WordJoiner(small_tokenizer(kind), config)
