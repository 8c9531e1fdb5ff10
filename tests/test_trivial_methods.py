"""The trivial methods of the downstream campaign, on rows whose result is known by hand."""

from __future__ import annotations

from trivial_methods import closest_sentence, longest_known_entity, most_frequent_tag, tfidf_cosine

from bert_ds.downstream.examples import Example


def example(texts: tuple[str, ...], target: object = None) -> Example:
    return Example("rows:1", "1", texts, target)


def test_a_word_gets_its_most_frequent_tag_and_an_unknown_word_the_most_frequent_of_all() -> None:
    train = [
        example(("the", "dog", "runs", "the"), ("DET", "NOUN", "VERB", "DET")),
        example(("The", "runs", "runs"), ("DET", "NOUN", "NOUN")),
    ]
    assert most_frequent_tag(train, [example(("THE", "runs", "cat"))]) == [("DET", "NOUN", "DET")]


def test_the_longest_entity_of_training_is_found_before_a_shorter_one() -> None:
    train = [
        example(("in", "New", "York", "City"), ("O", "B-place", "I-place", "I-place")),
        example(("New", "York", "sings"), ("B-band", "I-band", "O")),
    ]
    found = longest_known_entity(train, [example(("New", "York", "City", "or", "New", "York"))])
    assert found == [("B-place", "I-place", "I-place", "O", "B-band", "I-band")]


def test_the_sentence_with_most_words_of_the_question_is_the_answer() -> None:
    row = example(("Who wrote the Iliad?", "Rome is old. Homer wrote the Iliad! It is long."))
    assert closest_sentence([], [row]) == ["Homer wrote the Iliad!"]


def test_texts_that_share_more_words_get_a_higher_score() -> None:
    train = [example(("a b c", "a b c"), 5.0), example(("a b c", "d e f"), 0.0), example(("a b", "a d"), 2.0)]
    same, other = tfidf_cosine(train, [example(("b c", "b c")), example(("b c", "e f"))])
    assert same > 4 and other < 1
