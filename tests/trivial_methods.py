"""What a task gives without any network: the floor that a pre-trained model has to beat, on the same rows.

One text: TF-IDF of words and word pairs (of characters and their pairs, for Chinese), logistic regression. Pairs:
TF-IDF cosine, fitted by a line for similarity, by logistic regression beside the share of shared words for classes.
Tags: the most frequent tag of a word, or for entities the longest match with an entity of training. Questions: the
sentence of the context that shares most words with the question; where a question may have no answer, always none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression

from bert_ds.downstream.examples import Example
from bert_ds.downstream.kind import Prediction
from bert_ds.downstream.kinds import KINDS
from bert_ds.downstream.task_rows import TaskRows
from bert_ds.task_config import TaskConfig

Tags = Sequence[str]
_CHINESE = re.compile(r"[\u3400-\u9fff]")
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s*")


def trivial_figure(task: TaskConfig, rows: TaskRows) -> dict[str, Any]:
    """Return the name of the method and its value of the task's metric on the validation rows."""
    train, validation = rows.train.examples, rows.validation.examples
    method = _method(task, train)
    predictions = [_prediction(task, value) for value in method(train, validation)]
    figures = KINDS[task.kind].measure(validation, predictions, rows.labels)
    return {"method": method.__name__, "value": figures[task.chosen_metric], "figures": figures}


def _method(task: TaskConfig, train: Sequence[Example]) -> Callable[[list[Example], list[Example]], list[Any]]:
    is_pair = len(train[0].texts) == 2
    if task.kind == "classification":
        return shared_words if is_pair else tfidf_logistic_regression
    if task.kind == "regression":
        return tfidf_cosine
    if task.kind == "token_classification":
        return most_frequent_tag if task.data.tag_scheme == "none" else longest_known_entity
    if task.kind == "question_answering":
        return closest_sentence if all(example.target.answers for example in train) else no_answer
    raise ValueError(f"no trivial method for a {task.kind} task")


def tfidf_logistic_regression(train: list[Example], validation: list[Example]) -> list[str]:
    """TF-IDF of words (characters) and their pairs, logistic regression."""
    texts = [example.texts[0] for example in train]
    vectorizer = _vectorizer(texts).set_params(ngram_range=(1, 2), sublinear_tf=True)
    classifier = LogisticRegression(C=10.0, max_iter=1000)
    classifier.fit(vectorizer.fit_transform(texts), [example.target for example in train])
    return list(classifier.predict(vectorizer.transform([example.texts[0] for example in validation])))


def tfidf_cosine(train: list[Example], validation: list[Example]) -> list[float]:
    """TF-IDF cosine of the two texts, with a line fitted through the training scores."""
    cosine = _cosine(train)
    line = LinearRegression().fit(cosine(train)[:, None], [example.target for example in train])
    return line.predict(cosine(validation)[:, None]).tolist()


def shared_words(train: list[Example], validation: list[Example]) -> list[str]:
    """Logistic regression over TF-IDF cosine and the share of the second text's words that the first has."""
    cosine = _cosine(train)

    def columns(examples: list[Example]) -> np.ndarray:
        return np.stack([cosine(examples), [_share(*example.texts) for example in examples]], axis=1)

    classifier = LogisticRegression().fit(columns(train), [example.target for example in train])
    return list(classifier.predict(columns(validation)))


def most_frequent_tag(train: list[Example], validation: list[Example]) -> list[Tags]:
    """The tag that a word has most often in training; of a word that is not there, the most frequent tag of all."""
    by_word: dict[str, Counter[str]] = {}
    for example in train:
        for word, tag in zip(example.texts, example.target, strict=True):
            by_word.setdefault(word.lower(), Counter())[tag] += 1
    usual = sum(by_word.values(), Counter()).most_common(1)[0][0]
    best = {word: counts.most_common(1)[0][0] for word, counts in by_word.items()}
    return [tuple(best.get(word.lower(), usual) for word in example.texts) for example in validation]


def longest_known_entity(train: list[Example], validation: list[Example]) -> list[Tags]:
    """The longest runs of words that were entities in training, with their most frequent type."""
    known: dict[tuple[str, ...], Counter[str]] = {}
    for example in train:
        for words, kind in _entities(example.texts, example.target):
            known.setdefault(words, Counter())[kind] += 1
    longest = max(map(len, known), default=0)
    return [_match(example.texts, known, longest) for example in validation]


def closest_sentence(train: list[Example], validation: list[Example]) -> list[str]:
    """The sentence of the context that shares most words with the question."""
    found = []
    for example in validation:
        question, context = example.texts
        sentences = [sentence for sentence in _SENTENCE_END.split(context) if sentence]
        found.append(max(sentences, key=lambda sentence: len(set(_words(question)) & set(_words(sentence)))))
    return found


def no_answer(train: list[Example], validation: list[Example]) -> list[str]:
    """No question has an answer."""
    return ["" for _ in validation]


def _prediction(task: TaskConfig, value: Any) -> Prediction:
    if task.kind != "question_answering":
        return Prediction(value)
    return Prediction(value, {"no_answer": -1.0 if value else 1.0, "answers": [{"text": value}] if value else []})


def _vectorizer(texts: Sequence[str]) -> TfidfVectorizer:
    is_chinese = sum(bool(_CHINESE.search(text)) for text in texts) > len(texts) / 2
    return TfidfVectorizer(analyzer="char") if is_chinese else TfidfVectorizer(token_pattern=r"\S+")


def _cosine(train: list[Example]) -> Callable[[list[Example]], np.ndarray]:
    texts = [text for example in train for text in example.texts]
    vectorizer = _vectorizer(texts).fit(texts)

    def cosine(examples: list[Example]) -> np.ndarray:
        first, second = (vectorizer.transform([example.texts[side] for example in examples]) for side in (0, 1))
        return np.asarray(first.multiply(second).sum(axis=1)).ravel()

    return cosine


def _share(first: str, second: str) -> float:
    words = _words(second)
    return len(set(words) & set(_words(first))) / max(1, len(set(words)))


def _words(text: str) -> list[str]:
    return re.findall(r"[\u3400-\u9fff]|[^\W_]+", text.lower())


def _entities(words: Sequence[str], tags: Tags) -> list[tuple[tuple[str, ...], str]]:
    """Return the words and the type of every entity of valid BIO tags."""
    found: list[tuple[list[str], str]] = []
    for word, tag in zip(words, tags, strict=True):
        if tag.startswith("B-"):
            found.append(([word], tag[2:]))
        elif tag.startswith("I-") and found:
            found[-1][0].append(word)
    return [(tuple(entity), kind) for entity, kind in found]


def _match(words: Sequence[str], known: dict[tuple[str, ...], Counter[str]], longest: int) -> Tags:
    tags: list[str] = []
    while (start := len(tags)) < len(words):
        for length in range(min(longest, len(words) - start), 0, -1):
            kinds = known.get(tuple(words[start : start + length]))
            if kinds is not None:
                kind = kinds.most_common(1)[0][0]
                tags += [f"B-{kind}", *[f"I-{kind}"] * (length - 1)]
                break
        else:
            tags.append("O")
    return tuple(tags)
