"""What a task is worth without a language model: methods so simple that a fine-tuned model has to beat them.

Classes of a text: TF-IDF of words and word pairs (of characters, for Chinese) and logistic regression; of a pair:
logistic regression over the cosine of TF-IDF vectors and the share of the second text's words that the first has.
Scores: that cosine. Tags: the most frequent tag of the word in training. Choices: the most words in common with the
text. Answers: the sentence with most words of the question, or always none where a question may have none.
They see the training rows and predict the validation rows of the very same split.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bert_ds.downstream.kinds.kind import Kind, Prediction
from bert_ds.downstream.rows.examples import Example, Labels

_MOSTLY_CHINESE = 0.2
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_]+")
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s*")


def trivial_figures(
    kind: Kind, train: Sequence[Example], validation: Sequence[Example], labels: Labels
) -> dict[str, float] | None:
    """Return the metrics of the trivial method on the validation rows; None for a kind that has none."""
    if kind.trivial is None:
        return None
    labelled = [example for example in validation if example.target is not None]
    values = kind.trivial(train, labelled, labels)
    predictions = [value if isinstance(value, Prediction) else Prediction(value) for value in values]
    return kind.measure(labelled, predictions, labels)


def most_frequent_tags(train: Sequence[tuple[Sequence[str], Sequence[str]]]) -> Callable[[Sequence[str]], list[str]]:
    """Return a tagger that gives every word its most frequent tag in training, and an unknown one the commonest.

    The words of an entity are looked up together, the longest first, where tags mark entities: a gazetteer, in which
    an entry that is oftener no entity is none.
    """
    counts: dict[tuple[str, ...], Counter[tuple[str, ...]]] = defaultdict(Counter)
    all_tags: Counter[str] = Counter()
    for words, tags in train:
        all_tags.update(tags)
        for start, stop in _spans(tags):
            counts[tuple(words[start:stop])][tuple(tags[start:stop])] += 1
    lengths_seen = {len(span) for span in counts}
    for words, tags in train:
        known = set(_spans(tags))
        for start, length in itertools.product(range(len(words)), lengths_seen):
            span = tuple(words[start : start + length])
            if len(span) == length and span in counts and (start, start + length) not in known:
                counts[span][tuple(tags[start : start + length])] += 1
    longest = max(lengths_seen)
    commonest = all_tags.most_common(1)[0][0]

    def tag(words: Sequence[str]) -> list[str]:
        found: list[str] = []
        while len(found) < len(words):
            lengths = range(min(longest, len(words) - len(found)), 0, -1)
            spans = (tuple(words[len(found) : len(found) + length]) for length in lengths)
            best = next((counts[span].most_common(1)[0][0] for span in spans if span in counts), (commonest,))
            found += best
        return found

    return tag


def _spans(tags: Sequence[str]) -> list[tuple[int, int]]:
    """Return where entities begin and end; a word outside of any is a span of its own."""
    starts = [index for index, tag in enumerate(tags) if not tag.startswith("I-") or index == 0]
    return list(zip(starts, [*starts[1:], len(tags)], strict=True))


def trivial_classes(train: Sequence[Example], rows: Sequence[Example], labels: Labels) -> list[Any]:
    """Return the class of each row."""
    from sklearn.linear_model import LogisticRegression

    if len(train[0].texts) > 1:
        return _pair_classes(train, rows)
    texts = [" ".join(example.texts) for example in train]
    vectorizer = _tf_idf(texts)
    model = LogisticRegression(C=10.0, max_iter=2000)
    model.fit(vectorizer.fit_transform(texts), [example.target for example in train])
    return list(model.predict(vectorizer.transform([" ".join(example.texts) for example in rows])))


def _pair_classes(train: Sequence[Example], rows: Sequence[Example]) -> list[Any]:
    from sklearn.linear_model import LogisticRegression

    cosine = _cosine(train)

    def columns(examples: Sequence[Example]) -> np.ndarray:
        return np.stack([cosine(examples), [_shared(*example.texts[:2]) for example in examples]], axis=1)

    model = LogisticRegression().fit(columns(train), [example.target for example in train])
    return list(model.predict(columns(rows)))


def trivial_scores(train: Sequence[Example], rows: Sequence[Example], labels: Labels) -> list[Any]:
    """Return the cosine of each row's two texts."""
    return _cosine(train)(rows).tolist()


def _cosine(train: Sequence[Example]) -> Callable[[Sequence[Example]], np.ndarray]:
    """Return what gives the cosine of the TF-IDF vectors of each example's two texts."""
    texts = [text for example in train for text in example.texts]
    vectorizer = _tf_idf(texts).fit(texts)

    def cosine(examples: Sequence[Example]) -> np.ndarray:
        first, second = (vectorizer.transform([example.texts[side] for example in examples]) for side in (0, -1))
        return np.asarray(first.multiply(second).sum(axis=1)).ravel()

    return cosine


def _shared(first: str, second: str) -> float:
    """Return the share of the second text's different words that the first has."""
    words = set(_words(second))
    return len(words & set(_words(first))) / max(1, len(words))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def trivial_answers(train: Sequence[Example], rows: Sequence[Example], labels: Labels) -> list[Any]:
    """Return the answer of each row as a prediction."""
    if any(not example.target.answers for example in train):
        return [Prediction("", {"no_answer": 1.0, "answers": []}) for _ in rows]
    found = []
    for example in rows:
        question, context = example.texts
        sentences = [sentence for sentence in _SENTENCE_END.split(context) if sentence]
        best = max(sentences, key=lambda sentence: len(set(_words(question)) & set(_words(sentence))))
        found.append(Prediction(best, {"no_answer": -1.0, "answers": [{"text": best}]}))
    return found


def trivial_tags(train: Sequence[Example], rows: Sequence[Example], labels: Labels) -> list[Any]:
    """Return the tags of each row."""
    tag = most_frequent_tags([(example.texts, example.target) for example in train])
    return [tuple(tag(example.texts)) for example in rows]


def trivial_choices(train: Sequence[Example], rows: Sequence[Example], labels: Labels) -> list[Any]:
    """Return the number of the choice of each row."""
    values = []
    for example in rows:
        text, question, *choices = example.texts
        known = set(f"{text} {question}".lower().split())
        values.append(int(np.argmax([len(known & set(choice.lower().split())) for choice in choices])))
    return values


def _tf_idf(texts: Sequence[str]) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    sample = "".join(texts[:200])
    chinese = sum("\u4e00" <= character <= "\u9fff" for character in sample)
    by_character = chinese > _MOSTLY_CHINESE * len(sample)
    return TfidfVectorizer(
        analyzer="char" if by_character else "word",
        token_pattern=None if by_character else r"\w+|[^\w\s]",
        ngram_range=(1, 2),
        sublinear_tf=True,
    )
